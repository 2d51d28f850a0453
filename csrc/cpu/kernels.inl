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
// A matrix is worked on by one thread from norms to weight, in a scratch that stays in its cache;
// when the batch has fewer matrices than threads, the loops inside a matrix are shared instead.
// Gram and factor are float32 (float64 for float64), sums of logs and traces float64.

#define MMAE_CONCAT2(a, b) a##b
#define MMAE_CONCAT(a, b) MMAE_CONCAT2(a, b)

namespace mmae {
namespace MMAE_ISA {

#include "simd.h"
#include "threads.h"
#include "gemm.h"
#include "factor.h"
#include "eigen.h"
#include "rows.h"

// Rows of a packed block, so that all its panels fit a second-level cache, and rows of it that one
// pass of tiles uses, so that a panel fits a first-level cache.
constexpr int64_t kPackDepth = 512, kTileDepth = 128;
// Above this, LAPACK's divide and conquer (with its own threads) is the better eigensolver.
constexpr int64_t kMaxEigen = 256;

// Leading dimension and row count of a k x k work matrix: whole register tiles in both directions.
template <class T>
int64_t padded(int64_t k) {
  return round_up(std::max<int64_t>(k, 1), std::max<int64_t>(kLanes<T>, MR));
}

// G (+ zero padding) of the prepared rows: upper triangle of k x k, leading dimension padded(k).
// With `squares` (samples side, n to whole vectors), of the raw rows, whose sums of squares go there.
template <class S, class T>
void gram_upper(const Rows<S, T>& rows, bool samples, const T* scale, const T* mean, T* squares,
                T* g, Prefetch& ahead, const Executor& executor) {
  Memory memory;
  const int64_t k = samples ? rows.n : rows.d, depth_total = samples ? rows.d : rows.n;
  const int64_t ldg = padded<T>(k), panels = ceil_div(k, NR<T>);
  const int64_t block = std::min(depth_total, kPackDepth);
  T* packed = memory.take<T>(panels * NR<T> * std::max<int64_t>(block, 1));
  const int64_t written = depth_total == 0 ? 0 : round_up(k, MR);
  std::memset(g + written * ldg, 0, size_t((ldg - written) * ldg) * sizeof(T));
  for (int64_t at = 0; at < depth_total; at += block) {
    const int64_t depth = std::min(block, depth_total - at);
    executor.run(panels, 1, [&](int64_t begin, int64_t end) {
      Memory inner;
      T* buffer =
          inner.take<T>(samples ? kLanes<T> * round_up(depth, kLanes<T>) : (end - begin) * NR<T>);
      if (samples) {
        for (int64_t p = begin; p < end; ++p)
          pack_samples(rows, scale, mean, squares, p * NR<T>, at, at + depth,
                       packed + p * NR<T> * depth, buffer);
      } else {
        pack_features(rows, scale, mean, true, at, at + depth, begin, end, packed, buffer);
      }
    });
    const auto between = [&]() {
      if (!executor.parallel) ahead.some();
    };
    const auto columns = [&](int64_t p) {
      for (int64_t sub = 0; sub < depth; sub += kTileDepth) {
        const T* from = packed + sub * NR<T>;
        const int64_t count = std::min(kTileDepth, depth - sub);
        if (at + sub == 0)
          gram_panel<T, Write::kSet>(from, depth, count, k, p * NR<T>, g, ldg, between);
        else
          gram_panel<T, Write::kAdd>(from, depth, count, k, p * NR<T>, g, ldg, between);
      }
    };
    // Columns of the triangle lengthen: each thread takes panels from both ends.
    executor.run(ceil_div(panels, 2), 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        columns(p);
        if (panels - 1 - p != p) columns(panels - 1 - p);
      }
    });
  }
}

template <class T>
double trace_of(const T* g, int64_t k, int64_t ldg) {
  double sum = 0;
  for (int64_t i = 0; i < k; ++i) sum += g[i * ldg + i];
  return sum;
}

