// The ways to multiply what a block has staged in shared memory (Stage, plan.h): by threads in
// registers (float64), or by warps in tensor cores: float32 as TF32 numbers, 16-bit numbers as they
// are. One policy each, with the same members:
//
//     Tile(height, width, dtype)   of a block's product; width_of(height, threads)
//     add(left, right, steps)      sums += left (height x steps) right (steps x width); in words
//     row(e), column(e), sum(e)    a thread's entries, e < kEntries
//     slot(e), row_of_slot(s)      its rows, s < kSlots; sharing() neighbouring lanes share each,
//                                  and as many in other warps, of which this is across()
//     in_triangle(k)               whether its warp has any of the upper triangle, k x k
//     kWholeLeft                   left operands have to be numbers of the tensor cores
#pragma once
#include "device.cuh"

namespace mmae {
namespace cuda {

// A staged operand (Stage) in shared memory, from step `first` on. kRow: words of a row by warps,
// known to the compiler, so that a lane's entries are one address and constants; 0: by threads.
template <class Word, int kRow>
struct Operand {
  Shared<Word> words;
  const int step, first = 0;
  MMAE_DEVICE int at(int p, int i) const { return kRow ? i * kRow + p : p * step + i; }
  MMAE_DEVICE auto operator()(int p, int i) const -> decltype(words[0]) {
    return words[at(first + p, i)];
  }
  MMAE_DEVICE Operand from(int p) const { return {words, step, p}; }
};

// Of a policy of this file; depth: words of a row.
template <class Tile, int kDepth = depth_of(Tile::kUnit)>
MMAE_DEVICE auto operand(const Stage& stage) {
  using Word = typename Tile::Word;
  return Operand<Word, by_warps(Tile::kUnit) ? row_words(kDepth) : 0>{
      shared_array<Word>(stage.offset, stage.count), stage.step};
}

// By the whole block: entry(p, i) of kDepth x width entries that lie along the steps, or along i,
// in global memory.
template <int kDepth, class To, class Entry>
MMAE_DEVICE void stage_rows(const To& to, int width, const Entry& entry) {
#pragma unroll 2
  for (int e = int(threadIdx.x); e < kDepth * width; e += int(blockDim.x))
    to(e % kDepth, e / kDepth) = entry(e % kDepth, e / kDepth);
}
template <int kDepth, class To, class Entry>
MMAE_DEVICE void stage_columns(const To& to, int width, const Entry& entry) {
#pragma unroll 2
  for (int e = int(threadIdx.x); e < kDepth * width; e += int(blockDim.x)) {
    const int p = e / 8 % kDepth, i = e / (8 * kDepth) * 8 + e % 8;
    to(p, i) = entry(p, i);
  }
}

// R x C entries of each of side x side threads: rows ty + side r, columns tx + side c.
template <class T, int R, int C>
struct ThreadTile {
  using Word = T;
  static constexpr Unit kUnit = Unit::kDouble;
  static constexpr int kEntries = R * C, kSlots = R;
  static constexpr bool kWholeLeft = false;
  const int side, ty, tx;
  T sums[R][C] = {};

  MMAE_DEVICE ThreadTile(int, int width, DType)
      : side(width / C), ty(int(threadIdx.x) / side), tx(int(threadIdx.x) % side) {}

