// One matrix of the batch as the kernels see it: any strides, any storage type, dropped rows never
// read (they may hold NaN), and the scale that prepares a row.
#pragma once
#include "device.cuh"

namespace mmae {
namespace cuda {

// A positive scale is a power of two, which a 16-bit number can be multiplied by without rounding,
// times the rest, which is multiplied by after the products. NaN stays in either.
MMAE_DEVICE float power_of_two_in(float scale) {
  const uint32_t exponent = float_bits(scale) & 0x7f800000u;
  return bits_float(exponent ? exponent : 0x00800000u);
}
MMAE_DEVICE float rest_in(float scale) {
  const uint32_t bits = float_bits(scale), exponent = bits & 0x7f800000u;
  if (exponent == 0) return scale * 0x1p126f;
  return exponent == 0x7f800000u ? scale : bits_float((bits & 0x007fffffu) | 0x3f800000u);
}
// The same where products are of 16-bit numbers. Every product of float16 numbers is a float32
// number, so that they need no power; bfloat16 numbers stay such under powers of two.
MMAE_DEVICE float pair_power(float scale, DType dtype) {
  return dtype == DType::kBFloat16 ? power_of_two_in(scale) : 1;
}
MMAE_DEVICE float pair_rest(float scale, DType dtype) {
  return dtype == DType::kBFloat16 ? rest_in(scale) : scale;
}

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

  // Entry of the row times the power of two in its scale.
  MMAE_DEVICE T in_range(int64_t row, int64_t column, const T* scale) const {
    if (row >= n || column >= d || !kept(row)) return 0;
    return power_of_two_in(scale[row]) * load(row, column);
  }

  // Whether eight neighbours of a 16-bit row, from a multiple of 8 on, are an aligned vector.
  MMAE_DEVICE bool has_vectors() const {
    const uintptr_t address = reinterpret_cast<uintptr_t>(z) + 2 * uintptr_t(start);
    return column_stride == 1 && row_stride % 8 == 0 && address % 16 == 0;
  }

  // Entries column ... column + 7 of a 16-bit row as they are, two to a word, 0 beyond the row.
  MMAE_DEVICE void load_pairs(int64_t row, int64_t column, bool vectors,
                              uint32_t (&words)[4]) const {
    MMAE_ASSERT(kept(row) && column % 8 == 0 && column < d);
    const uint16_t* from = static_cast<const uint16_t*>(z) + start + row * row_stride;
    if (vectors && column + 8 <= d) return load_vector(from + column, words);
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const uint32_t bits = column + e < d ? from[(column + e) * column_stride] : 0;
      words[e / 2] = e % 2 ? words[e / 2] | bits << 16 : bits;
    }
  }

  // By the whole block: columns at ... of rows first, first + 1, ... (`width` of them) as pairs of
  // 16-bit numbers, times the power of two in scale[i], 0 where the row is dropped or the position
  // is outside of the matrix.
  template <class To, class Scale>
  MMAE_DEVICE void stage_pairs(const To& to, int width, int64_t first, int64_t at,
                               const Scale scale) const {
    constexpr int kVectors = depth_of(Unit::kPairs) / 4;
    const bool vectors = has_vectors();
    for (int e = int(threadIdx.x); e < width * kVectors; e += int(blockDim.x)) {
      const int vector = e % kVectors, i = e / kVectors;
      const int64_t row = first + i, column = at + 8 * vector;
      uint32_t entries[4] = {};
      if (row < n && column < d && kept(row)) {
        load_pairs(row, column, vectors, entries);
        if (dtype == DType::kBFloat16)
#pragma unroll
          for (uint32_t& pair : entries) pair = multiply_pair(pair, power_of_two_in(scale[i]));
      }
      store_vector(to.words, to.at(4 * vector, i), entries);
    }
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
