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

// A function of a Gram matrix: the coding rate with this scale, or the entropy of order alpha.
struct Measure {
  bool is_rate;
  double scale, alpha;
  bool tf32;  // whether the Gram matrix may be made of rows rounded to TF32
};

// Largest k = min(n, d) that measure() takes on this device, and order that gram_entropy() takes.
int64_t max_order(DType dtype, Measure, int device);
// Largest d of weight_bwd where d < n.
int64_t max_columns();
// Whether measure() needs scratch; else gram is null, and one kernel goes from features to weight.
bool needs_scratch(DType dtype, int64_t k, Measure);

// gram (batch, k, k), scale and along (batch, n), mean (batch, d), common (batch).
struct Scratch {
  void *gram, *scale, *mean, *along, *common;
};

// Outputs: float32, or float64 where z is float64, contiguous. value (batch); weight W' (batch, k,
// k), null: no gradient is wanted.
const char* measure(const Features&, Measure, void* value, void* weight, Scratch, Queue);
// Of ready Gram matrices g (batch, k, k), contiguous, float32 or float64; the weight is dH/dG.
const char* gram_entropy(DType dtype, int64_t batch, int64_t k, const void* g, double alpha,
                         void* value, void* weight, Queue);
// gram (batch, k, k) of the given side, with scale (batch, n) and mean row (batch, d; zeros unless
// centred) that were applied.
const char* gram(const Features&, bool samples, bool tf32, void* gram, void* scale, void* mean,
                 Queue);
// grad (batch), weight (batch, k, k) → grad_z (batch, n, d) in z's type. scale (batch, n) and mean
// (batch, d) are scratch for the features side. tf32: whether weight and rows may be rounded to
// TF32.
const char* weight_bwd(const Features&, const void* grad, const void* weight, void* scale,
                       void* mean, void* grad_z, bool tf32, Queue);

// Whether the vendor's batched eigensolver is loaded in this process.
bool has_solver();

// Symmetric a (batch, k, k) → ascending lam (batch, k) and, if wanted, eigenvectors in the rows of
// a, which is overwritten in any case; info (batch): not 0 where it failed. All in device memory.
struct Eigh {
  DType dtype;
  int64_t batch, k;
  bool want_vectors;
  void *a, *lam, *work;
  int* info;
};
// Without work: the bytes it needs. The vendor does not promise that it can be captured in a graph.
const char* eigh(const Eigh&, Queue, size_t* device_bytes);

}  // namespace cuda
}  // namespace mmae
