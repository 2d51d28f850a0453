// CUDA on the host, for tests: enough of the language for csrc/cuda/*.cuh. The threads of a block
// are fibers whose every access to shared memory is checked (fibers.h), or, under ThreadSanitizer,
// threads (threads.h). Either offers
//   thread_index(), block()      who runs, and where
//   barrier(file, line)          __syncthreads; one can be switched off, which must make a kernel
//                                fail that needs it
//   gather(x, what)            x of every lane of the warp; no order of memory, as in CUDA
//   Shared<T>, shared_array<T>   shared memory
//   fail(reason), Launcher
#pragma once
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>

#define __global__ inline
#define __launch_bounds__(...)
#define __syncthreads() emulation::barrier(__FILE__, __LINE__)
#define __shfl_xor_sync(mask, x, lane) emulation::shuffle_xor(x, lane)
#define __reduce_max_sync(mask, x) emulation::reduce_max(x)
#define threadIdx (emulation::thread_index())
#define blockIdx (emulation::block().block_index)
#define blockDim (emulation::block().block_size)
#define MMAE_ASSERT(condition) \
  if (!(condition))            \
  emulation::fail(#condition " does not hold at " + emulation::place(__FILE__, __LINE__))

namespace emulation {

constexpr int kWarp = 32;
constexpr size_t kSlot = 64;  // bytes of the largest gather per lane

struct Index {
  unsigned x;
};

inline std::string place(const char* file, int line) {
  const char* name = std::strrchr(file, '/');
  return std::string(name ? name + 1 : file) + ":" + std::to_string(line);
}

}  // namespace emulation

#ifdef __SANITIZE_THREAD__
#include "threads.h"
#else
#include "fibers.h"
#endif

namespace emulation {

inline float from_bits(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline uint32_t to_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}

// cvt.rna.tf32.f32.
inline float to_tf32(float x) {
  return x - x == 0 ? from_bits((to_bits(x) + 0x1000) & ~0x1fffu) : x;
}

inline double shuffle_xor(double x, int other) {
  return gather(x, "shuffle")[int(threadIdx.x) % kWarp ^ other];
}

inline uint32_t reduce_max(uint32_t x) {
  const uint32_t* lanes = gather(x, "reduce");
  return *std::max_element(lanes, lanes + kWarp);
}

// A sum as tensor cores make it, and the least exact of those of which it is known (A100;
// arXiv:2512.07004): terms are truncated one bit below float32's last of the largest, added, and
// the sum is truncated to float32. H100 keeps one bit more.
template <size_t kTerms>
float truncated_sum(const std::array<double, kTerms>& terms) {
  double sum = 0, largest = 0;
  for (const double term : terms) {
    sum += term;
    largest = std::max(largest, std::fabs(term));
  }
  if (sum - sum == 0 && largest > 0) {  // finite; in units of that bit, exactly
    uint64_t bits;
    std::memcpy(&bits, &largest, 8);
    bits &= ~uint64_t(0) << 52;  // no mantissa: the power of two
    double unit;
    std::memcpy(&unit, &bits, 8);
    unit *= 0x1p-24;
    const double per_unit = 1 / unit;
    int64_t units = 0;
    for (const double term : terms) units += int64_t(term * per_unit);
    sum = double(units) * unit;
  }
  const float rounded = float(sum);
  return std::fabs(rounded) > std::fabs(sum) ? std::nextafter(rounded, 0.0f) : rounded;
}

// mma.sync: every lane gives its operands, 4 words of the left and 2 of the right, and takes its
// part d of the product. Word w of an operand is at row or column lane / 4 (+ 8) and at word lane %
// 4 (+ 4) of a row of 8; value(word, half) is a number in it, of kHalves. The products of each half
// of the words are added to d at once.
template <int kHalves, class Value>
void mma(float (&d)[4], const std::array<uint32_t, 6>& own, const Value& value) {
  const std::array<uint32_t, 6>* lanes = gather(own, "mma");
  const int me = int(threadIdx.x) % kWarp;
  for (int e = 0; e < 4; ++e) {
    const int row = me / 4 + e / 2 * 8, column = me % 4 * 2 + e % 2;
    for (int p = 0; p < 8; p += 4) {
      std::array<double, 1 + 4 * kHalves> terms{d[e]};
      for (int at = 0; at < 4 * kHalves; ++at) {
        const uint32_t left = lanes[row % 8 * 4 + at / kHalves][row / 8 + p / 2];
        const uint32_t right = lanes[column * 4 + at / kHalves][4 + p / 4];
        terms[1 + at] = value(left, at % kHalves) * value(right, at % kHalves);
      }
      d[e] = truncated_sum(terms);
    }
  }
}

inline void mma_tf32(float (&d)[4], const float (&a)[4], const float (&b)[2]) {
  std::array<uint32_t, 6> own;
  std::transform(a, a + 4, own.begin(), to_bits);
  std::transform(b, b + 2, own.begin() + 4, to_bits);
  for (const uint32_t word : own) {
    const float x = from_bits(word);
    if (x - x == 0 && to_tf32(x) != x) fail("an operand of mma is not a TF32 number");
  }
  mma<1>(d, own, [](uint32_t word, int) { return double(from_bits(word)); });
}

inline void load_vector(const void* p, uint32_t (&words)[4]) {
  if (reinterpret_cast<uintptr_t>(p) % 16) fail("a vector is not aligned");
  std::memcpy(words, p, 16);
}

}  // namespace emulation

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) {
  return emulation::from_bits(uint32_t(x.bits) << 16);
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const uint32_t u = emulation::to_bits(x);
  return {uint16_t(x != x ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16)};
}
inline float __half2float(__half x) {
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  float value = exponent ? std::ldexp(float(1024 + fraction), exponent - 25)
                         : std::ldexp(float(fraction), -24);
  if (exponent == 31) value = fraction ? NAN : INFINITY;
  return x.bits >> 15 ? -value : value;
}
inline __half __float2half_rn(float x) {
  const uint16_t sign = uint16_t(emulation::to_bits(x) >> 16 & 0x8000);
  const float magnitude = std::fabs(x);
  if (x != x) return {0x7fff};
  if (magnitude >= 65520) return {uint16_t(sign | 0x7c00)};
  const int exponent = magnitude > 0 ? std::max(std::ilogb(magnitude), -14) : -14;
  // In units of the last place, rounded to nearest even; a carry moves into the exponent by itself.
  const int units = int(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
  return {uint16_t(sign | (units + (exponent + 14) * 1024))};
}

namespace emulation {

inline float number(uint32_t word, int half, bool bfloat16) {
  const uint16_t bits = uint16_t(half ? word >> 16 : word);
  return bfloat16 ? __bfloat162float({bits}) : __half2float({bits});
}

inline void mma_pairs(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                      bool bfloat16) {
  mma<2>(d, {a[0], a[1], a[2], a[3], b[0], b[1]},
         [=](uint32_t word, int half) { return double(number(word, half, bfloat16)); });
}

inline uint32_t multiply_pair(uint32_t pair, float factor) {
  const __nv_bfloat16 low = __float2bfloat16_rn(number(pair, 0, true) * factor);
  const __nv_bfloat16 high = __float2bfloat16_rn(number(pair, 1, true) * factor);
  return low.bits | uint32_t(high.bits) << 16;
}

}  // namespace emulation
