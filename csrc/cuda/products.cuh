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
// each twice, so that the result is exactly symmetric. How a block multiplies is a policy
// (tiles.cuh); long sums run in two levels (kFlushDepth).
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
__global__ void __launch_bounds__(kMaxThreads, 4)
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

// A tile of a product with the second level of its sums.
template <class Tile>
struct Summed {
  using T = std::remove_reference_t<decltype(std::declval<Tile&>().sum(0))>;
  Tile tile;
  T total[Tile::kEntries] = {};

  MMAE_DEVICE void flush() {
#pragma unroll
    for (int e = 0; e < Tile::kEntries; ++e) {
      total[e] += tile.sum(e);
      tile.sum(e) = 0;
    }
  }
};

// scale (batch, n), mean (batch, d) or null → out (batch, k, k), k = n (samples) or d. Grid: batch
// x tiles x tiles blocks of ProductPlan::kThreads, of which those below the diagonal leave at once.
// PairTile: 16-bit rows of the samples side, not centred.
template <class T, class Tile>
__global__ void __launch_bounds__(ProductPlan::kThreads, 2)
    gram_kernel(const Features f, const ProductPlan plan, bool samples, const T* scale,
                const T* mean, T* out) {
  constexpr int kTile = ProductPlan::kTile, kDepth = numbers_of(Tile::kUnit);
  const int64_t k = samples ? f.n : f.d, length = samples ? f.d : f.n, tiles = ceil_div(k, kTile);
  const int64_t index = blockIdx.x / (tiles * tiles), at_tile = blockIdx.x % (tiles * tiles);
  const int64_t i0 = at_tile / tiles * kTile, j0 = at_tile % tiles * kTile;
  if (i0 > j0) return;
  const Rows<T> rows(f, index);
  scale += index * f.n;
  if (mean) mean += index * f.d;
  const auto left = operand<Tile>(plan.left), right = operand<Tile>(plan.right);
  Summed<Tile> product{Tile(kTile, kTile, f.dtype)};
  for (int64_t at = 0; at < length; at += kDepth) {
    if constexpr (Tile::kUnit == Unit::kPairs) {
      rows.stage_pairs(left, kTile, i0, at, scale + i0);
      rows.stage_pairs(right, kTile, j0, at, scale + j0);
    } else {
      const auto stage = [&](const auto& to, int64_t first) {
        if (samples)
          stage_rows<kDepth>(to, kTile, [&](int p, int i) {
            return rows.prepared(first + i, at + p, scale, mean);
          });
        else
          stage_columns<kDepth>(to, kTile, [&](int p, int i) {
            return rows.prepared(at + p, first + i, scale, mean);
          });
      };
      stage(left, i0);
      stage(right, j0);
    }
    __syncthreads();  // both operands are complete
    product.tile.add(left, right, depth_of(Tile::kUnit));
    if ((at + kDepth) % kFlushDepth == 0) product.flush();
    __syncthreads();  // and read, before the next step overwrites them
  }
  product.flush();
  out += index * k * k;
#pragma unroll
  for (int e = 0; e < Tile::kEntries; ++e) {
    const int64_t i = i0 + product.tile.row(e), j = j0 + product.tile.column(e);
    if (i >= k || j >= k) continue;
    T g = product.total[e];
    if constexpr (Tile::kUnit == Unit::kPairs)
      g *= pair_rest(scale[i], f.dtype) * pair_rest(scale[j], f.dtype);
    // The diagonal of normalised rows is 1 by definition.
    if (i == j && samples && f.normalize && !f.center && scale[i] > T(0)) g = 1;
    out[i * k + j] = g;
    if (i0 != j0) out[j * k + i] = g;
  }
}

// grad (batch), weight W' (batch, n, n) → grad_z (batch, n, d). Grid: batch x row tiles x column
// tiles.
template <class T, class Tile>
__global__ void __launch_bounds__(ProductPlan::kThreads, 2)
    samples_bwd_kernel(const Features f, const ProductPlan plan, const T* grad, const T* weight,
                       void* grad_z) {
  constexpr int kTile = ProductPlan::kTile, kDepth = numbers_of(Tile::kUnit);
  const int64_t across = ceil_div(f.d, kTile), tiles = ceil_div(f.n, kTile) * across;
  const int64_t index = blockIdx.x / tiles, at_tile = blockIdx.x % tiles;
  const int64_t i0 = at_tile / across * kTile, j0 = at_tile % across * kTile;
  const Rows<T> rows(f, index);
  weight += index * f.n * f.n;
  const auto left = operand<Tile>(plan.left), right = operand<Tile>(plan.right);
  Summed<Tile> product{Tile(kTile, kTile, f.dtype)};
  for (int64_t at = 0; at < f.n; at += kDepth) {
    stage_rows<kDepth>(left, kTile, [&](int p, int i) {
      return i0 + i < f.n && at + p < f.n ? weight[(i0 + i) * f.n + at + p] : T(0);
    });
    stage_columns<kDepth>(right, kTile, [&](int p, int j) {
      return at + p < f.n && j0 + j < f.d && rows.kept(at + p) ? rows.load(at + p, j0 + j) : T(0);
    });
    __syncthreads();  // both operands are complete
    product.tile.add(left, right, kDepth);
    if ((at + kDepth) % kFlushDepth == 0) product.flush();
    __syncthreads();  // and read, before the next step overwrites them
  }
  product.flush();
#pragma unroll
  for (int e = 0; e < Tile::kEntries; ++e) {
    const int64_t i = i0 + product.tile.row(e), j = j0 + product.tile.column(e);
    if (i < f.n && j < f.d)
      store(grad_z, f.dtype, (index * f.n + i) * f.d + j, grad[index] * product.total[e]);
  }
}

