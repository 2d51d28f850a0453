// The CUDA kernels under ThreadSanitizer, on threads (threads.h): no torch, no Python.
//
//     main [quick] [KERNEL...] [without=FILE:LINE]
//
// runs the kernels of that name (spectral, packed, jacobi, gram; all without a name) and the
// products around them, on all their cases or on the first (quick), and holds values and gradients
// against plain loops in double precision. ThreadSanitizer has to report a barrier that is switched
// off by `without`, and the planted races `shuffle` and `blocks`. tests/sanitize.py runs it.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

#include "cpu_threads/truth.h"
#include "cuda/launch.h"

namespace {

using namespace mmae;

// Kernels whose threads stride over any number of them get few: ThreadSanitizer's time is theirs.
struct Launcher {
  emulation::Launcher on_threads;

  template <class... P, class... A>
  void operator()(void (*kernel)(P...), int64_t blocks, int threads, int shared_bytes,
                  A... arguments) {
    constexpr bool any = (std::is_same_v<P, cuda::PackedPlan> || ...) ||
                         (std::is_same_v<P, cuda::JacobiPlan> || ...);
    on_threads(kernel, blocks, any ? std::min(threads, 128) : threads, shared_bytes, arguments...);
  }
};

// Of a symmetric matrix, by plane rotations.
Numbers eigenvalues(Numbers a, int64_t k) {
  const auto at = [&](int64_t i, int64_t j) -> double& { return a[size_t(i * k + j)]; };
  for (int sweep = 0; sweep < 12; ++sweep)
    for (int64_t p = 0; p < k; ++p)
      for (int64_t q = p + 1; q < k; ++q) {
        if (at(p, q) == 0) continue;
        const double angle = std::atan2(2 * at(p, q), at(q, q) - at(p, p)) / 2;
        const double c = std::cos(angle), s = std::sin(angle);
        for (int64_t i = 0; i < k; ++i) {
          const double x = at(i, p), y = at(i, q);
          at(i, p) = c * x - s * y, at(i, q) = s * x + c * y;
        }
        for (int64_t i = 0; i < k; ++i) {
          const double x = at(p, i), y = at(q, i);
          at(p, i) = c * x - s * y, at(q, i) = s * x + c * y;
        }
      }
  Numbers lam(static_cast<size_t>(k));
  for (int64_t i = 0; i < k; ++i) lam[size_t(i)] = at(i, i);
  return lam;
}

double entropy(const Numbers& lam, double alpha) {
  double total = 0, largest = 0, sum = 0;
  for (double x : lam) total += x, largest = std::max(largest, x);
  if (total == 0) return 0;
  if (std::isinf(alpha)) return std::log(total / largest);
  for (double x : lam)
    if (x > 1e-12 * total)
      sum += alpha == 1 ? -x / total * std::log(x / total) : std::pow(x / total, alpha);
  return alpha == 1 ? sum : std::log(sum) / (1 - alpha);
}

double measure_of(const Numbers& gram, int64_t k, const cuda::Measure& m) {
  return m.is_rate      ? log_det(gram, k, m.scale)
         : m.alpha == 2 ? renyi2(gram, k)
                        : entropy(eigenvalues(gram, k), m.alpha);
}

struct Case {
  const char* kernel;
  int type;  // of kTypes
  int64_t batch, n, d;
  bool normalize, center, masked;
  cuda::Measure measure;
};

constexpr cuda::Measure kRate{true, 0.5, 0, false}, kRenyi2{false, 0, 2, false};
constexpr cuda::Measure kVonNeumann{false, 0, 1, false}, kMin{false, 0, INFINITY, false};

// The quick ones first. Both sides of every kernel, both compute types, every storage type; two
// steps of a staged product (depth 16 or 32), both block sizes of the fused kernel, four tiles of a
// Gram matrix.
const Case kCases[] = {
    {"spectral", 0, 2, 20, 40, true, true, true, kRate},
    {"spectral", 0, 2, 40, 20, true, true, false, kRate},
    {"spectral", 1, 2, 20, 24, false, true, false, kRenyi2},
    {"spectral", 1, 2, 24, 20, false, false, true, kRenyi2},
    {"spectral", 2, 2, 12, 40, true, false, false, kRate},
    {"spectral", 3, 2, 40, 12, true, true, false, kRenyi2},
    {"spectral", 0, 1, 36, 40, false, true, false, kRate},
    {"spectral", 1, 1, 40, 36, true, true, false, kRate},
    {"packed", 0, 2, 40, 44, true, true, true, kRate},
    {"packed", 1, 2, 44, 40, true, true, false, kRate},
    {"packed", 1, 1, 36, 40, false, false, true, kRate},
    {"packed", 0, 2, 40, 36, false, true, false, kRenyi2},
    {"packed", 1, 1, 36, 40, true, true, false, kRenyi2},
    {"jacobi", 0, 2, 20, 24, true, true, true, kVonNeumann},
    {"jacobi", 1, 2, 24, 20, false, true, false, kVonNeumann},
    {"jacobi", 0, 1, 36, 36, true, false, false, kVonNeumann},
    {"jacobi", 1, 1, 12, 12, true, true, false, kMin},
    {"gram", 0, 1, 70, 40, true, true, true, {}},
    {"gram", 1, 1, 70, 40, true, false, false, {}},
    {"gram", 2, 1, 70, 40, true, false, false, {}},
};

DType result_type(const Type& type) {
  return type.result_bytes == 8 ? DType::kFloat64 : DType::kFloat32;
}

template <class T>
struct Outputs {
  const Input& in;
  Buffer value, weight, grad_z, gram, scale, mean, along, common;

