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

template <class T, class L>
void launch_fused(L& launch, const Features& f, Measure m, T* value, T* weight) {
  constexpr bool is_double = sizeof(T) == 8;
  const SpectralPlan plan = spectral_plan(f.k(), is_double);
  const auto kernel = plan.tile == 4 ? spectral_kernel<T, 4>
                                     : spectral_kernel<T, spectral_plan(65, is_double).tile>;
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

// 16-bit numbers are TF32 numbers, so one pass multiplies them as they are.
inline bool is_16_bit(DType dtype) { return dtype == DType::kBFloat16 || dtype == DType::kFloat16; }

inline auto gram_kernel_of(double*, bool) { return gram_kernel<double, ThreadTile<double>>; }
inline auto gram_kernel_of(float*, bool one_pass) {
  return one_pass ? gram_kernel<float, WarpTile<1>> : gram_kernel<float, WarpTile<3>>;
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
  const bool exact = samples && !f.center && is_16_bit(f.dtype);
  const ProductPlan plan = product_plan(sizeof(T) == 8, sizeof(T) == 4);
  const auto kernel = gram_kernel_of(static_cast<T*>(nullptr), exact || tf32);
  launch(kernel, f.batch * tiles * tiles, ProductPlan::kThreads, plan.shared_bytes, f, plan,
         samples, exact, static_cast<const T*>(scale), applied, gram);
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

template <class T, class L>
void launch_weight_bwd(L& launch, const Features& f, const T* grad, const T* weight, T* scale,
                       T* mean, void* grad_z) {
  constexpr bool is_double = sizeof(T) == 8;
  if (f.samples()) {
    const ProductPlan plan = product_plan(is_double, false);
    const int64_t tiles = ceil_div(f.n, ProductPlan::kTile) * ceil_div(f.d, ProductPlan::kTile);
    launch(samples_bwd_kernel<T>, f.batch * tiles, ProductPlan::kThreads, plan.shared_bytes, f,
           plan, grad, weight, grad_z);
    return;
  }
  const RowsPlan plan = rows_plan(f.d, is_double);
  const T* applied = f.center ? mean : nullptr;
  launch_row_scale<T>(launch, f, scale);
  if (f.center) launch_row_mean<T>(launch, f, scale, mean);
  if (f.d == 0) return;
  const auto kernel = rows_tile(f.d, is_double) == 16
                          ? features_bwd_kernel<T, 16>
                          : features_bwd_kernel<T, rows_tile(1, is_double)>;
  launch(kernel, f.batch * ceil_div(f.n, RowsPlan::kRows), RowsPlan::kThreads, plan.shared_bytes, f,
         plan, grad, weight, static_cast<const T*>(scale), applied, grad_z);
}

}  // namespace cuda
}  // namespace mmae
