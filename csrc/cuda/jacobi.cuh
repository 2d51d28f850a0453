// Ready Gram matrices to (H_alpha, W') for any alpha, one block per matrix: eigenvalues and
// eigenvectors of rho = G / tr G without leaving shared memory.
//
// 1. Cholesky factorisation with diagonal pivoting, rho = L Lᵀ, in place: row p of the array
// becomes
//    the column of L whose pivot is p, rows that are never pivots become zero. It stops at pivots
//    that rounding alone explains; what is left of rho is zero within its rounding.
// 2. One-sided Jacobi: plane rotations of pairs of columns of L, until all are orthogonal. They are
//    then sqrt(lambda_r) v_r: eigenvalues are their squared lengths, eigenvectors their directions,
//    and no second matrix is kept. Rotations are relative to the lengths, so that small eigenvalues
//    keep their digits, and the factor needs 6 to 8 sweeps where rho itself needs 13 to 20. Pairs
//    go by the round-robin schedule: k - 1 rounds of k / 2 disjoint pairs, a barrier after each; a
//    pair is held in the registers of `lanes` neighbouring threads, with one reduction over them.
//    t = tan of the angle, |t| <= 1; x -= s (y + q x), y += s (x - q y) with q = s / (1 + c)
//    (Rutishauser): a small angle makes a small change, and lengths do not drift.
// 3. f from the eigenvalues (csrc/cpu/entropy.h), V = 1/tau Σ f_r v_r v_rᵀ as a product of the
//    array with itself, written as W' (fold.cuh): row means and projections follow from the
//    columns, so V never exists. Null directions take f at the floor: f_0 (I - Σ v_r v_rᵀ).
//
// Multiply-adds: k³/2 + 3 k³ per sweep + k³; shared memory k² numbers, of which the rotations read
// and write 2 k² each per round: they are what bounds it.
#pragma once
#include "fold.cuh"

namespace mmae {
namespace cuda {

struct Min {
  MMAE_DEVICE double operator()(double a, double b) const { return b < a ? b : a; }
};

// Pivots below this many eps of the first are noise of the Gram matrix, whose entries are sums of
// products. Where alpha < 1 the smallest eigenvalues count most, and only the surest noise is cut.
MMAE_DEVICE double jacobi_noise(double alpha, int k) {
  return (alpha < 1 ? 0.04 : 0.125) * sqrt(double(k));
}

template <class T>
struct JacobiBlock {
  static constexpr int E = JacobiPlan::kEntries;
  const int k, ld, lanes, t, lane, warp, warps;
  const Shared<T> w, norms, diagonal, coefficient, spectral;
  const Shared<double> lam, partial;
  const Shared<int> order;

  MMAE_DEVICE explicit JacobiBlock(const JacobiPlan& p)
      : k(p.k), ld(p.ld), lanes(p.lanes), t(int(threadIdx.x)), lane(t % kWarp), warp(t / kWarp),
        warps(int(blockDim.x) / kWarp), w(shared_array<T>(p.w, p.k * p.ld)),
        norms(shared_array<T>(p.norms, 2 * p.k)), diagonal(shared_array<T>(p.norms, 2 * p.k)),
        coefficient(shared_array<T>(p.coefficient, p.k)),
        spectral(shared_array<T>(p.spectral, p.k)), lam(shared_array<double>(p.lam, p.k)),
        partial(shared_array<double>(p.partial, p.threads / kWarp)),
        order(shared_array<int>(p.order, p.k)) {}

  // rho into w; false where G has NaN or Inf.
  MMAE_DEVICE bool load(const T* g, double tau) {
    const double inverse = 1 / tau;
    double poison = 0;
    for (int i = warp; i < k; i += warps)
      for (int j = lane; j < k; j += kWarp) {
        const T x = T(g[int64_t(i) * k + j] * inverse);
        w[i * ld + j] = x;
        if (i == j) diagonal[i] = x > T(0) ? x : T(0);
        poison += x - x;
      }
    for (int i = t; i < k; i += int(blockDim.x)) order[i] = k;
    return block_reduce(poison, Sum{}, partial) == 0;  // its barriers complete w and diagonal
  }

  // The row with the largest diagonal entry of those left, or -1; the same in every thread. Used
  // rows have diagonal -1. Ties go to the first row; entries count with 16 significant bits.
  MMAE_DEVICE int largest_left(int current) const {
    unsigned key = 0;
    for (int i = lane; i < k; i += kWarp) {
      const float x = float(T(diagonal[current + i]));
      if (x > 0) {
        const unsigned own = (float_bits(x) & ~0xffu) | unsigned(255 - i);
        if (own > key) key = own;
      }
    }
    key = __reduce_max_sync(0xffffffffu, key);
    return key == 0 ? -1 : 255 - int(key & 0xffu);
  }