  template <class Left, class Right>
  MMAE_DEVICE void add(const Left& left, const Right& right, int steps) {
#pragma unroll 2
    for (int p = 0; p < steps; ++p) {
      T a[R], b[C];
#pragma unroll
      for (int r = 0; r < R; ++r) a[r] = left(p, ty + side * r);
#pragma unroll
      for (int c = 0; c < C; ++c) b[c] = right(p, tx + side * c);
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int c = 0; c < C; ++c) sums[r][c] += a[r] * b[c];
    }
  }
  static constexpr int width_of(int height, int) { return height / R * C; }
  MMAE_DEVICE int row(int e) const { return ty + side * (e / C); }
  MMAE_DEVICE int column(int e) const { return tx + side * (e % C); }
  MMAE_DEVICE T& sum(int e) { return sums[e / C][e % C]; }
  MMAE_DEVICE bool in_triangle(int) const { return true; }
  MMAE_DEVICE static int slot(int e) { return e / C; }
  MMAE_DEVICE int row_of_slot(int s) const { return ty + side * s; }
  MMAE_DEVICE int sharing() const { return side; }
  MMAE_DEVICE int across() const { return 0; }
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
// column g; d at rows g, g, g + 8, g + 8 and columns 2q, 2q + 1, 2q, 2q + 1 (PTX ISA, m16n8k8; the
// same as the layouts of CUTLASS's MMA_Traits<SM80_16x8x8_F32TF32TF32F32_TN>). volatile: the lanes
// execute it together, so that the compiler must not move it under a condition of theirs.
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

// The same of 16 steps of 16-bit numbers, two to a word, the earlier step in the low half: words
// lie as the numbers of mma_tf32 do (PTX ISA, m16n8k16; SM80_16x8x16_F32BF16BF16F32_TN and
// _F32F16F16F32_).
template <bool kBFloat16>
MMAE_DEVICE void mma_pairs(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef __CUDACC__
  if (kBFloat16)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  emulation::mma_pairs(d, a, b, kBFloat16);
#endif
}

// R x C blocks of 16 x 8 entries per warp, warps below each other first. Tensor cores truncate
// where additions round: what is to be exact starts every mma at 0 and is added to the sums.
template <int R, int C>
struct WarpBlocks {
  static constexpr int kEntries = 4 * R * C, kSlots = 2 * R;
  static constexpr int kHeight = 16 * R, kWidth = 8 * C;
  const int g, q, i0, j0;
  float sums[R][C][4] = {};

  MMAE_DEVICE WarpBlocks(int height, int, DType)
      : g(int(threadIdx.x) % kWarp / 4), q(int(threadIdx.x) % 4),
        i0(int(threadIdx.x) / kWarp % (height / kHeight) * kHeight),
        j0(int(threadIdx.x) / kWarp / (height / kHeight) * kWidth) {}

  template <class Left, class Word>
  MMAE_DEVICE void load_left(const Left& left, int p, int r, Word (&a)[4]) const {
#pragma unroll
    for (int e = 0; e < 4; ++e) a[e] = left(p + q + e / 2 * 4, i0 + 16 * r + g + e % 2 * 8);
  }
  template <class Right, class Word>
  MMAE_DEVICE void load_right(const Right& right, int p, int c, Word (&b)[2]) const {
#pragma unroll
    for (int e = 0; e < 2; ++e) b[e] = right(p + q + e * 4, j0 + 8 * c + g);
  }
  static constexpr int width_of(int height, int threads) {
    return threads / kWarp * kHeight / height * kWidth;
  }
  MMAE_DEVICE int row(int e) const { return row_of_slot(slot(e)); }
  MMAE_DEVICE int column(int e) const { return j0 + e / 4 % C * 8 + 2 * q + e % 2; }
  MMAE_DEVICE float& sum(int e) { return sums[e / 4 / C][e / 4 % C][e % 4]; }
  MMAE_DEVICE bool in_triangle(int k) const { return i0 < k && j0 < k && i0 < j0 + kWidth; }

  MMAE_DEVICE static int slot(int e) { return e / 4 / C * 2 + e % 4 / 2; }
  MMAE_DEVICE int row_of_slot(int s) const { return i0 + s / 2 * 16 + g + s % 2 * 8; }
  MMAE_DEVICE int sharing() const { return 4; }
  MMAE_DEVICE int across() const { return j0 / kWidth; }
};

// What a TF32 product takes of a float32 operand. kWhole: it is a TF32 number (every 16-bit number
// is one). kRounded: the nearest one. kSplit: x = high + low / kLowScale, both TF32; low is scaled
// so that it keeps its bits where x is small.
enum Part { kWhole, kRounded, kSplit };
constexpr float kLowScale = 2048;

// Products of TF32 numbers: 1, or 2 where one operand is split, or 3 where both are: high high +
// high low + low high, which is what float32 products are up to 2^-21.
template <int kLeft, int kRight, int R, int C>
struct WarpTile : WarpBlocks<R, C> {
  using Word = float;
  using WarpBlocks<R, C>::WarpBlocks;
  static constexpr Unit kUnit = Unit::kFloat;
  static constexpr bool kWholeLeft = kLeft == kWhole;

