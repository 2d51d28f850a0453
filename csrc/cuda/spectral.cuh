// Features to (value, W') in one kernel, one block per matrix, for k = min(n, d) up to max_order.
//
//     G = Ẑ Ẑᵀ (n <= d, "samples") or Ẑᵀ Ẑ ("features"), Ẑ the prepared rows
//     coding rate:  value = log det A, A = I + cG,            V = c A⁻¹
//     Rényi-2:      value = 2 log tr G - log ||G||²,          V = 2 / tr G · I - 2 / ||G||² · G
//
// Only z is read and only value and W' are written: norms, mean, Ẑ, G, the factor and V stay in the
// block. Per matrix: n d k multiply-adds for G (both triangles: the register tiles are square),
// k³/2 for A⁻¹ or k³/6 for log det alone, and 2 k² + depth · width numbers of shared memory.
//
// The product runs in steps of columns (samples) or rows (features): raw entries → scaled
// and centred in shared memory → both operands of a policy of tiles.cuh; its sums go to the upper
// triangle of `square`. A is factorised by the sweep operator (sweep.cuh), and V folded into W' as
// in fold.cuh.
//
// Precision: arithmetic T = float32 (float64 for float64) on any storage type; traces, means, sums
// of squares and of logs in float64. No atomics: bitwise reproducible.
#pragma once
#include "fold.cuh"
#include "sweep.cuh"
#include "tiles.cuh"

namespace mmae {
namespace cuda {

template <class T>
struct SpectralBlock {
  const Rows<T> rows;
  const bool samples, normalize, center;
  static constexpr int kDepth = depth_of(sizeof(T) == 8 ? Unit::kDouble : Unit::kFloat);
  const int k, ld, width;  // as in SpectralPlan
  const int t, lane, warp, warps;
  const Shared<T> square, scale, keep, mean, along, column, pivot;
  const Shared<double> partial;
  T common = 1;      // scale of rows that are not normalised
  double count = 0;  // rows kept; counted if centred

  MMAE_DEVICE SpectralBlock(const Features& f, const SpectralPlan& p, int64_t index)
      : rows(f, index), samples(f.n <= f.d), normalize(f.normalize), center(f.center), k(p.k),
        ld(p.ld), width(p.width), t(int(threadIdx.x)), lane(t % kWarp), warp(t / kWarp),
        warps(int(blockDim.x) / kWarp), square(shared_array<T>(p.square, p.k * p.ld)),
        scale(shared_array<T>(p.scale, p.rows)), keep(shared_array<T>(p.keep, p.rows)),
        mean(shared_array<T>(p.mean, p.rows)), along(shared_array<T>(p.along, p.k)),
        column(shared_array<T>(p.column, 2 * p.k)), pivot(shared_array<T>(p.pivot, p.k)),
        partial(shared_array<double>(p.partial, p.threads / kWarp)) {}

  // scale[r], keep[r] of rows first + r, r < rows_wanted; one warp per row.
  MMAE_DEVICE void scale_rows(int64_t first, int rows_wanted) {
#pragma unroll 1
    for (int r = warp; r < rows_wanted; r += warps) {
      const int64_t row = first + r;
      const bool kept = row < rows.n && rows.kept(row);
      const T s = !kept ? T(0) : normalize ? rows.inverse_norm(row, lane) : common;
      if (lane == 0) {
        scale[r] = s;
        keep[r] = kept ? T(1) : T(0);
      }
    }
  }

  MMAE_DEVICE void count_rows() {
    double part = 0;
#pragma unroll 1
    for (int64_t i = t; i < rows.n; i += blockDim.x) part += rows.kept(i);
    count = block_reduce(part, Sum{}, partial);
  }

  // Mean row on the features side: a pass of its own over the rows, thread j sums column j.
  MMAE_DEVICE void mean_of_features() {
    double sum = 0;
#pragma unroll 1
    for (int64_t at = 0; at < rows.n; at += kDepth) {
      scale_rows(at, kDepth);
      __syncthreads();  // scale and keep of this step are complete
      if (t < k)
#pragma unroll 1
        for (int p = 0; p < kDepth; ++p)
          if (keep[p] != T(0)) sum += scale[p] * rows.load(at + p, t);
      __syncthreads();  // and read, before the next step (or the product) overwrites them
    }
    if (t < k) mean[t] = count > 0 ? T(sum / count) : T(0);
  }