// Everything of one matrix up to the Gram matrix.
template <class S, class T>
struct Gram {
  Rows<S, T> rows;
  bool samples;
  int64_t k, ldg, kept = 0;
  T *scale, *mean, *g, common_scale = 1;

  Gram(const Features& f, int64_t index, int64_t end, bool samples_side, bool scale_free,
       const Executor& executor, Memory& memory)
      : rows(f, index), samples(samples_side), k(samples_side ? f.n : f.d), ldg(padded<T>(k)) {
    scale = memory.take<T>(f.n + 2 * kLanes<T>);
    mean = memory.take<T>(round_up(f.d, NR<T>) + kLanes<T>);
    g = memory.take<T>(ldg * ldg);
    // Tiles of the product, about: half of (k / MR)(k / NR), for every block of the depth.
    const int64_t tiles = ceil_div(k, MR) * ceil_div(k + NR<T>, NR<T>) / 2;
    Prefetch ahead(f, sizeof(S), index, end, tiles * ceil_div(f.d, kTileDepth));
    if (samples && f.normalize && !f.center && normalized_after(ahead, executor)) return;
    common_scale = scale_free && !f.normalize ? power_of_two_scale(rows) : T(1);
    kept = prepare(rows, common_scale, scale, mean, executor);
    Prefetch none;
    gram_upper<S, T>(rows, samples, scale, mean, nullptr, g, none, executor);
    set_unit_diagonal(f);
  }

  // The common case reads z once: the product of the raw rows, scaled by 1 / (‖z_i‖ ‖z_j‖) after.
  // Returns false if a square might not be in range.
  bool normalized_after(Prefetch& ahead, const Executor& executor) {
    constexpr int VL = kLanes<T>;
    Memory memory;
    T* squares = memory.take<T>(round_up(k, VL));
    std::memset(mean, 0, size_t(round_up(rows.d, NR<T>)) * sizeof(T));
    gram_upper<S, T>(rows, true, nullptr, nullptr, squares, g, ahead, executor);
    for (int64_t i = 0; i < k; ++i) {
      scale[i] = 0;
      if (!rows.kept(i)) continue;
      ++kept;
      const double sum = rows.d ? squares[i] : 0;
      if (sum > kSquareLow<T> && sum < kSquareHigh<T>) {
        scale[i] = T(1 / std::sqrt(sum));
      } else if (sum != 0 || !rows.zero(i)) {
        kept = 0;
        return false;
      }
    }
    for (int64_t i = k; i < round_up(k, VL); ++i) scale[i] = 0;
    for (int64_t i = 0; i < k; ++i) {
      T* row = g + i * ldg;
      const Vec<T> left = splat(scale[i]);
      for (int64_t j = i / VL * VL; j < k; j += VL)
        store(row + j, load(row + j) * (left * load(scale + j)));
      if (scale[i] > 0) row[i] = 1;
    }
    return true;
  }

  // The diagonal of normalised rows is 1 by definition: say so, instead of 1 ± rounding.
  void set_unit_diagonal(const Features& f) {
    if (samples && f.normalize && !f.center)
      for (int64_t i = 0; i < k; ++i)
        if (scale[i] > 0) g[i * ldg + i] = 1;
  }

