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

// mma.sync m16n8k8; every lane gives its operands and takes its part of the product. Sums are
// truncated to float32, as tensor cores do.
inline void mma_tf32(float (&d)[4], const float (&a)[4], const float (&b)[2]) {
  std::array<float, 6> own;
  std::copy(a, a + 4, own.begin());
  std::copy(b, b + 2, own.begin() + 4);
  for (const float x : own)
    if (x - x == 0 && to_tf32(x) != x) fail("an operand of mma is not a TF32 number");
  const std::array<float, 6>* lanes = gather(own, "mma");
  const int me = int(threadIdx.x) % kWarp;
  for (int e = 0; e < 4; ++e) {
    const int row = me / 4 + e / 2 * 8, column = me % 4 * 2 + e % 2;
    double sum = d[e];
    for (int p = 0; p < 8; ++p) {
      const std::array<float, 6>& left = lanes[row % 8 * 4 + p % 4];
      const std::array<float, 6>& right = lanes[column * 4 + p % 4];
      sum += double(left[row / 8 + p / 4 * 2]) * right[4 + p / 4];
    }
    d[e] = float(sum);
    if (std::fabs(d[e]) > std::fabs(sum)) d[e] = std::nextafter(d[e], 0.0f);
  }
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
