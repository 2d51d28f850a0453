// Launchers of the Gram matrix and of the backward pass.
#include "launcher.cuh"

namespace mmae {
namespace cuda {

const char* gram(const Features& f, bool samples, bool tf32, void* gram, void* scale, void* mean,
                 Queue queue) {
  CudaLauncher launch(queue);
  dispatch(f.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    launch_gram<T>(launch, f, samples, static_cast<T*>(gram), static_cast<T*>(scale),
                   static_cast<T*>(mean), tf32);
  });
  return launch.error();
}

const char* weight_bwd(const Features& f, const void* grad, const void* weight, void* scale,
                       void* mean, void* grad_z, bool tf32, Queue queue) {
  CudaLauncher launch(queue);
  dispatch(f.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    launch_weight_bwd<T>(launch, f, static_cast<const T*>(grad), static_cast<const T*>(weight),
                         static_cast<T*>(scale), static_cast<T*>(mean), grad_z, tf32);
  });
  return launch.error();
}

}  // namespace cuda
}  // namespace mmae
