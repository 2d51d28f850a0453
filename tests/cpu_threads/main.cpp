// The kernel table of csrc/cpu on threads of its own: no torch, no Python. Every function is run
// for every instruction set of the machine, storage type, side and row option, with few large
// matrices (whose loops are shared among the threads) and many small ones (which are shared
// themselves), and
//   - compared with plain loops in double precision (gradients: with central differences of them);
//   - run twice per thread count into memory that held other bytes: bitwise equal results.
// tests/sanitize.py compiles it for ThreadSanitizer and AddressSanitizer, `make arm64-check` for
// the emulator of another processor. Two switches prove that the sanitizers see the kernels'
// memory: MMAE_PLANT_RACE lets the threads' shares overlap, MMAE_PLANT_OVERFLOW makes an output too
// short.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "cpu/api.h"
#include "inputs.h"
#include "threads.h"
#include "truth.h"

namespace {

using mmae::Kernels;

// --------------------------------------------------------------------------------------------------
// One call of the table

struct Output {
  Buffer value, weight, grad_z;
  bool operator==(const Output& o) const {
    return value == o.value && weight == o.weight && grad_z == o.grad_z;
  }
};

using Forward = std::function<void(const Features&, void* value, void* weight)>;

// Value alone, value and weight, gradient (of the sum of values, cotangent 1 ± 1/2).
Output differentiate(const Kernels& kernels, const Input& in, const Forward& forward, int fill) {
  const int64_t batch = in.f.batch, k = in.f.k(), item = in.type.result_bytes;
  const DType result = item == 8 ? DType::kFloat64 : DType::kFloat32;
  int64_t weights = batch * k * k;
#ifdef MMAE_PLANT_OVERFLOW
  weights = std::max<int64_t>(weights - 1, 0);
#endif
  Output out{Buffer(batch, item, fill), Buffer(weights, item, fill),
             Buffer(batch * in.f.n * in.f.d, in.type.bytes, fill)};
  Buffer alone(batch, item, fill), grad(batch, item, fill);
  forward(in.f, alone.bytes.get(), nullptr);
  forward(in.f, out.value.bytes.get(), out.weight.bytes.get());
  const Numbers a = alone.numbers(result), b = out.value.numbers(result);
  for (int64_t i = 0; i < batch; ++i) {
    const double error = std::abs(a[size_t(i)] - b[size_t(i)]);
    const double allowed = 4 * in.type.value_tolerance * double(k + 1);
    check(error <= allowed, "value with and without weight", error, allowed);
    encode(i % 2 ? 1.5 : 0.5, result, grad.bytes.get() + i * item);
  }
  kernels.weight_bwd(in.f, in.f.samples(), grad.bytes.get(), out.weight.bytes.get(),
                     out.grad_z.bytes.get(), threads());
  return out;
}

template <class F>
auto on_threads(int64_t count, const F& call) {
  thread_count = count;
  auto first = call(0xff);  // all bits: NaN in every type
  check(first == call(0x11), "two runs are bitwise equal");
  return first;
}

void check_spectral(const Kernels& kernels, const Input& in, const char* name,
                    const Forward& forward, const Truth& truth) {
  const DType result = in.type.result_bytes == 8 ? DType::kFloat64 : DType::kFloat32;
  const std::string before = context;
  for (int64_t count : {1, 4}) {
    context = before + " " + name + " on " + std::to_string(count);
    const Output out =
        on_threads(count, [&](int fill) { return differentiate(kernels, in, forward, fill); });
    const Numbers value = out.value.numbers(result), grad = out.grad_z.numbers(in.type.dtype);
    for (int64_t b = 0; b < in.f.batch && truth; ++b) {
      const double wanted = truth(in.z, b), error = std::abs(value[size_t(b)] - wanted);
      const double allowed = in.type.value_tolerance * (double(in.f.k()) + std::abs(wanted));
      check(error <= allowed, "value", error, allowed);
      if (b > 2 && b + 1 < in.f.batch) continue;  // differences are the slow part
      check_slope(in, grad, b, b % 2 ? 1.5 : 0.5, truth);
    }
  }
  context = before;
}

struct GramOutput {
  Buffer gram, inverse_norm, mean;
  bool operator==(const GramOutput& o) const {
    return gram == o.gram && inverse_norm == o.inverse_norm && mean == o.mean;
  }
};

// Of sum_ij c_ij G_ij for a random c.
void check_gram_gradient(const Kernels& kernels, const Input& in, bool samples,
                         const GramOutput& forward) {
  const int64_t k = samples ? in.f.n : in.f.d, batch = in.f.batch, item = in.type.result_bytes;
  const DType result = item == 8 ? DType::kFloat64 : DType::kFloat32;
  const Numbers c = gaussian(batch * k * k, 11);
  Buffer cotangent(batch * k * k, item, 0);
  for (size_t i = 0; i < c.size(); ++i)
    encode(c[i], result, cotangent.bytes.get() + int64_t(i) * item);
  const Buffer out = on_threads(thread_count, [&](int fill) {
    Buffer grad_z(batch * in.f.n * in.f.d, in.type.bytes, fill);
    kernels.gram_bwd(in.f, samples, cotangent.bytes.get(), forward.gram.bytes.get(),
                     forward.inverse_norm.bytes.get(), forward.mean.bytes.get(), grad_z.bytes.get(),
                     threads());
    return grad_z;
  });
  const Numbers grad = out.numbers(in.type.dtype);
  for (int64_t b = 0; b < std::min<int64_t>(batch, 3); ++b)
    check_slope(in, grad, b, 1, [&](const Numbers& z, int64_t index) {
      const Numbers g = gram_of(in, z, index, samples);
      double sum = 0;
      for (int64_t i = 0; i < k * k; ++i) sum += c[size_t(index * k * k + i)] * g[size_t(i)];
      return sum;
    });
}

void check_gram(const Kernels& kernels, const Input& in, bool samples) {
  const int64_t k = samples ? in.f.n : in.f.d, batch = in.f.batch, item = in.type.result_bytes;
  const DType result = item == 8 ? DType::kFloat64 : DType::kFloat32;
  for (int64_t count : {1, 4}) {
    const GramOutput out = on_threads(count, [&](int fill) {
      GramOutput o{Buffer(batch * k * k, item, fill), Buffer(batch * in.f.n, item, fill),
                   Buffer(batch * in.f.d, item, fill)};
      kernels.gram(in.f, samples, o.gram.bytes.get(), o.inverse_norm.bytes.get(),
                   o.mean.bytes.get(), threads());
      return o;
    });
    check_gram_gradient(kernels, in, samples, out);
    const Numbers g = out.gram.numbers(result);
    for (int64_t b = 0; b < batch; ++b) {
      const Numbers wanted = gram_of(in, in.z, b, samples);
      double largest = 1, error = 0;
      for (int64_t i = 0; i < k * k; ++i) {
        largest = std::max(largest, std::abs(wanted[size_t(i)]));
        const double e = std::abs(g[size_t(b * k * k + i)] - wanted[size_t(i)]);
        error = e <= error ? error : e;  // keeps NaN
      }
      const double allowed = 4 * in.type.value_tolerance * largest;
      check(error <= allowed, samples ? "Gram (samples)" : "Gram (features)", error, allowed);
    }
  }
}

// The Renyi-2 entropy of the product of two views' Gram matrices, gradients for both; and for
// orders that need eigenvalues that two runs agree.
void check_joint(const Kernels& kernels, const Input& one, const Input& two) {
  const int64_t n = one.f.n, batch = one.f.batch, item = one.type.result_bytes;
  const DType result = item == 8 ? DType::kFloat64 : DType::kFloat32;
  const std::string before = context;
  for (double alpha : {2.0, 1.0, 3.0})
    for (int64_t count : {1, 4}) {
      context = before + " joint entropy, alpha " + std::to_string(alpha);
      if (!kernels.serves_entropy(one.type.dtype, alpha, n)) continue;
      const auto both = on_threads(count, [&](int fill) {
        Output a{Buffer(batch, item, fill), Buffer(batch * n * n, item, fill),
                 Buffer(batch * n * one.f.d, one.type.bytes, fill)};
        Output b{Buffer(batch, item, fill), Buffer(batch * n * n, item, fill),
                 Buffer(batch * n * two.f.d, two.type.bytes, fill)};
        kernels.joint_entropy(one.f, two.f, alpha, a.value.bytes.get(), a.weight.bytes.get(),
                              b.weight.bytes.get(), threads());
        kernels.joint_entropy(one.f, two.f, alpha, b.value.bytes.get(), nullptr, nullptr,
                              threads());
        Buffer grad(batch, item, 0);
        for (int64_t i = 0; i < batch; ++i) encode(1, result, grad.bytes.get() + i * item);
        kernels.weight_bwd(one.f, true, grad.bytes.get(), a.weight.bytes.get(),
                           a.grad_z.bytes.get(), threads());
        kernels.weight_bwd(two.f, true, grad.bytes.get(), b.weight.bytes.get(),
                           b.grad_z.bytes.get(), threads());
        return std::make_pair(std::move(a), std::move(b));
      });
      if (alpha != 2) continue;
      const auto value = [&](const Numbers& z1, const Numbers& z2, int64_t b) {
        Numbers g = gram_of(one, z1, b, true);
        const Numbers other = gram_of(two, z2, b, true);
        for (size_t i = 0; i < g.size(); ++i) g[i] *= other[i];
        return renyi2(g, n);
      };
      const Numbers with = both.first.value.numbers(result);
      const Numbers grad1 = both.first.grad_z.numbers(one.type.dtype);
      const Numbers grad2 = both.second.grad_z.numbers(two.type.dtype);
      for (int64_t b = 0; b < batch; ++b) {
        const double wanted = value(one.z, two.z, b), error = std::abs(with[size_t(b)] - wanted);
        const double allowed = one.type.value_tolerance * (double(n) + std::abs(wanted));
        check(error <= allowed, "value", error, allowed);
        if (b > 1) continue;
        check_slope(one, grad1, b, 1,
                    [&](const Numbers& z, int64_t i) { return value(z, two.z, i); });
        check_slope(two, grad2, b, 1,
                    [&](const Numbers& z, int64_t i) { return value(one.z, z, i); });
      }
    }
  context = before;
}

// sum_r f_r v_r v_rᵀ against plain loops; no property of eigenvectors is needed.
void check_spectral_matrix(const Kernels& kernels, const Type& type, int64_t batch, int64_t k) {
  if (type.bytes != type.result_bytes) return;  // vectors are never 16-bit
  context = std::string(kernels.name) + " matrix of a spectrum " + std::to_string(k);
  const Numbers v = gaussian(batch * k * k, 3), f = gaussian(batch * k, 4);
  Buffer vectors(batch * k * k, type.bytes, 0), factors(batch * k, type.bytes, 0);
  for (size_t i = 0; i < v.size(); ++i)
    encode(v[i], type.dtype, vectors.bytes.get() + int64_t(i) * type.bytes);
  for (size_t i = 0; i < f.size(); ++i)
    encode(f[i], type.dtype, factors.bytes.get() + int64_t(i) * type.bytes);
  for (int64_t count : {1, 4}) {
    const Buffer out = on_threads(count, [&](int fill) {
      Buffer o(batch * k * k, type.bytes, fill);
      kernels.spectral(type.dtype, batch, k, vectors.bytes.get(), factors.bytes.get(),
                       o.bytes.get(), threads());
      return o;
    });
    const Numbers got = out.numbers(type.dtype);
    double error = 0;
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t i = 0; i < k; ++i)
        for (int64_t j = 0; j < k; ++j) {
          double sum = 0;
          for (int64_t r = 0; r < k; ++r)
            sum += f[size_t(b * k + r)] * v[size_t((b * k + r) * k + i)] *
                   v[size_t((b * k + r) * k + j)];
          const double e = std::abs(got[size_t((b * k + i) * k + j)] - sum);
          error = e <= error ? error : e;  // keeps NaN
        }
    const double allowed = 4 * type.value_tolerance * double(k + 1);
    check(error <= allowed, "value", error, allowed);
  }
}

