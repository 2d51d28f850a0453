// The two ways to multiply a staged step of a kTile x kTile product: by threads in registers (FFMA,
// DFMA), or by warps in tensor cores. Both hold 16 entries per thread in two levels: `sums` are
// added to `total` by flush().
#pragma once
#include "device.cuh"

namespace mmae {
namespace cuda {

// One thread's 4 x 4 entries: rows ty + 16 r, columns tx + 16 c.
template <class T>
struct ThreadTile {
  static constexpr int R = ProductPlan::kRegister, kSide = ProductPlan::kSide, kEntries = R * R;
  static constexpr int kFlush = kFlushDepth;
  const int depth, ty, tx;
  T sums[R][R] = {}, total[R][R] = {};

  MMAE_DEVICE ThreadTile(const ProductPlan& plan, bool)
      : depth(plan.depth), ty(int(threadIdx.x) / kSide), tx(int(threadIdx.x) % kSide) {}

  // Where entry (step p, row or column i) of an operand lies.
  MMAE_DEVICE int at(int p, int i) const { return p * ProductPlan::kThreadStride + i; }

  MMAE_DEVICE void add(Shared<T> left, Shared<T> right) {
#pragma unroll 2
    for (int p = 0; p < depth; ++p) {
      T a[R], b[R];
#pragma unroll
      for (int r = 0; r < R; ++r) {
        a[r] = left[at(p, ty + kSide * r)];
        b[r] = right[at(p, tx + kSide * r)];
      }
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int c = 0; c < R; ++c) sums[r][c] += a[r] * b[c];
    }
  }
  MMAE_DEVICE void flush() {
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int c = 0; c < R; ++c) {
        total[r][c] += sums[r][c];
        sums[r][c] = 0;
      }
  }
  MMAE_DEVICE int row(int e) const { return ty + kSide * (e / R); }
  MMAE_DEVICE int column(int e) const { return tx + kSide * (e % R); }
  MMAE_DEVICE T value(int e) const { return total[e / R][e % R]; }
};

// x to the nearest TF32 number (10 bits of mantissa), ties away from zero.
MMAE_DEVICE float to_tf32(float x) {
#ifdef __CUDACC__
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return __uint_as_float(bits);
#else
  return emulation::to_tf32(x);
#endif
}

// By a warp: d (16 x 8) += a (16 x 8) b (8 x 8) of TF32 numbers. With g = lane / 4, q = lane % 4 a
// lane holds a at rows g, g + 8, g, g + 8 and columns q, q, q + 4, q + 4; b at rows q, q + 4 and
// column g; d at rows g, g, g + 8, g + 8 and columns 2q, 2q + 1, 2q, 2q + 1 (PTX ISA, m16n8k8).
MMAE_DEVICE void mma_tf32(float (&d)[4], const float (&a)[4], const float (&b)[2]) {
#ifdef __CUDACC__
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])),
        "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
#else
  emulation::mma_tf32(d, a, b);
#endif
}

// One warp's 32 x 16 entries, 8 warps. kPasses = 1: operands rounded to TF32; 3: each in two parts,
// x = hi + lo, and hi hi + hi lo + lo hi, which is what float32 products are up to 2^-21. Tensor
// cores truncate their sums where additions round: 16 truncations, then an addition.
template <int kPasses>
struct WarpTile {
  static constexpr int kEntries = 16, kFlush = 128;
  const int g, q, i0, j0;
  const int row_stride, step_stride;
  float sums[2][2][4] = {}, total[2][2][4] = {};

  // Samples: z is read along rows, so that neighbours in p are written at once; features: along
  // columns. Either way the lanes of a warp read 32 different banks.
  MMAE_DEVICE WarpTile(const ProductPlan&, bool samples)
      : g(int(threadIdx.x) % kWarp / 4), q(int(threadIdx.x) % 4),
        i0(int(threadIdx.x) / kWarp % 2 * 32), j0(int(threadIdx.x) / kWarp / 2 * 16),
        row_stride(samples ? ProductPlan::kWarpDepth + 4 : 1),
        step_stride(samples ? 1 : ProductPlan::kTile + 8) {}

  MMAE_DEVICE int at(int p, int i) const { return p * step_stride + i * row_stride; }

  template <int N>
  MMAE_DEVICE static void split(float (&x)[N], float (&low)[N]) {
#pragma unroll
    for (int e = 0; e < N; ++e) {
      const float high = to_tf32(x[e]);
      if (kPasses == 3) low[e] = to_tf32(x[e] - high);
      x[e] = high;
    }
  }

  MMAE_DEVICE void add(Shared<float> left, Shared<float> right) {
#pragma unroll 1
    for (int p = 0; p < ProductPlan::kWarpDepth; p += 8) {
      float a[2][4], b[2][2], a_low[2][4], b_low[2][2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (int e = 0; e < 4; ++e)
          a[r][e] = left[at(p + q + e / 2 * 4, i0 + 16 * r + g + e % 2 * 8)];
        split(a[r], a_low[r]);
#pragma unroll
        for (int e = 0; e < 2; ++e) b[r][e] = right[at(p + q + e * 4, j0 + 8 * r + g)];
        split(b[r], b_low[r]);
      }
#pragma unroll
      for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          mma_tf32(sums[r][c], a[r], b[c]);
          if (kPasses == 3) {  // apart: each mma truncates what it adds to
            float small[4] = {};
            mma_tf32(small, a_low[r], b[c]);
            mma_tf32(small, a[r], b_low[c]);
#pragma unroll
            for (int e = 0; e < 4; ++e) sums[r][c][e] += small[e];
          }
        }
    }
  }
  MMAE_DEVICE void flush() {
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int c = 0; c < 2; ++c)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          total[r][c][e] += sums[r][c][e];
          sums[r][c][e] = 0;
        }
  }
  MMAE_DEVICE int row(int e) const { return i0 + e / 8 * 16 + g + e % 4 / 2 * 8; }
  MMAE_DEVICE int column(int e) const { return j0 + e / 4 % 2 * 8 + 2 * q + e % 2; }
  MMAE_DEVICE float value(int e) const { return total[e / 8][e / 4 % 2][e % 4]; }
};

}  // namespace cuda
}  // namespace mmae
