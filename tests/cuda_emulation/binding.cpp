// Python's way to the emulated kernels: the launchers of csrc/cuda/launch.h on host pointers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "cuda/launch.h"

namespace py = pybind11;
using namespace mmae;

namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

Features features(uintptr_t z, int dtype, std::vector<int64_t> sizes, std::vector<int64_t> strides,
                  uintptr_t mask, std::vector<int64_t> mask_strides, bool normalize, bool center) {
  Features f{};
  const int batch_dims = int(sizes.size()) - 2;
  f.z = pointer<void>(z);
  f.dtype = DType(dtype);
  f.batch = 1;
  f.batch_dims = batch_dims;
  f.n = sizes[batch_dims];
  f.d = sizes[batch_dims + 1];
  f.row_stride = strides[batch_dims];
  f.column_stride = strides[batch_dims + 1];
  f.mask = pointer<bool>(mask);
  for (int i = 0; i < batch_dims; ++i) {
    f.batch *= f.batch_sizes[i] = sizes[i];
    f.z_strides[i] = strides[i];
    if (mask) f.mask_strides[i] = mask_strides[i];
  }
  if (mask) f.mask_stride = mask_strides[batch_dims];
  f.normalize = normalize;
  f.center = center;
  return f;
}

using Launches = std::vector<std::array<int64_t, 3>>;

template <class F>
Launches run(const Features& f, unsigned seed, const F& body) {
  emulation::Launcher launch{seed, {}};
  emulation::block().barriers.clear();
  cuda::dispatch(f.dtype, [&](auto* t) { body(launch, t); });
  return launch.launches;
}

Launches measure(const Features& f, bool is_rate, double scale, double alpha, bool tf32,
                 uintptr_t value, uintptr_t weight, std::array<uintptr_t, 5> scratch,
                 unsigned seed) {
  const cuda::Measure m{is_rate, scale, alpha, tf32};
  const cuda::Scratch s{pointer<void>(scratch[0]), pointer<void>(scratch[1]),
                        pointer<void>(scratch[2]), pointer<void>(scratch[3]),
                        pointer<void>(scratch[4])};
  return run(f, seed, [&](auto& launch, auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    cuda::launch_measure<T>(launch, f, m, pointer<T>(value), pointer<T>(weight), s);
  });
}

Launches gram_entropy(const Features& f, double alpha, uintptr_t value, uintptr_t weight,
                      unsigned seed) {
  return run(f, seed, [&](auto& launch, auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    cuda::launch_gram_entropy<T>(launch, f.batch, f.n, static_cast<const T*>(f.z), alpha,
                                 pointer<T>(value), pointer<T>(weight));
  });
}

Launches gram(const Features& f, bool samples, bool tf32, uintptr_t out, uintptr_t scale,
              uintptr_t mean, unsigned seed) {
  return run(f, seed, [&](auto& launch, auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    cuda::launch_gram<T>(launch, f, samples, pointer<T>(out), pointer<T>(scale), pointer<T>(mean),
                         tf32);
  });
}

Launches weight_bwd(const Features& f, uintptr_t grad, uintptr_t weight, uintptr_t scale,
                    uintptr_t mean, uintptr_t grad_z, bool tf32, unsigned seed) {
  return run(f, seed, [&](auto& launch, auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    cuda::launch_weight_bwd<T>(launch, f, pointer<const T>(grad), pointer<const T>(weight),
                               pointer<T>(scale), pointer<T>(mean), pointer<void>(grad_z), tf32);
  });
}

// Faults that the harness must find.
enum class Fault { kNone, kNoBarrier, kOutOfBounds, kUninitialised, kDivergent };

inline void reverse_kernel(Fault fault, float* out) {
  const int t = int(threadIdx.x), last = int(blockDim.x) - 1;
  const emulation::Shared<float> x = emulation::shared_array<float>(0, last + 1);
  if (fault != Fault::kUninitialised || t != 3) x[t + (fault == Fault::kOutOfBounds)] = float(t);
  if (fault == Fault::kDivergent && t == 3) return;
  if (fault != Fault::kNoBarrier) __syncthreads();
  out[t] = x[last - t];
}

