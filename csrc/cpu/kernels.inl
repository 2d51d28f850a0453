// The CPU kernels of one instruction set: from features to (value, weight) and from (grad, weight)
// to the gradient of the features.
//
//     G = Ẑ Ẑᵀ or Ẑᵀ Ẑ (the smaller), Ẑ the prepared rows
//     value = log det(I + cG) or H_alpha(G / tr G),      V = d value / dG   (k x k, symmetric)
//     grad Ẑ = 2 V Ẑ (samples) or 2 Ẑ V (features),       then through centring and normalisation.
//
// Only a k x k "weight" is kept for the backward pass. On the samples side everything is folded
// into it, so that the backward pass is one product with the raw features:
//     C = V with rows and columns centred (if centred),  s_i = ẑ_i · (C Ẑ)_i,
//     W' = 2 D⁻¹ (C - Diag(s)) D⁻¹,   grad Z = W' Z,      D = Diag(||z_i||).
// On the features side W' = 2 V, and the projection is a row operation after the product.
//
// Where each quantity is: gram.h, coding_rate.h, entropy.h and lanes_entropy.h, backward.h; which
// of their algorithms serves a shape: plan.h. A matrix is worked on by one thread from norms to
// weight, in a scratch that stays in its cache; when the batch has fewer matrices than threads, the
// loops inside a matrix are shared instead. Gram and factor are float32 (float64 for float64), sums
// of logs and traces float64.

#define MMAE_CONCAT2(a, b) a##b
#define MMAE_CONCAT(a, b) MMAE_CONCAT2(a, b)

