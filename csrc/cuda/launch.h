// From a problem to kernel launches: which instantiation, which plan, which grid. The launcher is a
// functor launcher(kernel, blocks, threads, shared_bytes, arguments...), CUDA's in the .cu files
// and the emulator's in the tests, so that both run the same choices.
#pragma once
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

template <class T, class L>
void launch_spectral(L& launch, const Features& f, Quantity quantity, double c, T* value,
                     T* weight) {
  constexpr bool is_double = sizeof(T) == 8;
  const SpectralPlan plan = spectral_plan(f.k(), is_double);
  const auto kernel = plan.tile == 4 ? spectral_kernel<T, 4>
                                     : spectral_kernel<T, spectral_plan(65, is_double).tile>;
  launch(kernel, f.batch, plan.threads, plan.shared_bytes, f, plan, quantity, c, value, weight);
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

template <class T, class L>
void launch_gram(L& launch, const Features& f, bool samples, T* gram, T* scale, T* mean) {
  const ProductPlan plan = product_plan(sizeof(T) == 8);
  const int64_t tiles = ceil_div(samples ? f.n : f.d, ProductPlan::kTile);
  const T* applied = f.center ? mean : nullptr;
  launch_row_scale<T>(launch, f, scale);
  launch_row_mean<T>(launch, f, scale, mean);
  launch(gram_kernel<T>, f.batch * tiles * tiles, ProductPlan::kThreads, plan.shared_bytes, f, plan,
         samples, static_cast<const T*>(scale), applied, gram);
}

template <class T, class L>
void launch_weight_bwd(L& launch, const Features& f, const T* grad, const T* weight, T* scale,
                       T* mean, void* grad_z) {
  constexpr bool is_double = sizeof(T) == 8;
  if (f.samples()) {
    const ProductPlan plan = product_plan(is_double);
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
  launch(features_bwd_kernel<T, rows_tile(is_double)>, f.batch * ceil_div(f.n, RowsPlan::kRows),
         RowsPlan::kThreads, plan.shared_bytes, f, plan, grad, weight, static_cast<const T*>(scale),
         applied, grad_z);
}

}  // namespace cuda
}  // namespace mmae
