// One matrix of the batch as the kernels see it: any strides, any storage type, dropped rows never
// read (they may hold NaN), and the scale that prepares a row.
#pragma once
#include "device.cuh"

namespace mmae {
namespace cuda {

// Computed in T. Row i, column j lies at z[start + i * row_stride + j * column_stride].
template <class T>
struct Rows {
  const void* z;
  DType dtype;
  const bool* mask;  // (n), null: all rows kept
  int64_t start, n, d, row_stride, column_stride, mask_stride;

  MMAE_DEVICE Rows(const Features& f, int64_t index)
      : z(f.z), dtype(f.dtype), mask(f.mask), start(0), n(f.n), d(f.d), row_stride(f.row_stride),
        column_stride(f.column_stride), mask_stride(f.mask_stride) {
#pragma unroll 1  // short and cold, here and below: unrolled, it would only be more code
    for (int i = f.batch_dims - 1; i >= 0; --i) {
      const int64_t at = index % f.batch_sizes[i];
      index /= f.batch_sizes[i];
      start += at * f.z_strides[i];
      if (mask) mask += at * f.mask_strides[i];
    }
  }

  MMAE_DEVICE bool kept(int64_t row) const {
    MMAE_ASSERT(row >= 0 && row < n);
    return !mask || mask[row * mask_stride];
  }

  MMAE_DEVICE T load(int64_t row, int64_t column) const {
    MMAE_ASSERT(kept(row) && column >= 0 && column < d);
    return cuda::load<T>(z, dtype, start + row * row_stride + column * column_stride);
  }

  // Entry of the prepared row: scale[row] · z - mean[column] (null: no mean), 0 where the row is
  // dropped or the position is outside of the matrix. scale: (n), mean: (d), in global memory.
  MMAE_DEVICE T prepared(int64_t row, int64_t column, const T* scale, const T* mean) const {
    if (row >= n || column >= d || !kept(row)) return 0;
    const T x = scale[row] * load(row, column);
    return mean ? x - mean[column] : x;
  }

  // By a whole warp: 1 / ||row||; 0 for a zero row; NaN for a row with NaN or Inf.
  MMAE_DEVICE T inverse_norm(int64_t row, int lane) const {
    T part = 0;
    for (int64_t j = lane; j < d; j += kWarp) {
      const T x = load(row, j);
      part += x * x;
    }
    const double low = sizeof(T) == 4 ? 1e-30 : 1e-280, high = sizeof(T) == 4 ? 1e37 : 1e300;
    const double square = warp_reduce(part, Sum{});
    if (square > low && square < high) return T(1 / sqrt(square));
    // Out of the range where the squares are exact enough: scale by the largest entry. All lanes
    // hold the same square, so the warp comes here as one.
    double largest = 0;
#pragma unroll 1
    for (int64_t j = lane; j < d; j += kWarp)
      largest = MaxOrNaN{}(largest, fabs(double(load(row, j))));
    largest = warp_reduce(largest, MaxOrNaN{});
    if (!is_finite(largest)) return quiet_nan<T>();
    if (largest == 0) return 0;
    double scaled = 0;
#pragma unroll 1
    for (int64_t j = lane; j < d; j += kWarp) {
      const double x = load(row, j) / largest;
      scaled += x * x;
    }
    return T(1 / sqrt(warp_reduce(scaled, Sum{})) / largest);
  }

  // By the whole block: the largest power of two that brings the entries to at most 1 (as far as T
  // has one; 1 if nothing is finite and non-zero). Entropies do not see a common factor, so rows
  // that are not normalised are scaled by it before their squares can overflow.
  MMAE_DEVICE T power_of_two_scale(Shared<double> partial) const {
    const int lane = int(threadIdx.x) % kWarp;
    double largest = 0;
    for (int64_t i = threadIdx.x / kWarp; i < n; i += blockDim.x / kWarp)
      if (kept(i))
#pragma unroll 1
        for (int64_t j = lane; j < d; j += kWarp)
          largest = MaxOrNaN{}(largest, fabs(double(load(i, j))));
    largest = block_reduce(largest, MaxOrNaN{}, partial);
    if (!is_finite(largest) || largest == 0) return 1;
    const int low = sizeof(T) == 4 ? -120 : -1000, high = sizeof(T) == 4 ? 60 : 500;
    const int exponent = -ilogb(largest);
    return T(ldexp(1.0, exponent < low ? low : exponent > high ? high : exponent));
  }
};

}  // namespace cuda
}  // namespace mmae