  // V = factor · v on entry (full, leading dimension ldg; changed), W' on return to weight (k x k,
  // contiguous). g must hold the full Gram matrix if rows are normalised on the samples side; columns
  // of v and g past k, to whole vectors, are zero in one of them and finite in the other.
  template <class Out>
  void fold(T* v, T factor, Out* weight, const Executor& executor) const {
    Memory memory;
    const bool project = samples && rows.normalize;
    T* along_mean = nullptr;  // ẑ_i (centred) · mean: the part of ẑ_i that G does not see
    if (samples && rows.center) {
      center_both_sides(v);
      along_mean = memory.take<T>(ldg);
      T* buffer = memory.take<T>(rows.d);
      const double mean2 = dot(mean, mean, rows.d);
      std::memset(along_mean, 0, size_t(ldg) * sizeof(T));
      for (int64_t i = 0; i < k; ++i)
        if (rows.kept(i))
          along_mean[i] =
              T(scale[i] * dot(rows.fetch(i, 0, rows.d, buffer), mean, rows.d) - mean2);
    }
    executor.run(k, 32, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const T* vi = v + i * ldg;
        T projection = 0;
        if (project) {
          double sum = dot(vi, g + i * ldg, round_up(k, kLanes<T>));
          if (along_mean) sum += dot(vi, along_mean, round_up(k, kLanes<T>));
          projection = T(sum);
        }
        Out* w = weight + i * k;
        const T left = 2 * factor * (samples ? scale[i] : common_scale * common_scale);
        if (samples)
          for (int64_t j = 0; j < k; ++j) w[j] = Out(left * (scale[j] * vi[j]));
        else
          for (int64_t j = 0; j < k; ++j) w[j] = Out(left * vi[j]);
        if (project) w[i] = Out(left * (scale[i] * (vi[i] - projection)));
      }
    });
  }

 private:
  // V <- P V P with P the projection that subtracts the mean over the kept rows.
  void center_both_sides(T* v) const {
    Memory memory;
    T* row_mean = memory.take<T>(k);
    double total = 0;
    for (int64_t i = 0; i < k; ++i) {
      double sum = 0;
      for (int64_t j = 0; j < k; ++j)
        if (rows.kept(j)) sum += v[i * ldg + j];
      row_mean[i] = kept ? T(sum / kept) : T(0);
      if (rows.kept(i)) total += row_mean[i];
    }
    const T grand = kept ? T(total / kept) : T(0);
    for (int64_t i = 0; i < k; ++i)
      for (int64_t j = 0; j < k; ++j)
        v[i * ldg + j] = rows.kept(i) && rows.kept(j)
                             ? v[i * ldg + j] - row_mean[i] - row_mean[j] + grand
                             : T(0);
  }
};

template <class T>
void fill_nan(T* p, int64_t n) {
  std::fill(p, p + n, std::numeric_limits<T>::quiet_NaN());
}

// a = factor · g: the upper triangle; zero in all rows and columns past k. (Where a vector is
// shorter than a register tile, g has columns past k that nobody wrote.)
template <class T>
void scaled(const T* g, T factor, int64_t k, int64_t ldg, T* a, const Executor& executor) {
  constexpr int VL = kLanes<T>;
  const int64_t width = round_up(k, VL);
  executor.run(k, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t j = i / VL * VL; j < width; j += VL)
        store(a + i * ldg + j, load(g + i * ldg + j) * splat(factor));
      for (int64_t j = width; j < ldg; ++j) a[i * ldg + j] = 0;
    }
  });
  std::memset(a + k * ldg, 0, size_t((ldg - k) * ldg) * sizeof(T));
}

// Returns false where I + cG is not positive definite in T, or z is not finite.
template <class S, class T, class Out>
bool coding_rate_one(const Features& f, int64_t index, int64_t end, double c, Out* value,
                     Out* weight, const Executor& executor) {
  Memory memory;
  Gram<S, T> gram(f, index, end, f.samples(), false, executor, memory);
  const int64_t k = gram.k, ld = gram.ldg;
  if (!std::isfinite(trace_of(gram.g, k, ld))) return false;
  T* a = memory.take<T>(ld * ld);
  scaled(gram.g, T(c), k, ld, a, executor);
  T largest = 0;
  for (int64_t i = 0; i < k; ++i) largest = std::max(largest, a[i * ld + i]);
  const bool offset = largest <= 1;
  const double log_det = sweep(a, k, ld, weight != nullptr, offset, executor);
  if (!std::isfinite(log_det)) return false;
  *value = Out(log_det);
  if (!weight) return true;
  if (f.normalize && f.samples()) mirror<T, true>(gram.g, k, ld, executor);
  mirror<T, false>(a, k, ld, executor);
  // V = c (I + cG)⁻¹ = -c a. With `offset` its cI is missing, which only changes the norm of
  // normalised, uncentred rows: there it stays out, before it can drown the rest.
  if (offset && (!f.normalize || f.center))
    for (int64_t i = 0; i < k; ++i) a[i * ld + i] -= 1;
  gram.fold(a, T(-c), weight, executor);
  return true;
}

