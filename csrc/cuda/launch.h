// From a problem to kernel launches: which instantiation, which plan, which grid. The launcher is a
// functor launcher(kernel, blocks, threads, shared_bytes, arguments...), CUDA's in the .cu files
// and the emulator's in the tests, so that both run the same choices.
#pragma once
#include "api.h"
#include "jacobi.cuh"
#include "packed.cuh"
#include "products.cuh"
#include "spectral.cuh"

namespace mmae {
namespace cuda {

// Calls body with a null pointer of the compute type.
template <class F>
void dispatch(DType dtype, const F& body) {
  if (dtype == DType::kFloat64)
    body(static_cast<double*>(nullptr));
  else
    body(static_cast<float*>(nullptr));
}

inline Kernel kernel_of(Measure m) {
  return m.is_rate ? Kernel::kPackedRate : m.alpha == 2 ? Kernel::kPackedRenyi2 : Kernel::kJacobi;
}

inline bool is_fused(Measure m, int64_t k, bool is_double) {
  return (m.is_rate || m.alpha == 2) && k <= (is_double ? kMaxOrderDouble : kMaxOrderFloat);
}

// 16-bit numbers are TF32 numbers, and products of theirs are float32 numbers.
inline bool is_16_bit(DType dtype) { return dtype == DType::kBFloat16 || dtype == DType::kFloat16; }

// How a Gram matrix is made. tf32: permission to round float32 operands.
inline Unit gram_unit(const Features& f, bool samples) {
  return f.dtype == DType::kFloat64                   ? Unit::kDouble
         : samples && !f.center && is_16_bit(f.dtype) ? Unit::kPairs
                                                      : Unit::kFloat;
}

template <int R, int C>
using Split = WarpTile<kSplit, kSplit, R, C>;
template <int R, int C>
using Rounded = WarpTile<kRounded, kRounded, R, C>;

// Which kernel, templates so that only who launches one compiles it.
template <class T>
auto spectral_kernel_of(const SpectralPlan& plan, Unit unit, bool tf32) {
  if constexpr (sizeof(T) == 8) {
    constexpr int kLarge = spectral_plan(kMaxOrderDouble, Unit::kDouble).tile;
    return plan.tile == 4 ? spectral_kernel<T, ThreadTile<T, 4, 4>>
                          : spectral_kernel<T, ThreadTile<T, kLarge, kLarge>>;
  } else if (plan.width == 128) {
    return unit == Unit::kPairs ? spectral_kernel<T, PairTile<2, 8>>
           : tf32               ? spectral_kernel<T, Rounded<2, 8>>
                                : spectral_kernel<T, Split<2, 8>>;
  } else {
    return unit == Unit::kPairs ? spectral_kernel<T, PairTile<2, 2>>
           : tf32               ? spectral_kernel<T, Rounded<2, 2>>
                                : spectral_kernel<T, Split<2, 2>>;
  }
}

template <class T, class L>
void launch_fused(L& launch, const Features& f, Measure m, T* value, T* weight) {
  const Unit unit = gram_unit(f, f.samples());
  const SpectralPlan plan = spectral_plan(f.k(), unit);
  const auto kernel = spectral_kernel_of<T>(plan, unit, m.tf32);
  const Quantity quantity = m.is_rate ? Quantity::kCodingRate : Quantity::kRenyi2;
  launch(kernel, f.batch, plan.threads, plan.shared_bytes, f, plan, quantity, m.scale, value,
         weight);
}

template <class T, class L>
void launch_row_scale(L& launch, const Features& f, T* scale) {
  launch(row_scale_kernel<T>, ceil_div(f.batch * f.n, kMaxThreads / kWarp), kMaxThreads, 0, f,
         scale);
}

template <class T, class L>
void launch_row_mean(L& launch, const Features& f, const T* scale, T* mean) {
  launch(row_mean_kernel<T>, f.batch * ceil_div(f.d, kWarp), kMaxThreads, kMeanShared, f, scale,
         mean);
}

template <class T>
auto gram_kernel_of(Unit unit, bool tf32) {
  if constexpr (sizeof(T) == 8)
    return gram_kernel<T, ThreadTile<T, 4, 4>>;
  else
    return unit == Unit::kPairs ? gram_kernel<T, PairTile<2, 2>>
           : tf32               ? gram_kernel<T, Rounded<2, 2>>
                                : gram_kernel<T, Split<2, 2>>;
}

// tf32: permission to round float32 operands. common: null, or (batch), which makes the scale of
// all rows of a matrix one power of two.
template <class T, class L>
void launch_gram(L& launch, const Features& f, bool samples, T* gram, T* scale, T* mean, bool tf32,
                 T* common = nullptr) {
  const int64_t tiles = ceil_div(samples ? f.n : f.d, ProductPlan::kTile);
  const T* applied = f.center ? mean : nullptr;
  if (common)
    launch(common_scale_kernel<T>, f.batch, kMaxThreads, kCommonShared, f, scale, common);
  else
    launch_row_scale<T>(launch, f, scale);
  launch_row_mean<T>(launch, f, scale, mean);
  const Unit unit = gram_unit(f, samples);
  const ProductPlan plan = product_plan(unit);
  const auto kernel = gram_kernel_of<T>(unit, tf32);
  launch(kernel, f.batch * tiles * tiles, ProductPlan::kThreads, plan.shared_bytes, f, plan,
         samples, static_cast<const T*>(scale), applied, gram);
}

// Of ready Gram matrices: value (batch), weight (batch, k, k) or null. k: their order.
template <class T, class L>
void launch_of_gram(L& launch, const Features& f, const GramInput<T>& in, int64_t k, Measure m,
                    T* value, T* weight) {
  constexpr bool is_double = sizeof(T) == 8;
  if (m.is_rate || m.alpha == 2) {
    const PackedPlan plan = packed_plan(k, is_double, m.is_rate);
    const Quantity quantity = m.is_rate ? Quantity::kCodingRate : Quantity::kRenyi2;
    launch(packed_kernel<T>, f.batch, plan.threads, plan.shared_bytes, f, in, plan, quantity,
           m.scale, value, weight);
  } else {
    const JacobiPlan plan = jacobi_plan(k, is_double);
    const auto kernel =
        plan.threads <= 256 ? jacobi_kernel<T, 256> : jacobi_kernel<T, JacobiPlan::kMaxBlock>;
    launch(kernel, f.batch, plan.threads, plan.shared_bytes, f, in, plan, m.alpha, value, weight);
  }
}

template <class T, class L>
void launch_gram_entropy(L& launch, int64_t batch, int64_t k, const T* g, double alpha, T* value,
                         T* weight) {
  Features f{};  // no features: what the kernel asks of them is the batch and the mask
  f.batch = batch;
  f.n = f.d = k;
  const GramInput<T> in{Side::kGram, g, nullptr, nullptr, nullptr};
  launch_of_gram<T>(launch, f, in, k, {false, 0, alpha, false}, value, weight);
}

// The same of features, k = min(n, d), in one kernel if there is no scratch (is_fused), else by way
// of their Gram matrix.
template <class T, class L>
void launch_measure(L& launch, const Features& f, Measure m, T* value, T* weight, Scratch scratch) {
  if (!scratch.gram || f.k() == 0) return launch_fused<T>(launch, f, m, value, weight);
  T *gram = static_cast<T*>(scratch.gram), *scale = static_cast<T*>(scratch.scale);
  T *mean = static_cast<T*>(scratch.mean), *along = static_cast<T*>(scratch.along);
  T* common = static_cast<T*>(scratch.common);
  const bool samples = f.samples(), whole = m.is_rate || f.normalize;
  if (whole) common = nullptr;
  if (!(samples && f.normalize && f.center && weight)) along = nullptr;
  launch_gram<T>(launch, f, samples, gram, scale, mean, m.tf32, common);
  if (along)
    launch(row_along_kernel<T>, ceil_div(f.batch * f.n, kMaxThreads / kWarp), kMaxThreads, 0, f,
           static_cast<const T*>(scale), static_cast<const T*>(mean), along);
  const GramInput<T> in{samples ? Side::kSamples : Side::kFeatures, gram, scale, along, common};
  launch_of_gram<T>(launch, f, in, f.k(), m, value, weight);
}

// W' Z and Ẑ W': Z of 16 bits enters whole, so that only W' is split; Ẑ likewise where it is Z up
// to powers of two.
template <class T>
auto samples_bwd_kernel_of(DType dtype, bool tf32) {
  if constexpr (sizeof(T) == 8)
    return samples_bwd_kernel<T, ThreadTile<T, 4, 4>>;
  else
    return tf32               ? samples_bwd_kernel<T, Rounded<2, 2>>
           : is_16_bit(dtype) ? samples_bwd_kernel<T, WarpTile<kSplit, kWhole, 2, 2>>
                              : samples_bwd_kernel<T, Split<2, 2>>;
}

template <class T>
auto features_bwd_kernel_of(const RowsPlan& plan, bool whole, bool tf32) {
  if constexpr (sizeof(T) == 8)
    return plan.width == 256 ? features_bwd_kernel<T, ThreadTile<T, 2, 16>>
                             : features_bwd_kernel<T, ThreadTile<T, 2, 6>>;
  else if (plan.width == 256)
    return tf32    ? features_bwd_kernel<T, Rounded<2, 4>>
           : whole ? features_bwd_kernel<T, WarpTile<kWhole, kSplit, 2, 4>>
                   : features_bwd_kernel<T, Split<2, 4>>;
  else
    return tf32    ? features_bwd_kernel<T, Rounded<2, 2>>
           : whole ? features_bwd_kernel<T, WarpTile<kWhole, kSplit, 2, 2>>
                   : features_bwd_kernel<T, Split<2, 2>>;
}

template <class T, class L>
void launch_weight_bwd(L& launch, const Features& f, const T* grad, const T* weight, T* scale,
                       T* mean, void* grad_z, bool tf32) {
  const Unit unit = sizeof(T) == 8 ? Unit::kDouble : Unit::kFloat;
  if (f.samples()) {
    const ProductPlan plan = product_plan(unit);
    const int64_t tiles = ceil_div(f.n, ProductPlan::kTile) * ceil_div(f.d, ProductPlan::kTile);
    launch(samples_bwd_kernel_of<T>(f.dtype, tf32), f.batch * tiles, ProductPlan::kThreads,
           plan.shared_bytes, f, plan, grad, weight, grad_z);
    return;
  }
  const RowsPlan plan = rows_plan(f.d, unit);
  const T* applied = f.center ? mean : nullptr;
  launch_row_scale<T>(launch, f, scale);
  if (f.center) launch_row_mean<T>(launch, f, scale, mean);
  if (f.d == 0) return;
  const bool whole = !f.center && is_16_bit(f.dtype);
  launch(features_bwd_kernel_of<T>(plan, whole, tf32), f.batch * ceil_div(f.n, RowsPlan::kRows),
         RowsPlan::kThreads, plan.shared_bytes, f, plan, grad, weight, static_cast<const T*>(scale),
         applied, grad_z);
}

}  // namespace cuda
}  // namespace mmae
