// What the CUDA kernels offer to the registration code: plain pointers into device memory, a device
// and a stream. No torch header, no CUDA header. Every call only enqueues work on the stream; it
// returns null, or the message of the CUDA runtime's error.
#pragma once
#include "cpu/api.h"

namespace mmae {
namespace cuda {

struct Queue {
  int device;
  void* stream;  // cudaStream_t
};

// Largest k = min(n, d) of coding_rate and renyi2, and largest d of weight_bwd where d < n.
int64_t max_order(DType dtype);

// Outputs: float32, or float64 where z is float64, contiguous. value (batch); weight W' (batch, k,
// k), null: no gradient is wanted.
const char* coding_rate(const Features&, double scale, void* value, void* weight, Queue);
const char* renyi2(const Features&, void* value, void* weight, Queue);
// gram (batch, k, k) of the given side, with scale (batch, n) and mean row (batch, d; zeros unless
// centred) that were applied.
const char* gram(const Features&, bool samples, void* gram, void* scale, void* mean, Queue);
// grad (batch), weight (batch, k, k) → grad_z (batch, n, d) in z's type. scale (batch, n) and mean
// (batch, d) are scratch for the features side.
const char* weight_bwd(const Features&, const void* grad, const void* weight, void* scale,
                       void* mean, void* grad_z, Queue);

}  // namespace cuda
}  // namespace mmae