template <class S, class T>
void coding_rate_range(const Features& f, double c, T* value, T* weight, int64_t begin, int64_t end,
                       const Executor& executor) {
  for (int64_t i = begin; i < end; ++i) {
    T* w = weight ? weight + i * f.k() * f.k() : nullptr;
    if (coding_rate_one<S, T>(f, i, end, c, value + i, w, executor)) continue;
    // Rounding of a float32 Gram matrix swamps I when c · lambda_max comes near 1e7; float64 has
    // the digits to spare.
    if constexpr (sizeof(T) == 4)
      if (coding_rate_one<S, double>(f, i, end, c, value + i, w, executor)) continue;
    fill_nan(value + i, 1);
    if (w) fill_nan(w, f.k() * f.k());
  }
}

// V of H_2 = 2 log tr G - log ||G||²: 2/tau I - 2 G / ||G||².
template <class T>
double renyi2(const T* g, int64_t k, int64_t ldg, double tau, T* v) {
  constexpr int VL = kLanes<T>;
  double square = 0;
  for (int64_t i = 0; i < k; ++i) {
    const T* row = g + i * ldg;
    const int64_t first = i / VL * VL;
    const Vec<T> x = lanes_above<T>(load(row + first), Vec<T>{}, int(i - first));
    Vec<T> sum = x * x;
    for (int64_t j = first + VL; j < k; j += VL) sum += load(row + j) * load(row + j);
    square += 2 * double(reduce_add<T>(sum)) + double(row[i]) * row[i];
  }
  if (v) {
    const Vec<T> factor = splat(T(-2 / square));
    for (int64_t i = 0; i < k; ++i) {
      for (int64_t j = 0; j < ldg; j += VL)
        store(v + i * ldg + j, factor * load(g + i * ldg + j));
      v[i * ldg + i] += T(2 / tau);
    }
  }
  return 2 * std::log(tau) - std::log(square);
}

// H_alpha from the eigenvalues lam of rho, and f with V = 1/tau sum_r f_r v_r v_rᵀ.
template <class T>
double entropy_of_spectrum(const double* lam, int64_t k, double alpha, T* f) {
  const double largest = *std::max_element(lam, lam + k);
  // Eigenvalues below the rounding of T are noise around zero: values treat them as they are,
  // f, which is singular at zero, treats them as this.
  const double floor = 0.1 * largest * double(std::numeric_limits<T>::epsilon());
  double sum = 0;
  if (alpha == 1) {
    for (int64_t r = 0; r < k; ++r)
      if (lam[r] > 0) sum -= lam[r] * std::log(lam[r]);
    if (f)
      for (int64_t r = 0; r < k; ++r) f[r] = T(-(std::log(std::max(lam[r], floor)) + sum));
    return sum;
  }
  if (std::isinf(alpha)) {
    if (f)
      for (int64_t r = 0; r < k; ++r)
        f[r] = T(lam + r == std::max_element(lam, lam + k) ? 1 - 1 / largest : 1);
    return -std::log(largest);
  }
  for (int64_t r = 0; r < k; ++r)
    if (lam[r] > 0) sum += std::pow(lam[r], alpha);
  if (f)
    for (int64_t r = 0; r < k; ++r)
      f[r] = T(alpha / (1 - alpha) * (std::pow(std::max(lam[r], floor), alpha - 1) / sum - 1));
  return std::log(sum) / (1 - alpha);
}