// Entropies of matrices with a spectrum that is known: a padded diag(sqrt(lam)).
void check_entropies(const Kernels& kernels, const Type& type, int64_t batch, int64_t n,
                     int64_t d) {
  const int64_t k = std::min(n, d);
  Numbers z(size_t(batch * n * d));
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t i = 0; i < k; ++i)
      z[size_t(b * n * d + i * d + i)] =
          0.25 + double((3 * b + 2 * i) % (2 * k + 1)) / 8;  // all different
  const Input in(type, z, batch, n, d, false, false, false, Layout::kContiguous);
  for (double alpha : {0.5, 1.0, 1.5, 2.0, 3.0, 4.0, double(INFINITY)}) {
    const auto truth = [&](const Numbers& values, int64_t b) {
      // Off the diagonal the derivative is zero, so the differences may ignore what they put there.
      double total = 0, sum = 0, largest = 0;
      for (int64_t i = 0; i < k; ++i) total += std::pow(values[size_t(b * n * d + i * d + i)], 2);
      for (int64_t i = 0; i < k; ++i) {
        const double lam = std::pow(values[size_t(b * n * d + i * d + i)], 2) / total;
        largest = std::max(largest, lam);
        sum += alpha == 1 ? -lam * std::log(lam) : std::pow(lam, alpha);
      }
      if (std::isinf(alpha)) return -std::log(largest);
      return alpha == 1 ? sum : std::log(sum) / (1 - alpha);
    };
    const auto forward = [&](const Features& f, void* value, void* weight) {
      kernels.entropy(f, alpha, value, weight, threads());
    };
    const std::string name = "entropy of a known spectrum, alpha " + std::to_string(alpha);
    check_spectral(kernels, in, name.c_str(), forward, truth);
    // Of the ready Gram matrix: rows are as they are, so that W' = 2 V.
    const auto of_ready = [&](const Features& f, void* value, void* weight) {
      const int64_t item = type.result_bytes, size = batch * k * k;
      const DType result = item == 8 ? DType::kFloat64 : DType::kFloat32;
      Buffer gram(size, item, 0xff), inverse_norm(batch * n, item, 0xff), mean(batch * d, item, 0);
      kernels.gram(f, f.samples(), gram.bytes.get(), inverse_norm.bytes.get(), mean.bytes.get(),
                   threads());
      Buffer v(size, item, 0xff);
      kernels.gram_entropy(result, batch, k, alpha, gram.bytes.get(), value,
                           weight ? v.bytes.get() : nullptr, threads());
      if (!weight) return;
      const Numbers numbers = v.numbers(result);
      for (int64_t i = 0; i < size; ++i)
        encode(2 * numbers[size_t(i)], result, static_cast<char*>(weight) + i * item);
    };
    check_spectral(kernels, in, (name + ", ready").c_str(), of_ready, truth);
  }
}

