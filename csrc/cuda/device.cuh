// What the kernels ask of their platform: storage types, shared memory, reductions. Under nvcc it
// is CUDA; under a host compiler the header cuda_emulation.h of tests/cuda_emulation provides the
// same names, with a fiber per thread and checks on every access to shared memory, or with threads
// for ThreadSanitizer.
#pragma once
#include <cmath>
#include <cstdint>
#include <limits>

#include "plan.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define MMAE_DEVICE __device__ __forceinline__
#define MMAE_ASSERT(condition)
#else
#include "cuda_emulation.h"
#define MMAE_DEVICE inline
#endif

namespace mmae {
namespace cuda {

#ifdef __CUDACC__
template <class T>
using Shared = T*;

// The array of `count` elements at a byte offset of the block's dynamic shared memory.
template <class T>
MMAE_DEVICE Shared<T> shared_array(int offset, int count) {
  extern __shared__ __align__(16) unsigned char dynamic_shared[];
  (void)count;
  return reinterpret_cast<T*>(dynamic_shared + offset);
}
#else
using emulation::Shared;
using emulation::shared_array;
#endif

// Entry `at` of an array of storage type dtype, as the compute type: float64 of float64, else
// float32. The type is a run-time choice, the same for all threads: a branch per entry, and a third
// of the kernels to compile.
template <class T>
MMAE_DEVICE T load(const void* p, DType dtype, int64_t at);
template <>
MMAE_DEVICE double load(const void* p, DType, int64_t at) {
  return static_cast<const double*>(p)[at];
}
template <>
MMAE_DEVICE float load(const void* p, DType dtype, int64_t at) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(p)[at];
  if (dtype == DType::kBFloat16) return __bfloat162float(static_cast<const __nv_bfloat16*>(p)[at]);
  return __half2float(static_cast<const __half*>(p)[at]);
}

MMAE_DEVICE void store(void* p, DType, int64_t at, double x) { static_cast<double*>(p)[at] = x; }
MMAE_DEVICE void store(void* p, DType dtype, int64_t at, float x) {
  if (dtype == DType::kFloat32)
    static_cast<float*>(p)[at] = x;
  else if (dtype == DType::kBFloat16)
    static_cast<__nv_bfloat16*>(p)[at] = __float2bfloat16_rn(x);
  else
    static_cast<__half*>(p)[at] = __float2half_rn(x);
}

template <class T>
MMAE_DEVICE T quiet_nan() {
  return std::numeric_limits<T>::quiet_NaN();
}

MMAE_DEVICE uint32_t float_bits(float x) {
#ifdef __CUDACC__
  return __float_as_uint(x);
#else
  return emulation::to_bits(x);
#endif
}

MMAE_DEVICE float bits_float(uint32_t x) {
#ifdef __CUDACC__
  return __uint_as_float(x);
#else
  return emulation::from_bits(x);
#endif
}

// Neither NaN nor Inf.
MMAE_DEVICE bool is_finite(double x) { return x - x == 0; }

struct Sum {
  MMAE_DEVICE double operator()(double a, double b) const { return a + b; }
};
struct MaxOrNaN {  // commutative, also where an operand is NaN
  MMAE_DEVICE double operator()(double a, double b) const { return b > a || b != b ? b : a; }
};

// Over groups of 2 * `first` neighbouring lanes. Every lane gets the same bits: both operators are
// commutative, and the tree is the same seen from every lane.
template <class Op>
MMAE_DEVICE double warp_reduce(double x, Op op, int first = kWarp / 2) {
  for (int lane = first; lane > 0; lane /= 2) x = op(x, __shfl_xor_sync(0xffffffffu, x, lane));
  return x;
}

// Over the block, in a fixed order; every thread gets the result. partial: (warps).
template <class Op>
MMAE_DEVICE double block_reduce(double x, Op op, Shared<double> partial) {
  const int warps = int(blockDim.x) / kWarp;
  x = warp_reduce(x, op);
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = x;
  __syncthreads();  // partial is complete, and so is all that was written before the call
  x = partial[0];
  for (int w = 1; w < warps; ++w) x = op(x, partial[w]);
  __syncthreads();  // everyone has read partial: the next reduction may write it
  return x;
}

}  // namespace cuda
}  // namespace mmae