// v = factor · sum_r f_r v_r v_rᵀ with v_r the rows of vt; full, symmetric.
template <class T>
void spectral_matrix(const T* vt, const T* f, T factor, int64_t k, int64_t ld, T* v) {
  Memory memory;
  T* left = memory.take<T>(k * ld);
  for (int64_t r = 0; r < k; ++r)
    for (int64_t j = 0; j < ld; ++j) left[r * ld + j] = factor * f[r] * vt[r * ld + j];
  for (int64_t i = 0; i < round_up(k, MR); i += MR)
    for (int64_t j = i / kLanes<T> * kLanes<T>; j < ld; j += NR<T>)
      tile_of_width<T, true, Write::kSet>(int(std::min<int64_t>(NV, (ld - j) / kLanes<T>)), k,
                                          left + i, ld, vt + j, ld, v + i * ld + j, ld);
  mirror<T, true>(v, k, ld, Executor{nullptr});
}

// One matrix of entropy_range between its Gram matrix and its value.
template <class S, class T>
struct EntropyTask {
  Gram<S, T> gram;
  double tau, h = std::numeric_limits<double>::quiet_NaN();
  T *v = nullptr, *vt = nullptr;

  EntropyTask(const Features& f, int64_t index, int64_t end, const Executor& executor,
              Memory& memory)
      : gram(f, index, end, f.samples(), true, executor, memory),
        tau(trace_of(gram.g, gram.k, gram.ldg)) {}

  // The tridiagonal form of rho, and the rows of Qᵀ if V is wanted.
  QlState<T> reduce(bool want_vectors, Memory& memory) {
    const int64_t k = gram.k, ld = gram.ldg;
    double* lam = memory.take<double>(4 * k + 1);
    T* factor = memory.take<T>(k);
    T* work = memory.take<T>(3 * ld);
    const T inverse = T(1 / tau);
    std::memset(v, 0, size_t(ld * ld) * sizeof(T));
    for (int64_t i = 0; i < k; ++i)
      for (int64_t j = 0; j < k; ++j) v[i * ld + j] = inverse * gram.g[i * ld + j];
    tridiagonalize(v, k, ld, lam, lam + k, factor, work);
    if (want_vectors) {
      vt = memory.take<T>(ld * ld);
      form_q(v, k, ld, factor, vt, work);
      for (int64_t i = 0; i < k; ++i)
        for (int64_t j = 0; j < i; ++j) std::swap(vt[i * ld + j], vt[j * ld + i]);
    }
    return QlState<T>(lam, k, vt, ld);
  }
};

template <class S, class T>
void entropy_range(const Features& f, double alpha, T* value, T* weight, int64_t begin, int64_t end,
                   const Executor& executor) {
  const int64_t k = f.k(), group = alpha == 2 ? 1 : kQlGroup;
  std::vector<EntropyTask<S, T>> tasks;
  std::vector<QlState<T>> states;
  tasks.reserve(size_t(group));
  states.reserve(size_t(group));
  for (int64_t first = begin; first < end; first += group) {
    Memory memory;
    const int64_t last = std::min(first + group, end);
    tasks.clear();
    states.clear();
    for (int64_t index = first; index < last; ++index) {
      tasks.emplace_back(f, index, end, executor, memory);
      EntropyTask<S, T>& task = tasks.back();
      const int64_t ld = task.gram.ldg;
      // tau = 0: no rows, or only zero rows. tau not finite: h stays NaN.
      if (task.tau == 0 || !std::isfinite(task.tau)) continue;
      if (weight || alpha != 2) {
        mirror<T, true>(task.gram.g, k, ld, executor);
        task.v = memory.take<T>(ld * ld);
      }
      if (alpha == 2)
        task.h = renyi2(task.gram.g, k, ld, task.tau, weight ? task.v : nullptr);
      else
        states.push_back(task.reduce(weight != nullptr, memory));
    }
    ql(states.data(), int(states.size()));
    size_t at = 0;
    for (int64_t index = first; index < last; ++index) {
      EntropyTask<S, T>& task = tasks[size_t(index - first)];
      T* w = weight ? weight + index * k * k : nullptr;
      if (task.tau == 0) {  // entropy 0 by convention
        value[index] = 0;
        if (w) std::memset(w, 0, size_t(k * k) * sizeof(T));
        continue;
      }
      if (alpha != 2 && std::isfinite(task.tau)) {
        const QlState<T>& q = states[at++];
        if (!q.failed) {
          T* spectral = w ? memory.take<T>(k) : nullptr;
          task.h = entropy_of_spectrum<T>(q.d, k, alpha, spectral);
          if (w) spectral_matrix(q.vt, spectral, T(1 / task.tau), k, task.gram.ldg, task.v);
        }
      }
      value[index] = T(task.h);
      if (w && std::isfinite(task.h)) task.gram.fold(task.v, T(1), w, executor);
      if (w && !std::isfinite(task.h)) fill_nan(w, k * k);
    }
  }
}