  // rho = L Lᵀ; returns the rank.
  MMAE_DEVICE int factorize(double noise) {
    T threshold = 0;
    int rank = 0;
    for (; rank < k; ++rank) {
      const int current = rank % 2 * k, next = k - current;
      const int p = largest_left(current);
      if (p < 0) break;
      const T head = diagonal[current + p];
      if (rank == 0) threshold = T(noise * head);
      if (!(head > threshold)) break;
      const T root = T(1) / sqrt(head);
      for (int i = warp; i < k; i += warps) {
        if (i == p || diagonal[current + i] < T(0)) {
          if (lane == 0) diagonal[next + i] = -1;
          continue;
        }
        const T wi = w[p * ld + i] * root;
        for (int j = lane; j < k; j += kWarp) {
          const T x = w[i * ld + j] - wi * (w[p * ld + j] * root);
          w[i * ld + j] = x;
          if (i == j) diagonal[next + i] = x > T(0) ? x : T(0);
        }
      }
      if (t == 0) {
        order[p] = rank;
        coefficient[p] = root;
      }
      __syncthreads();  // the next pivot row and diagonal are complete, these have been read
    }
    // Rows have been left as they were when they became pivots.
    for (int i = warp; i < k; i += warps) {
      const int own = order[i];
      const T root = own < k ? T(coefficient[i]) : T(0);
      for (int j = lane; j < k; j += kWarp)
        w[i * ld + j] = own < k && order[j] >= own ? w[i * ld + j] * root : T(0);
    }
    __syncthreads();  // L is complete
    return rank;
  }

  // Squared lengths of the columns, into any array, by groups of lanes.
  template <class U>
  MMAE_DEVICE void lengths(Shared<U> out) {
    const int sub = lane % lanes, groups = kWarp / lanes;
    for (int first = warp * groups; first < k; first += warps * groups) {
      const int i = first + lane / lanes;
      U part = 0;
      if (i < k)
        for (int j = sub; j < k; j += lanes) part += U(w[i * ld + j]) * U(w[i * ld + j]);
      part = U(warp_reduce(part, Sum{}, lanes / 2));
      if (i < k && sub == 0) out[i] = part;
    }
    __syncthreads();  // the lengths are complete
  }

  // Round `round` of the schedule; returns whether a pair was far from orthogonal.
  MMAE_DEVICE bool rotate(int round, T tolerance2, T far2) {
    const int players = k + k % 2, pairs = players / 2;
    const int current = round % 2 * k, next = k - current;
    const int sub = lane % lanes, groups = kWarp / lanes;
    bool far = false;
    for (int first = warp * groups; first < pairs; first += warps * groups) {
      const int pair = first + lane / lanes;
      int p = round + pair, q = round - pair;
      if (p >= players - 1) p -= players - 1;
      if (q < 0) q += players - 1;
      if (pair == 0) q = players - 1;
      const bool some = pair < pairs, both = some && p < k && q < k;
      T x[E], y[E], dot = 0;
#pragma unroll
      for (int e = 0; e < E; ++e) {
        const int i = sub + lanes * e;
        x[e] = both && i < k ? T(w[p * ld + i]) : T(0);
        y[e] = both && i < k ? T(w[q * ld + i]) : T(0);
        dot += x[e] * y[e];
      }
      dot = group_sum(dot);
      if (!some) continue;
      if (!both) {  // with an odd number, one column rests
        if (sub == 0 && p < k) norms[next + p] = T(norms[current + p]);
        if (sub == 0 && q < k) norms[next + q] = T(norms[current + q]);
        continue;
      }
      T a = norms[current + p], b = norms[current + q];
      const T dot2 = dot * dot;
      if (dot2 > tolerance2 * a * b) {
        far |= dot2 > far2 * a * b;
        const T zeta = (b - a) / (2 * dot);
        T tangent = T(1) / (fabs(zeta) + sqrt(1 + zeta * zeta));
        if (zeta < T(0)) tangent = -tangent;
        const T cosine = T(1) / sqrt(1 + tangent * tangent), sine = tangent * cosine;
        const T ratio = sine / (1 + cosine);
#pragma unroll
        for (int e = 0; e < E; ++e) {
          const int i = sub + lanes * e;
          if (i >= k) continue;
          w[p * ld + i] = x[e] - sine * (y[e] + ratio * x[e]);
          w[q * ld + i] = y[e] + sine * (x[e] - ratio * y[e]);
        }
        a -= tangent * dot;
        b += tangent * dot;
      }
      if (sub == 0) {
        norms[next + p] = a;
        norms[next + q] = b;
      }
    }
    __syncthreads();  // every pair is in place: the next round pairs them anew
    return far;
  }

  MMAE_DEVICE T group_sum(T x) const {
    for (int other = lanes / 2; other > 0; other /= 2)
      x += T(__shfl_xor_sync(0xffffffffu, x, other));
    return x;
  }