void check_shape(const Kernels& kernels, const Type& type, int64_t batch, int64_t n, int64_t d,
                 bool thorough) {
  for (int options = 0; options < 8; ++options) {
    const bool normalize = !(options & 1), center = options & 2, masked = options & 4;
    if (!thorough && options != 0 && options != 6 && options != 3) continue;
    const Input in(type, gaussian(batch * n * d, 1), batch, n, d, normalize, center, masked,
                   Layout(options % 3));
    context = std::string(kernels.name) + " " + type.name + " " + std::to_string(batch) + "x" +
              std::to_string(n) + "x" + std::to_string(d) + (normalize ? " normalize" : "") +
              (center ? " center" : "") + (masked ? " mask" : "");
    const bool samples = in.f.samples();
    const int64_t k = in.f.k();
    const Input other(type, gaussian(batch * n * (d + 3), 2), batch, n, d + 3, normalize, center,
                      masked, Layout((options + 1) % 3));
    check_joint(kernels, in, other);
    check_gram(kernels, in, true);
    check_gram(kernels, in, false);
    const auto spectral = [&](const char* name, const Forward& forward, const Truth& truth) {
      check_spectral(kernels, in, name, forward, truth);
    };
    spectral(
        "coding rate",
        [&](const Features& f, void* value, void* weight) {
          kernels.coding_rate(f, 0.5, value, weight, threads());
        },
        [&](const Numbers& z, int64_t b) { return log_det(gram_of(in, z, b, samples), k, 0.5); });
    const auto entropy = [&](double alpha) {
      return [&kernels, alpha](const Features& f, void* value, void* weight) {
        kernels.entropy(f, alpha, value, weight, threads());
      };
    };
    spectral("Renyi-2", entropy(2),
             [&](const Numbers& z, int64_t b) { return renyi2(gram_of(in, z, b, samples), k); });
    // Of a spectrum that nobody knows: two runs agree.
    if (k > 0 && kernels.serves_entropy(type.dtype, 1, k))
      spectral("von Neumann", entropy(1), nullptr);
  }
}