// grad_z of one matrix on the samples side: grad · W' z, raw z. W' is symmetric.
template <class S, class T>
void weight_bwd_samples(const Features& f, int64_t index, int64_t last, T grad, const T* weight,
                        S* out, const Executor& executor) {
  constexpr int64_t kDepth = 256;  // rows of z in a panel that stays in a first-level cache
  Memory memory;
  const Rows<S, T> rows(f, index);
  const int64_t n = f.n, d = f.d, tiles = ceil_div(n, MR);
  // Tile t of W' as n rows of MR: column k of its rows is row k of these columns.
  T* w = memory.take<T>(tiles * MR * n);
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t width = std::min<int64_t>(MR, n - t * MR);
    T* to = w + t * MR * n;
    if (width < MR) std::memset(to, 0, size_t(MR * n) * sizeof(T));
    for (int64_t k = 0; k < n; ++k) {
      T row[MR];
      const T* from = weight + k * n + t * MR;
      if (width == MR) {
        std::memcpy(row, from, sizeof row);
        for (int i = 0; i < MR; ++i) row[i] *= grad;
        std::memcpy(to + k * MR, row, sizeof row);
      } else {
        for (int i = 0; i < width; ++i) to[k * MR + i] = grad * from[i];
      }
    }
  }
  Prefetch ahead(f, sizeof(S), index, last, tiles * ceil_div(d, NR<T>) * ceil_div(n, kDepth));
  const bool whole = std::is_same_v<S, T> && n <= kDepth && d % kLanes<T> == 0 &&
                     reinterpret_cast<uintptr_t>(out) % kVectorBytes == 0;
  executor.run(ceil_div(d, NR<T>), 1, [&](int64_t begin, int64_t end) {
    Memory inner;
    T* panel = inner.take<T>(std::min(n, kDepth) * NR<T>);
    T* buffer = inner.take<T>(NR<T>);
    T* sum = inner.take<T>(tiles * MR * NR<T>);
    for (int64_t p = begin; p < end; ++p) {
      const int64_t c0 = p * NR<T>, width = std::min(NR<T> + int64_t(0), d - c0);
      const int vectors = int(ceil_div(width, kLanes<T>));
      for (int64_t at = 0; at < n; at += kDepth) {
        const int64_t depth = std::min(kDepth, n - at);
        // pack_features addresses panel p of a whole set: step back to where panel 0 would be.
        pack_features<S, T>(rows, nullptr, nullptr, false, at, at + depth, p, p + 1,
                            panel - p * NR<T> * depth, buffer);
        for (int64_t t = 0; t < tiles; ++t) {
          if (!executor.parallel) ahead.some();
          const T* a = w + t * MR * n + at * MR;
          if constexpr (std::is_same_v<S, T>)
            if (whole && (t + 1) * MR <= n) {
              tile_of_width<T, true, Write::kStream>(vectors, n, a, MR, panel, NR<T>,
                                                     out + t * MR * d + c0, d);
              continue;
            }
          T* to = sum + t * MR * NR<T>;
          if (at == 0)
            tile_of_width<T, true, Write::kSet>(vectors, depth, a, MR, panel, NR<T>, to, NR<T>);
          else
            tile_of_width<T, true, Write::kAdd>(vectors, depth, a, MR, panel, NR<T>, to, NR<T>);
        }
      }
      for (int64_t i = whole ? n / MR * MR : 0; i < n; ++i)
        for (int64_t j = 0; j < width; ++j)
          out[i * d + c0 + j] = to_storage<S>(sum[i * NR<T> + j]);
    }
  });
}

