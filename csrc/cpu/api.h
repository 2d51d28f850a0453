// What the CPU kernels offer to the registration code: plain structs and one table of functions
// per instruction set. No torch header, no Python.
#pragma once
#include <cstdint>

namespace mmae {

enum class DType { kFloat32, kFloat64, kBFloat16, kFloat16 };

constexpr int kMaxBatchDims = 62;  // PyTorch's limit of 64 dimensions, less n and d

// A batch of feature matrices z (..., n, d) with any strides, and how their rows are prepared.
struct Features {
  const void* z;
  DType dtype;
  int64_t batch, n, d;
  int64_t row_stride, column_stride;  // in elements
  int batch_dims;
  int64_t batch_sizes[kMaxBatchDims], z_strides[kMaxBatchDims], mask_strides[kMaxBatchDims];
  const bool* mask;  // (..., n), null: all rows kept
  int64_t mask_stride;
  bool normalize, center;

  int64_t k() const { return n <= d ? n : d; }
  bool samples() const { return n <= d; }
};

// Runs body(begin, end, context) over [0, count) on the caller's thread pool.
using Body = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = void (*)(int64_t count, int64_t grain, Body body, void* context);

struct Threads {
  ParallelFor parallel;
  int64_t count;  // how many threads `parallel` uses
};

// Outputs: float32, or float64 where z is float64, contiguous. "weight" (batch, k, k) is the matrix
// W' with grad_z = grad · W' z (samples side) or the projected z W' (features side); null: no
// gradient is wanted.
struct Kernels {
  const char* name;
  int64_t max_eigen;  // largest k of the eigensolver
  // Whether the entropies accept these; of a k above max_eigen they may be NaN where the Gram
  // matrix is indefinite by more than its rounding.
  bool (*serves_entropy)(DType, double alpha, int64_t k);
  void (*coding_rate)(const Features&, double scale, void* value, void* weight, Threads);
  void (*entropy)(const Features&, double alpha, void* value, void* weight, Threads);
  // Of K1 ⊙ K2 (n x n): two views of the same batch, rows and dtype; weights (batch, n, n).
  void (*joint_entropy)(const Features&, const Features&, double alpha, void* value, void* weight1,
                        void* weight2, Threads);
  // Of ready Gram matrices (batch, k, k), float32 or float64; V = dH / dG (batch, k, k).
  void (*gram_entropy)(DType, int64_t batch, int64_t k, double alpha, const void* gram, void* value,
                       void* v, Threads);
  // sum_r f_r v_r v_rᵀ, (batch, k, k), from the eigenvectors v_r, the rows of `vectors`, and f
  // (batch, k): for matrices whose eigenvectors a library found. float32 or float64.
  void (*spectral)(DType, int64_t batch, int64_t k, const void* vectors, const void* f, void* out,
                   Threads);
  // The full symmetric Gram matrix of the given side, with 1 / row norm (batch, n) and the mean
  // row (batch, d) that were applied (mean: zeros unless centred).
  void (*gram)(const Features&, bool samples, void* gram, void* inverse_norm, void* mean, Threads);
  // Gradient of z from that of the Gram matrix, given what `gram` returned.
  void (*gram_bwd)(const Features&, bool samples, const void* grad, const void* gram,
                   const void* inverse_norm, const void* mean, void* grad_z, Threads);
  // From a weight of the given side.
  void (*weight_bwd)(const Features&, bool samples, const void* grad, const void* weight,
                     void* grad_z, Threads);
};

const Kernels& kernels_baseline();
#if defined(__x86_64__)
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();
#endif

}  // namespace mmae