  // stage(p, i): entry (row i, column at + p) of Ẑ on the samples side, not centred yet;
  // (row at + p, column i), centred, on the features side. Zero outside of the matrix.
  template <class To>
  MMAE_DEVICE void load_stage(const To& stage, int64_t at) {
    if (samples)
      stage_rows<kDepth>(stage, width, [&](int p, int i) {
        return i < k && at + p < rows.d && keep[i] != T(0) ? scale[i] * rows.load(i, at + p) : T(0);
      });
    else
      stage_columns<kDepth>(stage, width, [&](int p, int i) {
        if (i >= k || at + p >= rows.n || keep[p] == T(0)) return T(0);
        const T x = scale[p] * rows.load(at + p, i);
        return center ? x - mean[i] : x;
      });
  }

  // Samples side: subtracts the mean of each staged column from the rows kept. Returns a part of
  // along[i] = (ẑ_i - m) · m, what G does not see of ẑ_i, for the row i = t / sharers.
  template <class To>
  MMAE_DEVICE T center_stage(const To& stage, int sharers) {
    constexpr int kSharers = 8;  // of a column: 4 columns x 8 rows, 36 words apart, are 32 banks
#pragma unroll 1
    for (int p = t / kSharers; p < kDepth; p += int(blockDim.x) / kSharers) {
      double sum = 0;
#pragma unroll 1
      for (int i = t % kSharers; i < k; i += kSharers) sum += stage(p, i);
      sum = warp_reduce(sum, Sum{}, kSharers / 2);
      if (t % kSharers == 0) mean[p] = count > 0 ? T(sum / count) : T(0);
    }
    __syncthreads();  // means are complete, and no warp still sums a column that changes below
    const int i = t / sharers;
    T part = 0;
    if (i < k && keep[i] != T(0))
#pragma unroll 1
      for (int p = t % sharers; p < kDepth; p += sharers) {
        const T x = stage(p, i) - mean[p];
        stage(p, i) = x;
        part += x * mean[p];
      }
    __syncthreads();  // the product reads columns that other threads centred
    return part;
  }

  // Upper triangle of G into `square`.
  template <class Tile>
  MMAE_DEVICE void gram(const Stage& at_stage) {
    const auto stage = operand<Tile>(at_stage);
    constexpr int kStep = numbers_of(Tile::kUnit);
    const int64_t total = samples ? rows.d : rows.n;
    const int sharers = int(blockDim.x) / width;  // rounded down, it is a power of two
    Tile tile(width, width, rows.dtype);
    T along_part = 0;
    bool first = true;
    for (int64_t at = 0; at < total; at += kStep) {
      if (!samples)
        scale_rows(at, kDepth);
      else if (at == 0)
        scale_rows(0, k);
      __syncthreads();  // scale, keep and mean are written; the last step's stage has been read
      if constexpr (Tile::kUnit == Unit::kPairs)
        rows.stage_pairs(stage, width, 0, at, scale);
      else
        load_stage(stage, at);
      __syncthreads();  // the stage is complete
      if constexpr (Tile::kUnit != Unit::kPairs)
        if (samples && center) along_part += center_stage(stage, sharers);
      if (tile.in_triangle(k)) tile.add(stage, stage, depth_of(Tile::kUnit));
      const bool last = at + kStep >= total;
      if ((at + kStep) % kFlushDepth == 0 || last) {
        flush(tile, first, last);
        first = false;
      }
    }
    if (samples && center) {
      along_part = T(warp_reduce(along_part, Sum{}, sharers / 2));
      if (t % sharers == 0 && t / sharers < k) along[t / sharers] = along_part;
    }
    __syncthreads();  // G and along are complete
  }

  // Adds the sums to G and clears them. Entries belong to one thread: no barrier.
  template <class Tile>
  MMAE_DEVICE void flush(Tile& tile, bool first, bool last) {
#pragma unroll
    for (int e = 0; e < Tile::kEntries; ++e) {
      const int i = tile.row(e), j = tile.column(e);
      if (i <= j && j < k) {
        T g = tile.sum(e);
        if (!first) g += square[i * ld + j + 1];
        if constexpr (Tile::kUnit == Unit::kPairs)
          if (last) g *= pair_rest(scale[i], rows.dtype) * pair_rest(scale[j], rows.dtype);
        // The diagonal of normalised rows is 1 by definition: say so, instead of 1 ± rounding.
        if (i == j && samples && normalize && !center && scale[i] > T(0)) g = 1;
        square[i * ld + j + 1] = g;
      }
      tile.sum(e) = 0;
    }
  }