namespace mmae {
namespace MMAE_ISA {

#include "simd.h"
#include "threads.h"
#include "gemm.h"
#include "plan.h"
#include "poles.h"
#include "factor.h"
#include "eigen.h"
#include "rows.h"
#include "gram.h"
#include "blocks.h"
#include "blocks_pivots.h"
#include "blocks_log.h"
#include "largest.h"
#include "blocks_entropy.h"
#include "entropy.h"
#include "backward.h"
#include "lanes.h"
#include "lanes_factor.h"
#include "lanes_eigen.h"
#include "lanes_log.h"
#include "lanes_entropy.h"
#include "coding_rate.h"

// Shares matrices among threads, and the loops inside each of those that are fewer than threads or
// are left over: at most half as many as threads, which would wait for them.
template <class F>
void over_batch(const Features& f, Threads threads, const F& body) {
  const int64_t work = f.k() * f.n * f.d, left = f.batch % threads.count;
  const bool share =
      f.batch < threads.count ? work > kShareLoops : work > kShareLeft && 2 * left <= threads.count;
  const int64_t whole = share ? f.batch - left : f.batch;
  const int64_t grain = std::max<int64_t>(1, kShareBatch / std::max<int64_t>(work, 1));
  Executor{threads.parallel}.run(
      whole, grain, [&](int64_t begin, int64_t end) { body(begin, end, Executor{nullptr}); });
  if (whole < f.batch) body(whole, f.batch, Executor{threads.parallel, threads.count});
}

// Calls body with the storage type (as a value) and the compute type.
template <class F>
void dispatch(DType dtype, const F& body) {
  switch (dtype) {
    case DType::kFloat32: return body(float{}, float{});
    case DType::kFloat64: return body(double{}, double{});
    case DType::kBFloat16: return body(BFloat16{}, float{});
    case DType::kFloat16: return body(Half{}, float{});
  }
}

void coding_rate(const Features& f, double scale, void* value, void* weight, Threads threads) {
  dispatch(f.dtype, [&](auto s, auto t) {
    using T = decltype(t);
    if (in_lanes<T>(f, f.k(), kLanesFactor, threads))
      return over_groups<T>(f, threads, [&](int64_t first, int64_t count) {
        coding_rate_lanes<decltype(s), T>(f, scale, static_cast<T*>(value), static_cast<T*>(weight),
                                          first, count);
      });
    over_batch(f, threads, [&](int64_t begin, int64_t end, Executor executor) {
      coding_rate_range<decltype(s), T>(f, scale, static_cast<T*>(value), static_cast<T*>(weight),
                                        begin, end, executor);
    });
  });
}

template <class T>
bool entropy_in_lanes(const Features& f, int64_t k, double alpha, bool want_v, Threads threads) {
  if (alpha == 2) return product_in_lanes<T>(f, k, threads);
  const bool vectors = want_v && !by_poles<T>(alpha) && !std::isinf(alpha);
  const int64_t most = !vectors ? kLanesValues : alpha < 1.5 ? kLanesSingular : kLanesVectors;
  return !by_powers(alpha, k) && in_lanes<T>(f, k, most, threads);
}

bool serves_entropy(DType dtype, double alpha, int64_t k) {
  const bool blocks =
      dtype == DType::kFloat64 ? by_blocks<double>(alpha, k) : by_blocks<float>(alpha, k);
  return alpha == 2 || k <= kMaxEigen || by_powers(alpha, k) || blocks;
}

void entropy(const Features& f, double alpha, void* value, void* weight, Threads threads) {
  dispatch(f.dtype, [&](auto s, auto t) {
    using T = decltype(t);
    if (entropy_in_lanes<T>(f, f.k(), alpha, weight, threads))
      return over_groups<T>(f, threads, [&](int64_t first, int64_t count) {
        entropy_lanes<decltype(s), T>(f, alpha, static_cast<T*>(value), static_cast<T*>(weight),
                                      first, count);
      });
    over_batch(f, threads, [&](int64_t begin, int64_t end, Executor executor) {
      entropy_range<decltype(s), T>(f, alpha, static_cast<T*>(value), static_cast<T*>(weight),
                                    begin, end, executor);
    });
  });
}

void joint_entropy(const Features& f1, const Features& f2, double alpha, void* value, void* weight1,
                   void* weight2, Threads threads) {
  dispatch(f1.dtype, [&](auto s, auto t) {
    using S = decltype(s);
    using T = decltype(t);
    T *v = static_cast<T*>(value), *w1 = static_cast<T*>(weight1), *w2 = static_cast<T*>(weight2);
    const Features& larger = f1.d >= f2.d ? f1 : f2;
    if (entropy_in_lanes<T>(larger, f1.n, alpha, weight1, threads))
      return over_groups<T>(f1, threads, [&](int64_t first, int64_t count) {
        joint_entropy_lanes<S, T>(f1, f2, alpha, v, w1, w2, first, count);
      });
    over_batch(larger, threads, [&](int64_t begin, int64_t end, Executor executor) {
      joint_entropy_range<S, T>(f1, f2, alpha, v, w1, w2, begin, end, executor);
    });
  });
}

void gram_entropy(DType dtype, int64_t batch, int64_t k, double alpha, const void* gram,
                  void* value, void* v, Threads threads) {
  Features f{};  // for its sizes
  f.batch = batch;
  f.n = f.d = k;
  const auto run = [&](auto t) {
    using T = decltype(t);
    const T* g = static_cast<const T*>(gram);
    T *h = static_cast<T*>(value), *to = static_cast<T*>(v);
    if (entropy_in_lanes<T>(f, k, alpha, v, threads))
      return over_groups<T>(f, threads, [&](int64_t first, int64_t count) {
        gram_entropy_lanes(g, batch, k, alpha, h, to, first, count);
      });
    over_batch(f, threads, [&](int64_t begin, int64_t end, Executor executor) {
      gram_entropy_range(g, k, alpha, h, to, begin, end, executor);
    });
  };
  if (dtype == DType::kFloat64)
    run(double{});
  else
    run(float{});
}

void spectral(DType dtype, int64_t batch, int64_t k, const void* vectors, const void* f, void* out,
              Threads threads) {
  const auto run = [&](auto t) {
    using T = decltype(t);
    const int64_t ld = padded<T>(k);
    for (int64_t index = 0; index < batch; ++index) {
      Memory memory;
      const T *from = static_cast<const T*>(vectors) + index * k * k, *vt = from;
      T *to = static_cast<T*>(out) + index * k * k, *v = to;
      if (ld != k) {
        T* rows = memory.take<T>(ld * ld);
        for (int64_t r = 0; r < k; ++r) {
          std::memcpy(rows + r * ld, from + r * k, size_t(k) * sizeof(T));
          std::fill(rows + r * ld + k, rows + (r + 1) * ld, T(0));
        }
        vt = rows;
        v = memory.take<T>(ld * ld);
      }
      spectral_matrix(vt, static_cast<const T*>(f) + index * k, T(1), k, ld, v,
                      Executor{threads.parallel, threads.count});
      for (int64_t r = 0; r < k && ld != k; ++r)
        std::memcpy(to + r * k, v + r * ld, size_t(k) * sizeof(T));
    }
  };
  if (dtype == DType::kFloat64)
    run(double{});
  else
    run(float{});
}

void gram(const Features& f, bool samples, void* out, void* inverse_norm, void* mean,
          Threads threads) {
  dispatch(f.dtype, [&](auto s, auto t) {
    using T = decltype(t);
    const int64_t k = samples ? f.n : f.d;
    if (product_in_lanes<T>(f, k, threads))
      return over_groups<T>(f, threads, [&](int64_t first, int64_t count) {
        gram_lanes<decltype(s), T>(f, samples, static_cast<T*>(out), static_cast<T*>(inverse_norm),
                                   static_cast<T*>(mean), first, count);
      });
    over_batch(f, threads, [&](int64_t begin, int64_t end, Executor executor) {
      for (int64_t i = begin; i < end; ++i)
        gram_one<decltype(s), T>(f, i, end, samples, static_cast<T*>(out),
                                 static_cast<T*>(inverse_norm), static_cast<T*>(mean), executor);
    });
  });
}

void weight_bwd(const Features& f, bool samples, const void* grad, const void* weight, void* grad_z,
                Threads threads) {
  dispatch(f.dtype, [&](auto s, auto t) {
    using S = decltype(s);
    using T = decltype(t);
    const int64_t k = samples ? f.n : f.d;
    over_batch(f, threads, [&](int64_t begin, int64_t end, Executor executor) {
      for (int64_t i = begin; i < end; ++i) {
        const T g = static_cast<const T*>(grad)[i];
        const T* w = static_cast<const T*>(weight) + i * k * k;
        S* out = static_cast<S*>(grad_z) + i * f.n * f.d;
        if (samples)
          weight_bwd_samples<S, T>(f, i, end, g, w, out, executor);
        else
          weight_bwd_features<S, T>(f, i, g, w, out, executor);
      }
    });
  });
}

void gram_bwd(const Features& f, bool samples, const void* grad, const void* gram,
              const void* inverse_norm, const void* mean, void* grad_z, Threads threads) {
  dispatch(f.dtype, [&](auto s, auto t) {
    using S = decltype(s);
    using T = decltype(t);
    over_batch(f, threads, [&](int64_t begin, int64_t end, Executor executor) {
      for (int64_t i = begin; i < end; ++i)
        gram_bwd_one<S, T>(f, i, end, samples, static_cast<const T*>(grad),
                           static_cast<const T*>(gram), static_cast<const T*>(inverse_norm),
                           static_cast<const T*>(mean), static_cast<S*>(grad_z), executor);
    });
  });
}

}  // namespace MMAE_ISA

const Kernels& MMAE_CONCAT(kernels_, MMAE_ISA)() {
  static const Kernels table{MMAE_ISA_NAME,          MMAE_ISA::kMaxEigen, MMAE_ISA::serves_entropy,
                             MMAE_ISA::coding_rate,  MMAE_ISA::entropy,   MMAE_ISA::joint_entropy,
                             MMAE_ISA::gram_entropy, MMAE_ISA::spectral,  MMAE_ISA::gram,
                             MMAE_ISA::gram_bwd,     MMAE_ISA::weight_bwd};
  return table;
}

}  // namespace mmae
