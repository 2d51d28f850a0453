// Launchers of the functions of a Gram matrix.
#include "launcher.cuh"

namespace mmae {
namespace cuda {

int64_t max_order(DType dtype, Measure m, int device) {
  const bool is_double = dtype == DType::kFloat64;
  return max_order(kernel_of(m), is_double, shared_per_block(device));
}

int64_t max_columns() { return kMaxOrder; }

bool needs_scratch(DType dtype, int64_t k, Measure m) {
  return !is_fused(m, k, dtype == DType::kFloat64);
}

const char* measure(const Features& f, Measure m, void* value, void* weight, Scratch scratch,
                    Queue queue) {
  CudaLauncher launch(queue);
  dispatch(f.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    launch_measure<T>(launch, f, m, static_cast<T*>(value), static_cast<T*>(weight), scratch);
  });
  return launch.error();
}

const char* gram_entropy(DType dtype, int64_t batch, int64_t k, const void* g, double alpha,
                         void* value, void* weight, Queue queue) {
  CudaLauncher launch(queue);
  dispatch(dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    launch_gram_entropy<T>(launch, batch, k, static_cast<const T*>(g), alpha,
                           static_cast<T*>(value), static_cast<T*>(weight));
  });
  return launch.error();
}

}  // namespace cuda
}  // namespace mmae