  template <int kPart, int N>
  MMAE_DEVICE static void split(float (&x)[N], float (&low)[N]) {
#pragma unroll
    for (int e = 0; e < N; ++e) {
      const float high = kPart == kWhole ? x[e] : to_tf32(x[e]);
      low[e] = kPart == kSplit ? to_tf32((x[e] - high) * kLowScale) : 0;
      x[e] = high;
    }
  }

  template <class Left, class Right>
  MMAE_DEVICE void add(const Left& left, const Right& right, int steps) {
#pragma unroll 1
    for (int p = 0; p < steps; p += 8) {
      float a[R][4], a_low[R][4];
#pragma unroll
      for (int r = 0; r < R; ++r) {
        this->load_left(left, p, r, a[r]);
        split<kLeft>(a[r], a_low[r]);
      }
#pragma unroll
      for (int c = 0; c < C; ++c) {
        float b[2], b_low[2];
        this->load_right(right, p, c, b);
        split<kRight>(b, b_low);
#pragma unroll
        for (int r = 0; r < R; ++r) {
          float (&sums)[4] = this->sums[r][c];
          if (kLeft != kSplit && kRight != kSplit) {  // rounded: they err by more than truncation
            mma_tf32(sums, a[r], b);
            continue;
          }
          float product[4] = {};  // the small ones first
          if (kLeft == kSplit) mma_tf32(product, a_low[r], b);
          if (kRight == kSplit) mma_tf32(product, a[r], b_low);
#pragma unroll
          for (int e = 0; e < 4; ++e) product[e] *= 1 / kLowScale;
          mma_tf32(product, a[r], b);
#pragma unroll
          for (int e = 0; e < 4; ++e) sums[e] += product[e];
        }
      }
    }
  }
};

// Exact products of 16-bit numbers; a step is a word of two.
template <int R, int C>
struct PairTile : WarpBlocks<R, C> {
  using Word = uint32_t;
  static constexpr Unit kUnit = Unit::kPairs;
  static constexpr bool kWholeLeft = true;
  const bool bfloat16;

  MMAE_DEVICE PairTile(int height, int width, DType dtype)
      : WarpBlocks<R, C>(height, width, dtype), bfloat16(dtype == DType::kBFloat16) {}

  template <bool kBFloat16, class Left, class Right>
  MMAE_DEVICE void add_as(const Left& left, const Right& right, int steps) {
#pragma unroll 1
    for (int p = 0; p < steps; p += 8) {
      uint32_t a[R][4];
#pragma unroll
      for (int r = 0; r < R; ++r) this->load_left(left, p, r, a[r]);
#pragma unroll
      for (int c = 0; c < C; ++c) {
        uint32_t b[2];
        this->load_right(right, p, c, b);
#pragma unroll
        for (int r = 0; r < R; ++r) {
          float (&sums)[4] = this->sums[r][c];
          float product[4] = {};
          mma_pairs<kBFloat16>(product, a[r], b);
#pragma unroll
          for (int e = 0; e < 4; ++e) sums[e] += product[e];
        }
      }
    }
  }
  template <class Left, class Right>
  MMAE_DEVICE void add(const Left& left, const Right& right, int steps) {
    if (bfloat16)
      add_as<true>(left, right, steps);
    else
      add_as<false>(left, right, steps);
  }
};

}  // namespace cuda
}  // namespace mmae
