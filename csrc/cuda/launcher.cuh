// The launcher of launch.h for CUDA: sets the device, enqueues kernels, keeps the first error.
#pragma once
#include <cuda_runtime.h>

#include <climits>
#include <utility>

#include "api.h"
#include "launch.h"

namespace mmae {
namespace cuda {

// What one block may have on this device; without a device, what every GPU gives.
inline int shared_per_block(int device) {
  int bytes = 0;
  const cudaDeviceAttr what = cudaDevAttrMaxSharedMemoryPerBlockOptin;
  if (cudaDeviceGetAttribute(&bytes, what, device) == cudaSuccess) return bytes;
  cudaGetLastError();  // nobody else's error
  return kSharedBudget;
}

class CudaLauncher {
 public:
  explicit CudaLauncher(Queue queue)
      : device_(queue.device), stream_(static_cast<cudaStream_t>(queue.stream)) {
    status_ = cudaGetDevice(&previous_);
    if (status_ == cudaSuccess && previous_ != queue.device) {
      restore_ = true;
      status_ = cudaSetDevice(queue.device);
    }
  }
  CudaLauncher(const CudaLauncher&) = delete;
  CudaLauncher& operator=(const CudaLauncher&) = delete;
  ~CudaLauncher() {
    if (restore_) cudaSetDevice(previous_);
  }

  template <class... P, class... A>
  void operator()(void (*kernel)(P...), int64_t blocks, int threads, int shared_bytes,
                  A... arguments) {
    if (status_ != cudaSuccess || blocks == 0) return;
    if (blocks > INT_MAX) {
      status_ = cudaErrorInvalidConfiguration;
      return;
    }
    // Always the same limit, so that no thread lowers it between this line and another's launch.
    if (shared_bytes > 48 * 1024)
      status_ = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     shared_per_block(device_));
    if (status_ == cudaSuccess) {
      kernel<<<unsigned(blocks), threads, shared_bytes, stream_>>>(arguments...);
      status_ = cudaPeekAtLastError();
    }
    if (status_ != cudaSuccess) cudaGetLastError();  // reported here, and not by the next launch
  }

  const char* error() const {
    return status_ == cudaSuccess ? nullptr : cudaGetErrorString(status_);
  }

 private:
  int device_;
  cudaStream_t stream_;
  cudaError_t status_;
  int previous_ = 0;
  bool restore_ = false;
};

}  // namespace cuda
}  // namespace mmae