  explicit Outputs(const Input& input) : Outputs(input, input.f.batch, input.f.n, input.f.d) {}
  Outputs(const Input& input, int64_t batch, int64_t n, int64_t d)
      : in(input), value(array(batch)), weight(array(batch * in.f.k() * in.f.k())),
        grad_z(batch * n * d, in.type.bytes, 0xff),
        gram(array(batch * std::max(n, d) * std::max(n, d))), scale(array(batch * n)),
        mean(array(batch * d)), along(array(batch * n)), common(array(batch)) {}

  static Buffer array(int64_t count) { return Buffer(count, sizeof(T), 0xff); }
  static T* at(const Buffer& buffer) { return reinterpret_cast<T*>(buffer.bytes.get()); }
};

template <class T>
void check_measure(Launcher& launch, const Input& in, const cuda::Measure& m, bool fused) {
  using Out = Outputs<T>;
  const Out out(in);
  const int64_t batch = in.f.batch, k = in.f.k();
  Buffer grad = Out::array(batch);
  const cuda::Scratch scratch =
      fused ? cuda::Scratch{}
            : cuda::Scratch{Out::at(out.gram), Out::at(out.scale), Out::at(out.mean),
                            Out::at(out.along), Out::at(out.common)};
  for (T* weight : {static_cast<T*>(nullptr), Out::at(out.weight)}) {
    if (!weight && !m.is_rate) continue;  // a rate alone takes another way
    cuda::launch_measure<T>(launch, in.f, m, Out::at(out.value), weight, scratch);
    const Numbers value = out.value.numbers(result_type(in.type));
    for (int64_t b = 0; b < batch; ++b) {
      const double wanted = measure_of(gram_of(in, in.z, b, in.f.samples()), k, m);
      const double error = std::abs(value[size_t(b)] - wanted);
      const double allowed = in.type.value_tolerance * (double(k) + std::abs(wanted));
      check(error <= allowed, "value", error, allowed);
    }
  }
  for (int64_t b = 0; b < batch; ++b) Out::at(grad)[b] = b % 2 ? T(1.5) : T(0.5);
  cuda::launch_weight_bwd<T>(launch, in.f, Out::at(grad), Out::at(out.weight), Out::at(out.scale),
                             Out::at(out.mean), out.grad_z.bytes.get());
  const Numbers grad_z = out.grad_z.numbers(in.type.dtype);
  for (int64_t b = 0; b < batch; ++b)
    check_slope(in, grad_z, b, b % 2 ? 1.5 : 0.5, [&](const Numbers& z, int64_t at) {
      return measure_of(gram_of(in, z, at, in.f.samples()), k, m);
    });
}

template <class T>
void check_gram(Launcher& launch, const Input& in) {
  using Out = Outputs<T>;
  const Out out(in);
  const int64_t k = in.f.n;
  cuda::launch_gram<T>(launch, in.f, true, Out::at(out.gram), Out::at(out.scale), Out::at(out.mean),
                       false);
  const Numbers got = out.gram.numbers(result_type(in.type));
  const Numbers wanted = gram_of(in, in.z, 0, true);
  double error = 0;
  for (int64_t i = 0; i < k * k; ++i) {
    const double e = std::abs(got[size_t(i)] - wanted[size_t(i)]);
    error = e <= error ? error : e;  // keeps NaN
  }
  check(error <= 4 * in.type.value_tolerance, "Gram", error, 4 * in.type.value_tolerance);
}

void run(Launcher& launch, const Case& c) {
  const Type& type = kTypes[c.type];
  context = std::string(c.kernel) + " " + type.name + " " + std::to_string(c.batch) + "x" +
            std::to_string(c.n) + "x" + std::to_string(c.d);
  const Input in(type, gaussian(c.batch * c.n * c.d, 1), c.batch, c.n, c.d, c.normalize, c.center,
                 c.masked, Layout::kContiguous);
  const bool fused = !std::strcmp(c.kernel, "spectral");
  cuda::dispatch(type.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    if (!std::strcmp(c.kernel, "gram"))
      check_gram<T>(launch, in);
    else
      check_measure<T>(launch, in, c.measure, fused);
  });
}

