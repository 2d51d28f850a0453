// Registration of the compiled CPU kernels with PyTorch, on its stable ABI: one binary serves every
// torch from TORCH_TARGET_VERSION on and every Python. Here are the checks that memory safety
// needs; friendly errors, shapes, autograd and the choice of backend are in mmae_fast/ops.py.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <Python.h>
#include <cstdlib>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/api.h"
#include "cpu/pages.h"

namespace {

using mmae::Features;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The widest instruction set of this machine, or the one that MMAE_FAST_ISA names.
const mmae::Kernels& kernels() {
  static const mmae::Kernels& chosen = []() -> const mmae::Kernels& {
    const char* wanted = std::getenv("MMAE_FAST_ISA");
    const std::string name = wanted ? wanted : "";
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
    if (avx512 && (name.empty() || name == "avx512")) return mmae::kernels_avx512();
    if (avx2 && (name.empty() || name == "avx2")) return mmae::kernels_avx2();
#endif
    STD_TORCH_CHECK(name.empty() || name == "baseline", "MMAE_FAST_ISA=", name,
                    ": not an instruction set of this machine and build");
    return mmae::kernels_baseline();
  }();
  return chosen;
}

void parallel_for(int64_t count, int64_t grain, mmae::Body body, void* context) {
  torch::stable::parallel_for(0, count, grain,
                              [=](int64_t begin, int64_t end) { body(begin, end, context); });
}

mmae::Threads threads() { return {parallel_for, int64_t(torch::stable::get_num_threads())}; }

mmae::DType dtype_of(const Tensor& z) {
  switch (z.scalar_type()) {
    case ScalarType::Float: return mmae::DType::kFloat32;
    case ScalarType::Double: return mmae::DType::kFloat64;
    case ScalarType::BFloat16: return mmae::DType::kBFloat16;
    case ScalarType::Half: return mmae::DType::kFloat16;
    default: break;
  }
  STD_TORCH_CHECK(false, "mmae_fast: z must be float32, float64, bfloat16 or float16");
}

ScalarType accumulation_type(const Tensor& z) {
  return z.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Features describe(const Tensor& z, const std::optional<Tensor>& mask, bool normalize, bool center) {
  const int64_t dims = z.dim();
  STD_TORCH_CHECK(dims >= 2 && dims - 2 <= mmae::kMaxBatchDims, "mmae_fast: z must be (..., n, d)");
  Features f{};
  f.z = z.const_data_ptr();
  f.dtype = dtype_of(z);
  f.n = z.size(dims - 2);
  f.d = z.size(dims - 1);
  f.row_stride = z.stride(dims - 2);
  f.column_stride = z.stride(dims - 1);
  f.normalize = normalize;
  f.center = center;
  f.batch = 1;
  f.batch_dims = int(dims - 2);
  for (int i = 0; i < f.batch_dims; ++i) {
    f.batch_sizes[i] = z.size(i);
    f.z_strides[i] = z.stride(i);
    f.batch *= z.size(i);
  }
  if (mask) {
    STD_TORCH_CHECK(mask->dim() == dims - 1 && mask->scalar_type() == ScalarType::Bool,
                    "mmae_fast: mask must be bool with the shape of z without its last dimension");
    for (int i = 0; i < dims - 1; ++i)
      STD_TORCH_CHECK(mask->size(i) == z.size(i), "mmae_fast: mask and z disagree in dimension ",
                      i);
    f.mask = static_cast<const bool*>(mask->const_data_ptr());
    for (int i = 0; i < f.batch_dims; ++i) f.mask_strides[i] = mask->stride(i);
    f.mask_stride = mask->stride(dims - 2);
  }
  return f;
}

void check_contiguous(const Tensor& x, const Tensor& z, int64_t numel, const char* name) {
  STD_TORCH_CHECK(
      x.is_contiguous() && x.numel() == numel && x.scalar_type() == accumulation_type(z),
      "mmae_fast: ", name, " must be contiguous, of z's accumulation dtype, with ", numel,
      " entries");
}

std::vector<int64_t> batch_shape(const Tensor& z) {
  std::vector<int64_t> shape;
  for (int64_t i = 0; i + 2 < z.dim(); ++i) shape.push_back(z.size(i));
  return shape;
}

Tensor empty(const Tensor& like, const std::vector<int64_t>& shape, ScalarType type) {
  return torch::stable::new_empty(like, shape, type);
}

// The results that may be large: from memory that earlier calls have used, if there is some.
Tensor empty_large(const Tensor& like, const std::vector<int64_t>& shape, ScalarType type) {
  size_t bytes = type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2;
  for (const int64_t size : shape) bytes *= size_t(size);
  if (bytes < mmae::Pages::kLarge) return empty(like, shape, type);
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t i = shape.size() - 1; i > 0; --i) strides[i - 1] = strides[i] * shape[i];
  void* data = mmae::Pages::of_this_process().take(bytes);
  return torch::stable::from_blob(data, shape, strides, like.device(), type, [](void* block) {
    mmae::Pages::of_this_process().give_back(block);
  });
}

struct Outputs {
  Tensor value, weight;
};

Outputs allocate(const Tensor& z, const Features& f, bool need_weight) {
  std::vector<int64_t> shape = batch_shape(z);
  Tensor value = empty(z, shape, accumulation_type(z));
  if (need_weight) {
    shape.push_back(f.k());
    shape.push_back(f.k());
  } else {
    shape = {0};
  }
  return {value, empty_large(z, shape, accumulation_type(z))};
}

std::tuple<Tensor, Tensor> coding_rate(const Tensor& z, const std::optional<Tensor>& mask,
                                       double scale, bool normalize, bool center,
                                       bool need_weight) {
  const Features f = describe(z, mask, normalize, center);
  Outputs out = allocate(z, f, need_weight);
  kernels().coding_rate(f, scale, out.value.mutable_data_ptr(),
                        need_weight ? out.weight.mutable_data_ptr() : nullptr, threads());
  return {out.value, out.weight};
}

bool serves_entropy(const Tensor& z, double alpha, int64_t k) {
  return kernels().serves_entropy(dtype_of(z), alpha, k);
}

void check_entropy(const Tensor& z, double alpha, int64_t k) {
  STD_TORCH_CHECK(serves_entropy(z, alpha, k), "mmae_fast: no compiled entropy of order ", alpha,
                  " for k = ", k);
}

std::tuple<Tensor, Tensor> entropy(const Tensor& z, const std::optional<Tensor>& mask, double alpha,
                                   bool normalize, bool center, bool need_weight) {
  const Features f = describe(z, mask, normalize, center);
  Outputs out = allocate(z, f, need_weight);
  check_entropy(z, alpha, f.k());
  kernels().entropy(f, alpha, out.value.mutable_data_ptr(),
                    need_weight ? out.weight.mutable_data_ptr() : nullptr, threads());
  return {out.value, out.weight};
}

std::tuple<Tensor, Tensor, Tensor> joint_entropy(const Tensor& z1, const Tensor& z2,
                                                 const std::optional<Tensor>& mask, double alpha,
                                                 bool normalize, bool center, bool need_weight) {
  const Features f1 = describe(z1, mask, normalize, center);
  const Features f2 = describe(z2, mask, normalize, center);
  STD_TORCH_CHECK(batch_shape(z1) == batch_shape(z2) && f1.n == f2.n && f1.dtype == f2.dtype,
                  "mmae_fast: two views must agree in batch, rows and dtype");
  check_entropy(z1, alpha, f1.n);
  std::vector<int64_t> shape = batch_shape(z1);
  Tensor value = empty(z1, shape, accumulation_type(z1));
  if (need_weight)
    shape.insert(shape.end(), 2, f1.n);
  else
    shape = {0};
  Tensor weight1 = empty_large(z1, shape, accumulation_type(z1)),
         weight2 = empty_large(z1, shape, accumulation_type(z1));
  kernels().joint_entropy(f1, f2, alpha, value.mutable_data_ptr(),
                          need_weight ? weight1.mutable_data_ptr() : nullptr,
                          need_weight ? weight2.mutable_data_ptr() : nullptr, threads());
  return {value, weight1, weight2};
}

void check_square(const Tensor& x, const char* name) {
  const int64_t dims = x.dim();
  STD_TORCH_CHECK(
      dims >= 2 && x.size(dims - 1) == x.size(dims - 2) && x.scalar_type() == accumulation_type(x),
      "mmae_fast: ", name, " must be (..., k, k), float32 or float64");
}

std::tuple<Tensor, Tensor> gram_entropy(const Tensor& gram, double alpha, bool need_weight) {
  check_square(gram, "gram");
  const int64_t k = gram.size(gram.dim() - 1);
  std::vector<int64_t> shape = batch_shape(gram);
  Tensor value = empty(gram, shape, gram.scalar_type());
  const int64_t batch = value.numel();
  check_contiguous(gram, gram, batch * k * k, "gram");
  check_entropy(gram, alpha, k);
  if (need_weight)
    shape.insert(shape.end(), 2, k);
  else
    shape = {0};
  Tensor weight = empty_large(gram, shape, gram.scalar_type());
  kernels().gram_entropy(dtype_of(gram), batch, k, alpha, gram.const_data_ptr(),
                         value.mutable_data_ptr(),
                         need_weight ? weight.mutable_data_ptr() : nullptr, threads());
  return {value, weight};
}

Tensor spectral(const Tensor& vectors, const Tensor& f) {
  check_square(vectors, "vectors");
  const int64_t k = vectors.size(vectors.dim() - 1), batch = k ? vectors.numel() / (k * k) : 0;
  check_contiguous(vectors, vectors, batch * k * k, "vectors");
  check_contiguous(f, vectors, batch * k, "f");
  std::vector<int64_t> shape = batch_shape(vectors);
  shape.insert(shape.end(), 2, k);
  Tensor out = empty_large(vectors, shape, vectors.scalar_type());
  kernels().spectral(dtype_of(vectors), batch, k, vectors.const_data_ptr(), f.const_data_ptr(),
                     out.mutable_data_ptr(), threads());
  return out;
}

std::tuple<Tensor, Tensor, Tensor> gram(const Tensor& z, const std::optional<Tensor>& mask,
                                        bool samples, bool normalize, bool center) {
  const Features f = describe(z, mask, normalize, center);
  std::vector<int64_t> batch = batch_shape(z), square = batch, rows = batch, columns = batch;
  square.insert(square.end(), 2, samples ? f.n : f.d);
  rows.push_back(f.n);
  columns.push_back(f.d);
  const ScalarType type = accumulation_type(z);
  Tensor g = empty_large(z, square, type), inverse_norm = empty(z, rows, type),
         mean = empty(z, columns, type);
  kernels().gram(f, samples, g.mutable_data_ptr(), inverse_norm.mutable_data_ptr(),
                 mean.mutable_data_ptr(), threads());
  return {g, inverse_norm, mean};
}

Tensor grad_like(const Tensor& z, const Features& f) {
  std::vector<int64_t> shape = batch_shape(z);
  shape.push_back(f.n);
  shape.push_back(f.d);
  return empty_large(z, shape, z.scalar_type());
}

Tensor gram_bwd(const Tensor& grad, const Tensor& z, const std::optional<Tensor>& mask,
                const Tensor& gram, const Tensor& inverse_norm, const Tensor& mean, bool samples,
                bool normalize, bool center) {
  const Features f = describe(z, mask, normalize, center);
  const int64_t k = samples ? f.n : f.d;
  check_contiguous(grad, z, f.batch * k * k, "grad");
  check_contiguous(gram, z, f.batch * k * k, "gram");
  check_contiguous(inverse_norm, z, f.batch * f.n, "inverse_norm");
  check_contiguous(mean, z, f.batch * f.d, "mean");
  Tensor grad_z = grad_like(z, f);
  kernels().gram_bwd(f, samples, grad.const_data_ptr(), gram.const_data_ptr(),
                     inverse_norm.const_data_ptr(), mean.const_data_ptr(),
                     grad_z.mutable_data_ptr(), threads());
  return grad_z;
}

Tensor weight_bwd(const Tensor& grad, const Tensor& z, const std::optional<Tensor>& mask,
                  const Tensor& weight, bool samples, bool normalize, bool center) {
  const Features f = describe(z, mask, normalize, center);
  const int64_t k = samples ? f.n : f.d;
  check_contiguous(weight, z, f.batch * k * k, "weight");
  check_contiguous(grad, z, f.batch, "grad");
  Tensor grad_z = grad_like(z, f);
  kernels().weight_bwd(f, samples, grad.const_data_ptr(), weight.const_data_ptr(),
                       grad_z.mutable_data_ptr(), threads());
  return grad_z;
}

std::string isa() { return kernels().name; }
int64_t max_eigen() { return kernels().max_eigen; }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mmae_fast, m) {
  m.def(
      "cpu_coding_rate(Tensor z, Tensor? mask, float scale, bool normalize, bool center, "
      "bool need_weight) -> (Tensor value, Tensor weight)");
  m.def(
      "cpu_entropy(Tensor z, Tensor? mask, float alpha, bool normalize, bool center, "
      "bool need_weight) -> (Tensor value, Tensor weight)");
  m.def(
      "cpu_joint_entropy(Tensor z1, Tensor z2, Tensor? mask, float alpha, bool normalize, "
      "bool center, bool need_weight) -> (Tensor value, Tensor weight1, Tensor weight2)");
  m.def(
      "cpu_gram_entropy(Tensor gram, float alpha, bool need_weight) -> (Tensor value, Tensor "
      "weight)");
  m.def("cpu_spectral(Tensor vectors, Tensor f) -> Tensor");
  m.def(
      "cpu_gram(Tensor z, Tensor? mask, bool samples, bool normalize, bool center) -> (Tensor "
      "gram, "
      "Tensor inverse_norm, Tensor mean)");
  m.def(
      "cpu_gram_bwd(Tensor grad, Tensor z, Tensor? mask, Tensor gram, Tensor inverse_norm, "
      "Tensor mean, bool samples, bool normalize, bool center) -> Tensor");
  m.def(
      "cpu_weight_bwd(Tensor grad, Tensor z, Tensor? mask, Tensor weight, bool samples, "
      "bool normalize, bool center) -> Tensor");
  m.def("cpu_isa() -> str");
  m.def("cpu_max_eigen() -> int");
  m.def("cpu_serves_entropy(Tensor z, float alpha, int k) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(mmae_fast, CPU, m) {
  m.impl("cpu_coding_rate", TORCH_BOX(&coding_rate));
  m.impl("cpu_entropy", TORCH_BOX(&entropy));
  m.impl("cpu_joint_entropy", TORCH_BOX(&joint_entropy));
  m.impl("cpu_gram_entropy", TORCH_BOX(&gram_entropy));
  m.impl("cpu_spectral", TORCH_BOX(&spectral));
  m.impl("cpu_gram", TORCH_BOX(&gram));
  m.impl("cpu_gram_bwd", TORCH_BOX(&gram_bwd));
  m.impl("cpu_weight_bwd", TORCH_BOX(&weight_bwd));
}

STABLE_TORCH_LIBRARY_IMPL(mmae_fast, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&isa));
  m.impl("cpu_max_eigen", TORCH_BOX(&max_eigen));
  m.impl("cpu_serves_entropy", TORCH_BOX(&serves_entropy));
}

// An importable (empty) module: wheels, `pip` and `import mmae_fast._C` then treat it as any other
// extension. Importing it runs the registrations above.
PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