  MMAE_DEVICE double trace() {
    double part = 0;
    for (int i = t; i < k; i += int(blockDim.x)) part += square[i * ld + i + 1];
    return block_reduce(part, Sum{}, partial);
  }

  // log det(I + cG); with `invert`, the lower triangle becomes -(I + cG)⁻¹.
  MMAE_DEVICE double factorize(T c, bool invert) {
    const auto entry = [&](int i, int j) {
      return c * square[j * ld + i + 1] + (i == j ? T(1) : T(0));
    };
    return sweep<T>(k, square, SquareRows{ld}, entry, invert, column, pivot, partial);
  }

  // ||G||², float64.
  MMAE_DEVICE double square_norm() {
    double part = 0;
#pragma unroll 1
    for (int i = warp; i < k; i += warps)
#pragma unroll 1
      for (int j = i + lane; j < k; j += kWarp) {
        const double g = square[i * ld + j + 1];
        part += i == j ? g * g : 2 * g * g;
      }
    return block_reduce(part, Sum{}, partial);
  }

  // Lower triangle = V of Rényi-2.
  MMAE_DEVICE void renyi2_derivative(double tau, double norm2) {
    const T factor = T(-2 / norm2), shift = T(2 / tau);
#pragma unroll 1
    for (int i = warp; i < k; i += warps)
#pragma unroll 1
      for (int j = lane; j <= i; j += kWarp)
        square[i * ld + j] = factor * square[j * ld + i + 1] + (i == j ? shift : T(0));
    __syncthreads();  // V is complete: the fold reads rows that other warps wrote
  }

  // Weight (k, k) from V = factor · (lower triangle).
  MMAE_DEVICE void fold(T factor, T* weight) {
    const SquareRows row{ld};
    const auto v = [&](int i, int j) { return factor * square[lower(row, i, j)]; };
    if (!samples) return write_matrix<T>(k, 2 * common * common, v, weight);
    const RowData<T> data{k, normalize, center, count, scale, keep, along, column, partial};
    const auto g = [&](int i, int j) {
      return T(square[i <= j ? i * ld + j + 1 : j * ld + i + 1]);
    };
    fold_samples<T>(data, v, g, weight);
  }
};

// Blocks that a multiprocessor should have registers for: one where two would spill.
template <class Tile>
constexpr int blocks_of = Tile::kEntries <= 16 ? 2 : 1;

// f.z (batch, n, d); value (batch); weight (batch, k, k) or null. Grid: one block per matrix,
// plan.threads threads, plan.shared_bytes of shared memory. c: coding rate only. PairTile: 16-bit
// rows of the samples side, not centred.
template <class T, class Tile>
__global__ void __launch_bounds__(kMaxThreads, blocks_of<Tile>)
    spectral_kernel(const Features f, const SpectralPlan plan, Quantity quantity, double c,
                    T* value, T* weight) {
  const int64_t index = blockIdx.x;
  SpectralBlock<T> block(f, plan, index);
  if (weight) weight += index * plan.k * plan.k;
  if (plan.k == 0) {
    if (block.t == 0) value[index] = 0;
    return;
  }
  if (quantity == Quantity::kRenyi2 && !f.normalize)
    block.common = block.rows.power_of_two_scale(block.partial);
  if (f.center) block.count_rows();
  if (f.center && !block.samples) block.mean_of_features();
  block.template gram<Tile>(plan.stage);

  const double tau = block.trace();
  double h = quiet_nan<double>();
  T factor = 1;
  if (quantity == Quantity::kCodingRate) {
    if (is_finite(tau)) h = block.factorize(T(c), weight != nullptr);
    factor = -T(c);
  } else if (tau == 0) {  // no rows, or only zero rows: entropy 0 by convention
    if (block.t == 0) value[index] = 0;
    if (weight) fill(weight, int64_t(plan.k) * plan.k, T(0));
    return;
  } else if (is_finite(tau)) {
    const double norm2 = block.square_norm();
    h = 2 * log(tau) - log(norm2);
    if (weight) block.renyi2_derivative(tau, norm2);
  }
  const bool good = is_finite(h);
  if (block.t == 0) value[index] = good ? T(h) : quiet_nan<T>();
  if (!weight) return;
  if (good)
    block.fold(factor, weight);
  else
    fill(weight, int64_t(plan.k) * plan.k, quiet_nan<T>());
}

}  // namespace cuda
}  // namespace mmae