  // Sweeps until all columns are orthogonal; false if they do not get there. Convergence is
  // quadratic: after a sweep that met no pair with a cosine above 0.3 sqrt(eps), none above eps is
  // left.
  MMAE_DEVICE bool orthogonalize() {
    const T eps = std::numeric_limits<T>::epsilon();
    const T tolerance2 = T(k) * eps * eps, far2 = T(0.09) * eps;
    const int rounds = k + k % 2 - 1;
    for (int sweep = 0; sweep < JacobiPlan::kSweeps; ++sweep) {
      lengths(norms);
      bool far = false;
      for (int round = 0; round < rounds; ++round) far |= rotate(round, tolerance2, far2);
      // The sum also keeps `norms` until every thread has read it.
      if (block_reduce(far ? 1 : 0, Sum{}, partial) == 0) return true;
    }
    return false;
  }

  // H_alpha from lam, the eigenvalues of rho; with `derivative`, f into `spectral` and
  // (f - f_0) / lam / tau into `coefficient`, and f_0 is returned through null.
  MMAE_DEVICE double entropy(double alpha, double tau, bool derivative, int rank, double& null) {
    const int threads = int(blockDim.x);
    double part = 0;
    for (int i = t; i < k; i += threads) part = MaxOrNaN{}(part, lam[i]);
    const double largest = block_reduce(part, MaxOrNaN{}, partial);
    const double floor = 0.1 * largest * double(std::numeric_limits<T>::epsilon());
    const bool top = alpha > std::numeric_limits<double>::max();
    double sum = 0, first = k;
    for (int i = t; i < k; i += threads) {
      const double x = lam[i];
      if (top && x == largest) first = Min{}(first, i);
      if (!top && x > 0) sum += alpha == 1 ? -x * log(x) : pow(x, alpha);
    }
    if (top)
      first = block_reduce(first, Min{}, partial);
    else
      sum = block_reduce(sum, Sum{}, partial);
    if (derivative) {
      const auto f = [&](double x, bool is_top) {
        if (x < floor) x = floor;
        if (top) return is_top ? 1 - 1 / largest : 1.0;
        if (alpha == 1) return -(log(x) + sum);
        return alpha / (1 - alpha) * (pow(x, alpha - 1) / sum - 1);
      };
      null = rank < k ? f(0, false) : 0;
      for (int i = t; i < k; i += threads) {
        const double x = lam[i], own = x > 0 ? f(x, double(i) == first) : 0;
        spectral[i] = T(own);
        coefficient[i] = x > 0 ? T((own - null) / x / tau) : T(0);
      }
      __syncthreads();  // f and the coefficients are complete
    }
    return top ? -log(largest) : alpha == 1 ? sum : log(sum) / (1 - alpha);
  }

  // out_i = null · x_i + Σ_r coefficient_r (w_r · x) w_ri, that is V x, for the thread's own i: a
  // barrier must follow before others read it, or work (k) is written again.
  template <class X>
  MMAE_DEVICE void apply(const X& x, T null, Shared<T> work, Shared<T> out) {
    for (int r = warp; r < k; r += warps) {
      double sum = 0;
      for (int i = lane; i < k; i += kWarp) sum += double(w[r * ld + i]) * x(i);
      sum = warp_reduce(sum, Sum{});
      if (lane == 0) work[r] = T(sum * coefficient[r]);
    }
    __syncthreads();  // the products with the columns are complete
    for (int i = t; i < k; i += int(blockDim.x)) {
      double sum = double(null) * x(i);
      for (int r = 0; r < k; ++r) sum += double(work[r]) * w[r * ld + i];
      out[i] = T(sum);
    }
  }

  // Mean over the rows kept of x, an array.
  MMAE_DEVICE double mean_of(Shared<T> x, const RowData<T>& rows) const {
    double part = 0;
    for (int i = t; i < k; i += int(blockDim.x)) part += double(rows.keep[i]) * x[i];
    part = block_reduce(part, Sum{}, partial);
    return rows.count > 0 ? part / rows.count : 0;
  }