// grad_z on the features side: y_i = ẑ_i W', then grad · (y_i - (ẑ_i · y_i) ẑ_i) / ||z_i||.
template <class S, class T>
void weight_bwd_features(const Features& f, int64_t index, T grad, const T* weight, S* out,
                         const Executor& executor) {
  constexpr int64_t kRowBlock = 6 * MR;  // so that a panel of W' is used six times per load
  Memory memory;
  const Rows<S, T> rows(f, index);
  const int64_t n = f.n, d = f.d, panels = ceil_div(d, NR<T>), ld = panels * NR<T>;
  T* scale = memory.take<T>(n);
  T* mean = memory.take<T>(ld);
  prepare(rows, T(1), scale, mean, executor);
  T* packed = memory.take<T>(ld * d);
  executor.run(panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p)
      for (int64_t r = 0; r < d; ++r) {
        T* to = packed + p * NR<T> * d + r * NR<T>;
        const int64_t width = std::min<int64_t>(NR<T>, d - p * NR<T>);
        const T* from = weight + r * d + p * NR<T>;
        for (int64_t j = 0; j < width; ++j) to[j] = grad * from[j];
        for (int64_t j = width; j < NR<T>; ++j) to[j] = 0;
      }
  });
  executor.run(ceil_div(n, kRowBlock), 1, [&](int64_t begin, int64_t end) {
    Memory inner;
    T* x = inner.take<T>(kRowBlock * ld);
    T* y = inner.take<T>(kRowBlock * ld);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t r0 = b * kRowBlock, count = std::min(kRowBlock, n - r0);
      std::memset(x, 0, size_t(kRowBlock * ld) * sizeof(T));
      for (int64_t r = 0; r < count; ++r) {
        if (!rows.kept(r0 + r)) continue;
        T* xr = x + r * ld;
        const T* source = rows.fetch(r0 + r, 0, d, xr);
        const T s = scale[r0 + r];
        for (int64_t j = 0; j < d; ++j) xr[j] = s * source[j] - mean[j];
      }
      for (int64_t p = 0; p < panels; ++p)
        for (int64_t at = 0; at < d; at += kTileDepth)
          for (int64_t r = 0; r < round_up(count, MR); r += MR) {
            const T* w = packed + p * NR<T> * d + at * NR<T>;
            T *from = x + r * ld + at, *to = y + r * ld + p * NR<T>;
            const int64_t depth = std::min(kTileDepth, d - at);
            if (at == 0)
              tile<T, NV, false, Write::kSet>(depth, from, ld, w, NR<T>, to, ld);
            else
              tile<T, NV, false, Write::kAdd>(depth, from, ld, w, NR<T>, to, ld);
          }
      for (int64_t r = 0; r < count; ++r) {
        S* o = out + (r0 + r) * d;
        if (!rows.kept(r0 + r)) {
          for (int64_t j = 0; j < d; ++j) o[j] = to_storage<S>(T(0));
          continue;
        }
        T *xr = x + r * ld, *yr = y + r * ld;
        const T s = scale[r0 + r];
        T along = 0;
        if (rows.normalize) {
          if (rows.center)
            for (int64_t j = 0; j < d; ++j) xr[j] += mean[j];
          along = T(dot(xr, yr, d));
        }
        for (int64_t j = 0; j < d; ++j) o[j] = to_storage<S>(s * (yr[j] - along * xr[j]));
      }
    }
  });
}

