// Launchers of the fused kernel.
#include "launcher.cuh"

namespace mmae {
namespace cuda {

namespace {

const char* spectral(const Features& f, Quantity quantity, double c, void* value, void* weight,
                     Queue queue) {
  CudaLauncher launch(queue);
  dispatch(f.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    launch_spectral<T>(launch, f, quantity, c, static_cast<T*>(value), static_cast<T*>(weight));
  });
  return launch.error();
}

}  // namespace

int64_t max_order(DType dtype) { return max_order(dtype == DType::kFloat64); }

const char* coding_rate(const Features& f, double scale, void* value, void* weight, Queue queue) {
  return spectral(f, Quantity::kCodingRate, scale, value, weight, queue);
}

const char* renyi2(const Features& f, void* value, void* weight, Queue queue) {
  return spectral(f, Quantity::kRenyi2, 0, value, weight, queue);
}

}  // namespace cuda
}  // namespace mmae