// grad (batch), weight W' (batch, d, d), scale (batch, n), mean (batch, d) or null → grad_z (batch,
// n, d), d <= max_order. Grid: batch x ceil(n / kRows); a block has whole rows, so the projection
// needs only a sum over the threads that share them. Tile::kWholeLeft: rows not centred, of 16-bit
// numbers, staged times a power of two; the rest of their scale comes after the product.
template <class T, class Tile>
__global__ void __launch_bounds__(RowsPlan::kThreads, 2)
    features_bwd_kernel(const Features f, const RowsPlan plan, const T* grad, const T* weight,
                        const T* scale, const T* mean, void* grad_z) {
  constexpr int kRows = RowsPlan::kRows, kDepth = numbers_of(Tile::kUnit);
  constexpr int kWidth = Tile::width_of(kRows, RowsPlan::kThreads);
  const int64_t blocks = ceil_div(f.n, kRows), index = blockIdx.x / blocks;
  const int64_t i0 = int64_t(blockIdx.x) % blocks * kRows;
  const int d = int(f.d), t = int(threadIdx.x);
  weight += index * d * d;
  scale += index * f.n;
  if (mean) mean += index * d;
  const auto x = operand<Tile, kWidth>(plan.x);
  const auto w = operand<Tile>(plan.w);
  const Shared<double> partial = shared_array<double>(plan.partial, plan.across * kRows);
  Tile tile(kRows, kWidth, f.dtype);
  {
    const Rows<T> rows(f, index);
    for (int e = t; e < kRows * plan.steps; e += RowsPlan::kThreads) {
      const int j = e % plan.steps, i = e / plan.steps;
      if constexpr (Tile::kWholeLeft)
        x(j, i) = rows.in_range(i0 + i, j, scale);
      else
        x(j, i) = rows.prepared(i0 + i, j, scale, mean);
    }
  }
  for (int at = 0; at < d; at += kDepth) {
    stage_columns<kDepth>(w, kWidth, [&](int p, int j) {
      return at + p < d && j < d ? weight[(at + p) * d + j] : T(0);
    });
    __syncthreads();  // this step of W' and, at first, x are complete
    tile.add(x.from(at), w, kDepth);
    __syncthreads();  // w has been read, before the next step overwrites it
  }
  const Rows<T> rows(f, index);  // again: kept until here, it would cost registers
  // Entry of the row that was normalised, before centring, as it was staged.
  const auto unit = [&](int i, int j) -> T { return x(j, i) + (mean ? mean[j] : T(0)); };
  if (f.normalize) {
#pragma unroll
    for (int s = 0; s < Tile::kSlots; ++s) {
      const int i = tile.row_of_slot(s);
      double part = 0;
#pragma unroll
      for (int e = 0; e < Tile::kEntries; ++e)
        if (Tile::slot(e) == s && tile.column(e) < d)
          part += double(unit(i, tile.column(e))) * tile.sum(e);
      part = warp_reduce(part, Sum{}, tile.sharing() / 2);
      if (t % tile.sharing() == 0) partial[tile.across() * kRows + i] = part;
    }
    __syncthreads();  // every warp's part of the projections is there
  }
#pragma unroll
  for (int s = 0; s < Tile::kSlots; ++s) {
    const int i = tile.row_of_slot(s);
    if (i0 + i >= f.n) continue;
    const bool kept = rows.kept(i0 + i);  // a dropped row may have met NaN in W'
    T factor = grad[index] * scale[i0 + i];
    double along = 0;
    if (f.normalize)
      for (int w = 0; w < plan.across; ++w) along += partial[w * kRows + i];
    if constexpr (Tile::kWholeLeft) {
      const T rest = rest_in(scale[i0 + i]);
      factor *= rest;
      along *= double(rest) * rest;
    }
#pragma unroll
    for (int e = 0; e < Tile::kEntries; ++e) {
      const int j = tile.column(e);
      if (Tile::slot(e) != s || j >= d) continue;
      const T g = kept ? factor * (tile.sum(e) - T(along) * unit(i, j)) : T(0);
      store(grad_z, f.dtype, (index * f.n + i0 + i) * d + j, g);
    }
  }
}

}  // namespace cuda
}  // namespace mmae