// Shares matrices among threads or, when there are fewer of them, the loops inside each.
template <class F>
void over_batch(const Features& f, Threads threads, const F& body) {
  const int64_t work = f.k() * f.n * f.d;
  if (f.batch < threads.count && work > 200000) return body(0, f.batch, Executor{threads.parallel});
  const int64_t grain = std::max<int64_t>(1, 20000 / std::max<int64_t>(work, 1));
  Executor{threads.parallel}.run(f.batch, grain, [&](int64_t begin, int64_t end) {
    body(begin, end, Executor{nullptr});
  });
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
    over_batch(f, threads, [&](int64_t begin, int64_t end, Executor executor) {
      coding_rate_range<decltype(s), T>(f, scale, static_cast<T*>(value), static_cast<T*>(weight),
                                        begin, end, executor);
    });
  });
}

void entropy(const Features& f, double alpha, void* value, void* weight, Threads threads) {
  dispatch(f.dtype, [&](auto s, auto t) {
    using T = decltype(t);
    over_batch(f, threads, [&](int64_t begin, int64_t end, Executor executor) {
      entropy_range<decltype(s), T>(f, alpha, static_cast<T*>(value), static_cast<T*>(weight),
                                    begin, end, executor);
    });
  });
}

void gram(const Features& f, bool samples, void* out, void* inverse_norm, void* mean,
          Threads threads) {
  dispatch(f.dtype, [&](auto s, auto t) {
    using T = decltype(t);
    const int64_t k = samples ? f.n : f.d;
    over_batch(f, threads, [&](int64_t begin, int64_t end, Executor executor) {
      for (int64_t i = begin; i < end; ++i) {
        Memory memory;
        const Gram<decltype(s), T> one(f, i, end, samples, false, executor, memory);
        mirror<T, true>(one.g, k, one.ldg, executor);
        T* to = static_cast<T*>(out) + i * k * k;
        for (int64_t r = 0; r < k; ++r)
          std::memcpy(to + r * k, one.g + r * one.ldg, size_t(k) * sizeof(T));
        std::memcpy(static_cast<T*>(inverse_norm) + i * f.n, one.scale, size_t(f.n) * sizeof(T));
        std::memcpy(static_cast<T*>(mean) + i * f.d, one.mean, size_t(f.d) * sizeof(T));
      }
    });
  });
}

void weight_bwd(const Features& f, const void* grad, const void* weight, void* grad_z,
                Threads threads) {
  dispatch(f.dtype, [&](auto s, auto t) {
    using S = decltype(s);
    using T = decltype(t);
    over_batch(f, threads, [&](int64_t begin, int64_t end, Executor executor) {
      for (int64_t i = begin; i < end; ++i) {
        const T g = static_cast<const T*>(grad)[i];
        const T* w = static_cast<const T*>(weight) + i * f.k() * f.k();
        S* out = static_cast<S*>(grad_z) + i * f.n * f.d;
        if (f.samples())
          weight_bwd_samples<S, T>(f, i, end, g, w, out, executor);
        else
          weight_bwd_features<S, T>(f, i, g, w, out, executor);
      }
    });
  });
}

}  // namespace MMAE_ISA

const Kernels& MMAE_CONCAT(kernels_, MMAE_ISA)() {
  static const Kernels table{MMAE_ISA_NAME,     MMAE_ISA::kMaxEigen, MMAE_ISA::coding_rate,
                             MMAE_ISA::entropy, MMAE_ISA::gram,      MMAE_ISA::weight_bwd};
  return table;
}

}  // namespace mmae