  // What the weight needs besides V on the samples side: row means of V (rows.column) and their
  // mean (returned); projections s_i = (V G)_ii + (C along)_i into `projection`.
  MMAE_DEVICE T prepare_fold(const RowData<T>& rows, T null, Shared<T> work, Shared<T> projection) {
    for (int i = t; i < k; i += int(blockDim.x)) {
      double sum = 0;
      if (rows.normalize)
        for (int r = 0; r < k; ++r) sum += double(spectral[r]) * w[r * ld + i] * w[r * ld + i];
      projection[i] = T(sum);
    }
    if (!rows.center) {
      __syncthreads();  // the projections are complete
      return 0;
    }
    const T inverse = rows.count > 0 ? T(1 / rows.count) : T(0);
    if (rows.normalize) {  // C along = P V P along, P the centring of the rows kept
      const T mean = T(mean_of(rows.along, rows));
      const auto x = [&](int i) { return rows.keep[i] * (rows.along[i] - mean); };
      apply(x, null, work, rows.column);
      const T shift = T(mean_of(rows.column, rows));
      for (int i = t; i < k; i += int(blockDim.x))
        projection[i] = projection[i] + rows.keep[i] * (rows.column[i] - shift);
    }
    apply([&](int i) { return rows.keep[i] * inverse; }, null, work, rows.column);
    return T(mean_of(rows.column, rows));
  }

  // finish(i, j, V_ij) for every entry, by groups of 8 x 8 threads with 4 x 4 entries each.
  template <class Finish>
  MMAE_DEVICE void write(T null, const Finish& finish) const {
    constexpr int S = 8, R = 4, kTile = S * R;
    const int across = int(ceil_div(k, kTile)), own = t % (S * S), ty = own / S, tx = own % S;
    for (int tile = t / (S * S); tile < across * across; tile += int(blockDim.x) / (S * S)) {
      const int i0 = tile / across * kTile + ty, j0 = tile % across * kTile + tx;
      T sums[R][R] = {};
      for (int r = 0; r < k; ++r) {
        const T factor = coefficient[r];
        T left[R], right[R];
#pragma unroll
        for (int a = 0; a < R; ++a) {
          left[a] = i0 + S * a < k ? factor * w[r * ld + i0 + S * a] : T(0);
          right[a] = j0 + S * a < k ? T(w[r * ld + j0 + S * a]) : T(0);
        }
#pragma unroll
        for (int a = 0; a < R; ++a)
#pragma unroll
          for (int b = 0; b < R; ++b) sums[a][b] += left[a] * right[b];
      }
#pragma unroll
      for (int a = 0; a < R; ++a)
#pragma unroll
        for (int b = 0; b < R; ++b) {
          const int i = i0 + S * a, j = j0 + S * b;
          if (i < k && j < k) finish(i, j, sums[a][b] + (i == j ? null : T(0)));
        }
    }
  }
};

// in.g (batch, k, k); value (batch); weight (batch, k, k) or null. Grid: one block per matrix,
// plan.threads <= N threads, plan.shared_bytes of shared memory. Registers are rationed so that
// three blocks of 256 threads (float64: two) share a multiprocessor, where their memory lets them.
template <class T, int N>
__global__ void __launch_bounds__(N, N > 256          ? 1
                                     : sizeof(T) == 4 ? 3
                                                      : 2)
    jacobi_kernel(const Features f, const GramInput<T> in, const JacobiPlan plan, double alpha,
                  T* value, T* weight) {
  const int64_t index = blockIdx.x, entries = int64_t(plan.k) * plan.k;
  const int k = plan.k;
  if (weight) weight += index * entries;
  JacobiBlock<T> block(plan);
  const RowData<T> rows = load_rows<T>(f, in, plan, index);
  const double tau = trace_of(in.g + index * entries, k, block.partial);
  if (tau == 0) {  // no rows, or only zero rows: entropy 0 by convention
    if (block.t == 0) value[index] = 0;
    if (weight) fill(weight, entries, T(0));
    return;
  }
  double h = quiet_nan<double>(), null = 0;
  if (is_finite(tau) && block.load(in.g + index * entries, tau)) {
    const int rank = block.factorize(jacobi_noise(alpha, k) * std::numeric_limits<T>::epsilon());
    const bool done = block.orthogonalize();
    block.lengths(block.lam);
    if (done) h = block.entropy(alpha, tau, weight != nullptr, rank, null);
  }
  const bool good = is_finite(h);
  if (block.t == 0) value[index] = good ? T(h) : quiet_nan<T>();
  if (!weight) return;
  if (!good) return fill(weight, entries, quiet_nan<T>());
  const T f0 = T(null / tau);
  if (in.side != Side::kSamples) {
    const T common = in.common ? in.common[index] : T(1);
    const T factor = in.side == Side::kGram ? T(1) : 2 * common * common;
    return block.write(f0, [&](int i, int j, T v) { weight[int64_t(i) * k + j] = factor * v; });
  }
  const Shared<T> projection = shared_array<T>(plan.projection, k);
  const T grand = block.prepare_fold(rows, f0, shared_array<T>(plan.norms, 2 * k), projection);
  block.write(f0, [&](int i, int j, T v) {
    T c = rows.centered(v, grand, i, j);
    if (i == j) c -= projection[i];
    weight[int64_t(i) * k + j] = 2 * rows.scale[i] * rows.scale[j] * c;
  });
}

}  // namespace cuda
}  // namespace mmae