std::vector<float> reverse(Fault fault, unsigned seed) {
  std::vector<float> out(64);
  emulation::Launcher launch{seed, {}};
  launch(reverse_kernel, 1, 64, 64 * 4, fault, out.data());
  return out;
}

// The Jacobi kernel on a plan with a mistake, which the harness must find.
enum class Mistake { kNone, kShort, kStride, kOverlap };

void mistaken_jacobi(Mistake mistake, const Features& f, uintptr_t value, uintptr_t weight) {
  cuda::JacobiPlan plan = cuda::jacobi_plan(f.n, false);
  if (mistake == Mistake::kShort) plan.shared_bytes -= 16;
  if (mistake == Mistake::kStride) plan.ld = plan.k - 1;
  if (mistake == Mistake::kOverlap) plan.coefficient = plan.norms;
  emulation::Launcher launch{0, {}};
  const cuda::GramInput<float> in{cuda::Side::kGram, static_cast<const float*>(f.z), nullptr,
                                  nullptr, nullptr};
  launch(cuda::jacobi_kernel<float, 256>, f.batch, plan.threads, plan.shared_bytes, f, in, plan,
         1.0, pointer<float>(value), pointer<float>(weight));
}

cuda::Unit unit_of(bool is_double) { return is_double ? cuda::Unit::kDouble : cuda::Unit::kFloat; }

// One row of the plans of the kernels that take one matrix per block.
py::dict plan(cuda::Kernel kernel, int64_t k, bool is_double) {
  py::dict row;
  row["shared_bytes"] = cuda::shared_bytes(kernel, k, is_double);
  if (kernel == cuda::Kernel::kSpectral) {
    const cuda::SpectralPlan p = cuda::spectral_plan(k, unit_of(is_double));
    row["threads"] = p.threads;
    row["ld"] = p.ld;
    row["width"] = p.width;
    row["tile"] = p.tile;
  } else if (kernel == cuda::Kernel::kJacobi) {
    const cuda::JacobiPlan p = cuda::jacobi_plan(k, is_double);
    row["threads"] = p.threads;
    row["ld"] = p.ld;
    row["lanes"] = p.lanes;
  } else {
    row["threads"] = cuda::kPackedThreads;
  }
  return row;
}

// One product of a warp on whole operands, left (16, K) and right (8, K), of float32 (K = 8) or
// 16-bit numbers (K = 16). Which entry a lane holds is said here in strides over column-major
// operands, as CUTLASS's MMA_Traits say it: the kernels and the emulated instructions index by rows
// and columns.
void warp_kernel(int dtype, const void* left, const void* right, float* out) {
  const int lane = int(threadIdx.x), q = lane % 4, g = lane / 4;
  float d[4] = {};
  const auto number = [](const void* p, int rows, int at) {
    return static_cast<const float*>(p)[at % rows * 8 + at / rows];
  };
  const auto pair = [](const void* p, int rows, int at) {
    const auto* x = static_cast<const uint16_t*>(p) + at % rows * 16 + at / rows;
    return x[0] | uint32_t(x[1]) << 16;
  };
  if (DType(dtype) == DType::kFloat32) {
    float a[4], b[2];
    for (int v = 0; v < 4; ++v) a[v] = number(left, 16, 16 * q + g + v % 2 * 8 + v / 2 * 64);
    for (int v = 0; v < 2; ++v) b[v] = number(right, 8, 8 * q + g + v * 32);
    cuda::mma_tf32(d, a, b);
  } else {
    uint32_t a[4], b[2];
    for (int v = 0; v < 4; ++v) a[v] = pair(left, 16, 32 * q + g + v % 2 * 8 + v / 2 * 128);
    for (int v = 0; v < 2; ++v) b[v] = pair(right, 8, 16 * q + g + v * 64);
    if (DType(dtype) == DType::kBFloat16)
      cuda::mma_pairs<true>(d, a, b);
    else
      cuda::mma_pairs<false>(d, a, b);
  }
  for (int v = 0; v < 4; ++v) {
    const int at = 32 * q + g + v % 2 * 16 + v / 2 * 8;  // of a 16 x 8 result
    out[at % 16 * 8 + at / 16] = d[v];
  }
}

