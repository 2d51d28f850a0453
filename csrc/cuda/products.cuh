// The batched products around the k x k matrices, and the row statistics that they need.
//
//     row_scale:   scale_i = 1 / ||z_i|| (1 without normalisation), 0 for dropped rows
//     common_scale: scale_i = the power of two that brings a matrix into range, 0 for dropped rows
//     row_mean:    m = mean over the rows kept of scale_i z_i (0 unless centred)
//     row_along:   (ẑ_i - m) · m, the part of a centred row that G does not see
//     gram:        G = Ẑ Ẑᵀ or Ẑᵀ Ẑ,  ẑ_i = scale_i z_i - m, dropped rows 0
//     samples_bwd: grad_z = grad · W' z                      (raw z: W' holds all the rest)
//     features_bwd: y_i = ẑ_i W',  grad_z_i = grad · scale_i (y_i - ((ẑ_i + m)·y_i) (ẑ_i + m))
//
// Ẑ is never written: rows are scaled and centred on their way into shared memory, and the
// projection is an epilogue on the accumulators. gram computes the tiles of one triangle and writes
// each twice, so that the result is exactly symmetric. Sums run in two levels (kFlushDepth).
#pragma once
#include "rows.cuh"
#include "tiles.cuh"

namespace mmae {
namespace cuda {

// scale (batch, n). Grid: one warp per row, kMaxThreads threads.
template <class T>
__global__ void __launch_bounds__(kMaxThreads) row_scale_kernel(const Features f, T* scale) {
  const int64_t at = int64_t(blockIdx.x) * (kMaxThreads / kWarp) + threadIdx.x / kWarp;
  if (at >= f.batch * f.n) return;  // whole warps leave
  const Rows<T> rows(f, at / f.n);
  const int lane = int(threadIdx.x) % kWarp;
  const int64_t row = at % f.n;
  const bool kept = rows.kept(row);
  const T s = !kept ? T(0) : f.normalize ? rows.inverse_norm(row, lane) : T(1);
  if (lane == 0) scale[at] = s;
}

// scale (batch, n), common (batch). Grid: one block per matrix, kMaxThreads threads. Shared memory:
// kCommonShared bytes.
constexpr int kCommonShared = kMaxThreads / kWarp * 8;

template <class T>
__global__ void __launch_bounds__(kMaxThreads)
    common_scale_kernel(const Features f, T* scale, T* common) {
  const int64_t index = blockIdx.x;
  const Rows<T> rows(f, index);
  const T s = rows.power_of_two_scale(shared_array<double>(0, kMaxThreads / kWarp));
  for (int64_t i = threadIdx.x; i < f.n; i += blockDim.x)
    scale[index * f.n + i] = rows.kept(i) ? s : T(0);
  if (threadIdx.x == 0) common[index] = s;
}

// scale (batch, n), mean (batch, d) → along (batch, n). Grid: one warp per row.
template <class T>
__global__ void __launch_bounds__(kMaxThreads)
    row_along_kernel(const Features f, const T* scale, const T* mean, T* along) {
  const int64_t at = int64_t(blockIdx.x) * (kMaxThreads / kWarp) + threadIdx.x / kWarp;
  if (at >= f.batch * f.n) return;  // whole warps leave
  const int64_t index = at / f.n;
  const Rows<T> rows(f, index);
  const int lane = int(threadIdx.x) % kWarp;
  scale += index * f.n;
  mean += index * f.d;
  double part = 0;
#pragma unroll 1
  for (int64_t j = lane; j < f.d; j += kWarp)
    part += double(rows.prepared(at % f.n, j, scale, mean)) * mean[j];
  part = warp_reduce(part, Sum{});
  if (lane == 0) along[at] = T(part);
}

// scale (batch, n) → mean (batch, d). Grid: batch x ceil(d / kWarp); each warp sums every eighth
// row of kWarp columns. Shared memory: kMeanShared bytes.
constexpr int kMeanWarps = kMaxThreads / kWarp;
constexpr int kMeanShared = kMeanWarps * (kWarp + 2) * 8;

template <class T>
__global__ void __launch_bounds__(kMaxThreads)
    row_mean_kernel(const Features f, const T* scale, T* mean) {
  const int64_t panels = ceil_div(f.d, kWarp), index = blockIdx.x / panels;
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  const int64_t j = int64_t(blockIdx.x) % panels * kWarp + lane;
  const Rows<T> rows(f, index);
  const Shared<double> sums = shared_array<double>(0, kMeanWarps * kWarp);
  const Shared<double> counts = shared_array<double>(kMeanWarps * kWarp * 8, kMeanWarps);
  double sum = 0, count = 0;
  if (f.center)
    for (int64_t i = warp; i < f.n; i += kMeanWarps)
      if (rows.kept(i)) {
        count += 1;
        if (j < f.d) sum += scale[index * f.n + i] * rows.load(i, j);
      }
  sums[warp * kWarp + lane] = sum;
  if (lane == 0) counts[warp] = count;
  __syncthreads();  // the first warp adds what all of them found
  if (warp > 0 || j >= f.d) return;
  for (int w = 1; w < kMeanWarps; ++w) {
    sum += sums[w * kWarp + lane];
    count += counts[w];
  }
  mean[index * f.d + j] = count > 0 ? T(sum / count) : T(0);
}

// The power of two within a scale, which a 16-bit number can be multiplied by without rounding.
MMAE_DEVICE float power_of_two_in(float scale) {
  const float power = bits_float(float_bits(scale) & 0x7f800000u);
  return power > 0 ? power : scale;
}
MMAE_DEVICE double power_of_two_in(double scale) { return scale; }

// scale (batch, n), mean (batch, d) or null → out (batch, k, k), k = n (samples) or d. Grid: batch
// x tiles x tiles blocks of ProductPlan::kThreads, of which those below the diagonal leave at once.
// exact: 16-bit rows of the samples side, not centred, go in multiplied by a power of two only, and
// the rest of their scale comes after the product.
template <class T, class Tile>
__global__ void __launch_bounds__(ProductPlan::kThreads, 2)
    gram_kernel(const Features f, const ProductPlan plan, bool samples, bool exact, const T* scale,
                const T* mean, T* out) {
  constexpr int kTile = ProductPlan::kTile;
  const int64_t k = samples ? f.n : f.d, length = samples ? f.d : f.n, tiles = ceil_div(k, kTile);
  const int64_t index = blockIdx.x / (tiles * tiles), at_tile = blockIdx.x % (tiles * tiles);
  const int64_t i0 = at_tile / tiles * kTile, j0 = at_tile % tiles * kTile;
  if (i0 > j0) return;
  const Rows<T> rows(f, index);
  scale += index * f.n;
  if (mean) mean += index * f.d;
  const Shared<T> left = shared_array<T>(plan.left, plan.count);
  const Shared<T> right = shared_array<T>(plan.right, plan.count);
  const int t = int(threadIdx.x);
  Tile tile(plan, samples);
  const auto staged = [&](int64_t i, int64_t p) -> T {
    if (!samples) return rows.prepared(p, i, scale, mean);
    if (!exact) return rows.prepared(i, p, scale, mean);
    return i < f.n && p < f.d && rows.kept(i) ? power_of_two_in(scale[i]) * rows.load(i, p) : T(0);
  };
  for (int64_t at = 0; at < length; at += plan.depth) {
    for (int e = t; e < kTile * plan.depth; e += ProductPlan::kThreads) {
      const int p = samples ? e % plan.depth : e / kTile, i = samples ? e / plan.depth : e % kTile;
      left[tile.at(p, i)] = staged(i0 + i, at + p);
      right[tile.at(p, i)] = staged(j0 + i, at + p);
    }
    __syncthreads();  // both operands are complete
    tile.add(left, right);
    if ((at + plan.depth) % Tile::kFlush == 0) tile.flush();
    __syncthreads();  // and read, before the next step overwrites them
  }
  tile.flush();
  out += index * k * k;
#pragma unroll
  for (int e = 0; e < Tile::kEntries; ++e) {
    const int64_t i = i0 + tile.row(e), j = j0 + tile.column(e);
    if (i >= k || j >= k) continue;
    T g = tile.value(e);
    if (exact && scale[i] > T(0) && scale[j] > T(0))
      g *= (scale[i] / power_of_two_in(scale[i])) * (scale[j] / power_of_two_in(scale[j]));
    // The diagonal of normalised rows is 1 by definition.
    if (i == j && samples && f.normalize && !f.center && scale[i] > T(0)) g = 1;
    out[i * k + j] = g;
    if (i0 != j0) out[j * k + i] = g;
  }
}

// grad (batch), weight W' (batch, n, n) → grad_z (batch, n, d). Grid: batch x row tiles x column
// tiles.
template <class T>
__global__ void __launch_bounds__(ProductPlan::kThreads, 2)
    samples_bwd_kernel(const Features f, const ProductPlan plan, const T* grad, const T* weight,
                       void* grad_z) {
  constexpr int kTile = ProductPlan::kTile;
  const int64_t across = ceil_div(f.d, kTile), tiles = ceil_div(f.n, kTile) * across;
  const int64_t index = blockIdx.x / tiles, at_tile = blockIdx.x % tiles;
  const int64_t i0 = at_tile / across * kTile, j0 = at_tile % across * kTile;
  const Rows<T> rows(f, index);
  weight += index * f.n * f.n;
  const Shared<T> left = shared_array<T>(plan.left, plan.count);
  const Shared<T> right = shared_array<T>(plan.right, plan.count);
  const int t = int(threadIdx.x);
  ThreadTile<T> tile(plan, true);
  for (int64_t at = 0; at < f.n; at += plan.depth) {
    for (int e = t; e < kTile * plan.depth; e += ProductPlan::kThreads) {
      int p = e % plan.depth, i = e / plan.depth;
      left[tile.at(p, i)] = i0 + i < f.n && at + p < f.n ? weight[(i0 + i) * f.n + at + p] : T(0);
      p = e / kTile, i = e % kTile;
      right[tile.at(p, i)] =
          at + p < f.n && j0 + i < f.d && rows.kept(at + p) ? rows.load(at + p, j0 + i) : T(0);
    }
    __syncthreads();  // both operands are complete
    tile.add(left, right);
    if ((at + plan.depth) % ThreadTile<T>::kFlush == 0) tile.flush();
    __syncthreads();  // and read, before the next step overwrites them
  }
  tile.flush();
#pragma unroll
  for (int e = 0; e < ThreadTile<T>::kEntries; ++e) {
    const int64_t i = i0 + tile.row(e), j = j0 + tile.column(e);
    if (i < f.n && j < f.d)
      store(grad_z, f.dtype, (index * f.n + i) * f.d + j, grad[index] * tile.value(e));
  }
}

// grad (batch), weight W' (batch, d, d), scale (batch, n), mean (batch, d) or null → grad_z (batch,
// n, d), d <= max_order. Grid: batch x ceil(n / kRows); a block has whole rows, so the projection
// needs only a sum over the 16 threads that share them. C = rows_tile: columns per thread.
template <class T, int C>
__global__ void __launch_bounds__(RowsPlan::kThreads)
    features_bwd_kernel(const Features f, const RowsPlan plan, const T* grad, const T* weight,
                        const T* scale, const T* mean, void* grad_z) {
  constexpr int kRows = RowsPlan::kRows, kSide = RowsPlan::kSide, R = kRows / kSide;
  constexpr int ldx = kRows + 1;
  const int64_t blocks = ceil_div(f.n, kRows), index = blockIdx.x / blocks;
  const int64_t i0 = int64_t(blockIdx.x) % blocks * kRows;
  const int d = int(f.d), ldw = plan.width + 1;
  const Rows<T> rows(f, index);
  weight += index * d * d;
  scale += index * f.n;
  if (mean) mean += index * d;
  const Shared<T> x = shared_array<T>(plan.x, d * ldx);
  const Shared<T> w = shared_array<T>(plan.w, plan.depth * ldw);
  const int t = int(threadIdx.x), ty = t / kSide, tx = t % kSide;
  for (int e = t; e < d * kRows; e += RowsPlan::kThreads)
    x[e % d * ldx + e / d] = rows.prepared(i0 + e / d, e % d, scale, mean);
  T y[R][C] = {};
  for (int at = 0; at < d; at += plan.depth) {
    const int steps = d - at < plan.depth ? d - at : plan.depth;
    for (int e = t; e < steps * plan.width; e += RowsPlan::kThreads) {
      const int p = e / plan.width, j = e % plan.width;
      w[p * ldw + j] = j < d ? weight[(at + p) * d + j] : T(0);
    }
    __syncthreads();  // this step of W' and, at first, x are complete
    for (int p = 0; p < steps; ++p) {
      T a[R], b[C];
#pragma unroll
      for (int r = 0; r < R; ++r) a[r] = x[(at + p) * ldx + ty + kSide * r];
#pragma unroll
      for (int c = 0; c < C; ++c) b[c] = w[p * ldw + tx + kSide * c];
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int c = 0; c < C; ++c) y[r][c] += a[r] * b[c];
    }
    __syncthreads();  // w has been read, before the next step overwrites it
  }
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const int row = ty + kSide * r;
    double part = 0;
    if (f.normalize)
#pragma unroll
      for (int c = 0; c < C; ++c) {
        const int j = tx + kSide * c;
        if (j >= d) continue;
        const T unit = x[j * ldx + row] + (mean ? mean[j] : T(0));
        part += double(unit) * y[r][c];
      }
    const T along = T(warp_reduce(part, Sum{}, kSide / 2));
    if (i0 + row >= f.n) continue;
    const bool kept = rows.kept(i0 + row);
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const int j = tx + kSide * c;
      if (j >= d) continue;
      T g = 0;
      if (kept) {
        const T unit = x[j * ldx + row] + (mean ? mean[j] : T(0));
        g = grad[index] * scale[i0 + row] * (y[r][c] - along * unit);
      }
      store(grad_z, f.dtype, (index * f.n + i0 + row) * d + j, g);
    }
  }
}

}  // namespace cuda
}  // namespace mmae