// Races that no barrier of a block prevents: between the lanes of a warp, whose shuffles order no
// memory, and between blocks.
inline void shuffle_kernel(float* out) {
  const int t = int(threadIdx.x);
  const emulation::Shared<float> x = emulation::shared_array<float>(0, int(blockDim.x));
  x[t] = float(__shfl_xor_sync(0xffffffffu, t, 1));
  out[t] = float(__shfl_xor_sync(0xffffffffu, t, 1)) + x[t ^ 1];
}
inline void blocks_kernel(float* out) { out[threadIdx.x] = float(blockIdx.x); }

}  // namespace

int main(int count, char** arguments) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  std::vector<std::string> kernels(arguments + 1, arguments + count);
  bool quick = false;
  const std::string without = "without=";
  const auto is_option = [&](const std::string& argument) {
    quick |= argument == "quick";
    if (argument.rfind(without, 0) == 0) emulation::skipped = argument.substr(without.size());
    return argument == "quick" || argument.rfind(without, 0) == 0;
  };
  kernels.erase(std::remove_if(kernels.begin(), kernels.end(), is_option), kernels.end());
  const auto wanted = [&](const char* name) {
    return std::count(kernels.begin(), kernels.end(), name) > 0;
  };
  Launcher launch;
  std::vector<float> out(64);
  if (wanted("shuffle")) launch(shuffle_kernel, 1, 64, 64 * 4, out.data());
  if (wanted("blocks")) launch(blocks_kernel, 2, 64, 0, out.data());
  const char* last = "";
  for (const Case& c : kCases) {
    const bool first = std::strcmp(c.kernel, last) != 0;
    last = c.kernel;
    if ((kernels.empty() || wanted(c.kernel)) && (first || !quick)) run(launch, c);
  }
  std::printf("CUDA kernels: %d checks, %d failures\n", checks, failures);
  return failures > 0 || checks == 0;
}