void warp_product(int dtype, uintptr_t left, uintptr_t right, uintptr_t out) {
  emulation::Launcher launch{0, {}};
  launch(warp_kernel, 1, 32, 0, dtype, pointer<const void>(left), pointer<const void>(right),
         pointer<float>(out));
}

// The banks of the words that a warp reads for an operand, or writes by stage_columns, at once.
std::vector<int> banks(int depth, bool writes) {
  const int row = cuda::row_words(depth);
  std::vector<int> found;
  for (int lane = 0; lane < 32; ++lane)
    found.push_back((writes ? lane % 8 * row + lane / 8 : lane / 4 * row + lane % 4) % 32);
  return found;
}

}  // namespace

PYBIND11_MODULE(MODULE_NAME, m) {
  py::class_<Features>(m, "Features").def(py::init(&features));
  m.def("measure", &measure);
  m.def("gram_entropy", &gram_entropy);
  m.def("gram", &gram);
  m.def("weight_bwd", &weight_bwd);
  py::enum_<cuda::Kernel>(m, "Kernel")
      .value("spectral", cuda::Kernel::kSpectral)
      .value("packed_rate", cuda::Kernel::kPackedRate)
      .value("packed_renyi2", cuda::Kernel::kPackedRenyi2)
      .value("jacobi", cuda::Kernel::kJacobi);
  m.def("plan", &plan);
  m.def("warp_product", &warp_product);
  m.def("banks", &banks);
  m.def("needs_scratch", [](bool is_rate, double alpha, int64_t k, bool is_double) {
    return !cuda::is_fused({is_rate, 0, alpha, false}, k, is_double);
  });
  m.def("product_shared_bytes",
        [](bool is_double) { return cuda::product_plan(unit_of(is_double)).shared_bytes; });
  m.def("rows_shared_bytes", [](int64_t d, bool is_double) {
    return cuda::rows_plan(d, unit_of(is_double)).shared_bytes;
  });
  m.def("largest_order", [](cuda::Kernel kernel, bool is_double, int shared) {
    return cuda::max_order(kernel, is_double, shared);
  });
  m.def("max_order", [](bool is_rate, double alpha, bool is_double, int shared) {
    return cuda::max_order(cuda::kernel_of({is_rate, 0, alpha, false}), is_double, shared);
  });
  m.attr("entries_per_lane") = cuda::JacobiPlan::kEntries;
  m.def("barriers", []() { return emulation::block().barriers; });
  m.def("skip_barrier", [](std::string where) { emulation::block().skipped = where; });
  py::enum_<Fault>(m, "Fault")
      .value("none", Fault::kNone)
      .value("no_barrier", Fault::kNoBarrier)
      .value("out_of_bounds", Fault::kOutOfBounds)
      .value("uninitialised", Fault::kUninitialised)
      .value("divergent", Fault::kDivergent);
  m.def("reverse", &reverse);
  py::enum_<Mistake>(m, "Mistake")
      .value("none", Mistake::kNone)
      .value("short", Mistake::kShort)
      .value("stride", Mistake::kStride)
      .value("overlap", Mistake::kOverlap);
  m.def("mistaken_jacobi", &mistaken_jacobi);
  m.attr("max_columns") = cuda::kMaxOrder;
  m.attr("shared_budget") = cuda::kSharedBudget;
  m.attr("row_mean_shared_bytes") = cuda::kMeanShared;
  m.attr("common_scale_shared_bytes") = cuda::kCommonShared;
}