void run(const Kernels& kernels) {
  for (const Type& type : kTypes) {
    // More matrices than threads: groups of lanes, full and not; both sides; empty.
    for (const auto& [batch, n, d] : std::vector<std::array<int64_t, 3>>{
             {9, 5, 12}, {35, 12, 5}, {17, 8, 8}, {5, 17, 40}, {6, 33, 20}, {2, 0, 3}, {2, 3, 0}})
      check_shape(kernels, type, batch, n, d, true);
    // Fewer: the loops inside a matrix are shared, by panels and by slices of the depth.
    for (const auto& [batch, n, d] : std::vector<std::array<int64_t, 3>>{{1, 70, 90},
                                                                         {2, 90, 70},
                                                                         {3, 64, 64},
                                                                         {1, 150, 140},
                                                                         {1, 20, 260},
                                                                         {5, 130, 140},
                                                                         {2, 600, 9},
                                                                         {1, 1, 1}})
      check_shape(kernels, type, batch, n, d, false);
    for (const auto& [batch, n, d] : std::vector<std::array<int64_t, 3>>{
             {20, 6, 9}, {19, 16, 10}, {2, 64, 80}, {1, 80, 64}, {1, 130, 135}, {5, 1, 4}})
      check_entropies(kernels, type, batch, n, d);
    for (int64_t k : {1, 7, 50, 150}) check_spectral_matrix(kernels, type, 2, k);
  }
  std::printf("%s: %d checks, %d failures\n", kernels.name, checks, failures);
}

}  // namespace

int main() {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  run(mmae::kernels_baseline());
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) run(mmae::kernels_avx2());
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    run(mmae::kernels_avx512());
#endif
  // coding_rate, entropy, joint_entropy, gram_entropy, spectral, gram, gram_bwd, weight_bwd
  constexpr size_t kRun = 8;
  const size_t functions = (sizeof(Kernels) - offsetof(Kernels, coding_rate)) / sizeof(void*);
  check(functions == kRun, "every function of the table has a check here");
  return failures > 0;
}
