// Ready Gram matrices to (value, W') for coding rate and Rényi-2, one block per matrix, k <= 256:
// the matrices that the fused kernel (spectral.cuh) has no room for.
//
//     coding rate:  A = I + cG as a packed lower triangle in shared memory, swept in place
//     Rényi-2:      V = 2 / tr G · I - 2 / ||G||² · G, entry by entry; no matrix in shared memory
//
// G comes from the tiled product (products.cuh) by way of global memory, k² written and read twice:
// it fits the L2 cache. A packed triangle of k = 197 takes 78 KB, so that two blocks share a
// multiprocessor and 256 matrices are one wave on 132 of them.
#pragma once
#include "fold.cuh"
#include "sweep.cuh"

namespace mmae {
namespace cuda {

template <class T, class V>
MMAE_DEVICE void write_weight(const GramInput<T>& in, const RowData<T>& rows, int64_t index,
                              const V& v, T* weight) {
  const int k = rows.k;
  if (in.side == Side::kSamples) {
    const T* g = in.g + index * k * k;
    fold_samples<T>(rows, v, [&](int i, int j) { return g[int64_t(i) * k + j]; }, weight);
  } else {
    const T common = in.common ? in.common[index] : T(1);
    write_matrix<T>(k, in.side == Side::kGram ? T(1) : 2 * common * common, v, weight);
  }
}

// in.g (batch, k, k); value (batch); weight (batch, k, k) or null. Grid: one block per matrix,
// plan.threads threads, plan.shared_bytes of shared memory. c: coding rate only.
template <class T>
__global__ void __launch_bounds__(kPackedThreads)
    packed_kernel(const Features f, const GramInput<T> in, const PackedPlan plan, Quantity quantity,
                  double c, T* value, T* weight) {
  const int64_t index = blockIdx.x, entries = int64_t(plan.k) * plan.k;
  const int k = plan.k, t = int(threadIdx.x);
  const T* g = in.g + index * entries;
  if (weight) weight += index * entries;
  const RowData<T> rows = load_rows<T>(f, in, plan, index);
  const double tau = trace_of(g, k, rows.partial);  // its barriers complete the rows
  if (quantity == Quantity::kRenyi2 && tau == 0) {  // entropy 0 by convention
    if (t == 0) value[index] = 0;
    if (weight) fill(weight, entries, T(0));
    return;
  }
  double h = quiet_nan<double>(), norm2 = 1;
  if (is_finite(tau) && quantity == Quantity::kCodingRate) {
    const auto entry = [&](int i, int j) {
      return T(c) * g[int64_t(j) * k + i] + (i == j ? T(1) : T(0));
    };
    h = sweep<T>(k, shared_array<T>(plan.triangle, k * (k + 1) / 2), PackedRows{}, entry,
                 weight != nullptr, shared_array<T>(plan.columns, 2 * k),
                 shared_array<T>(plan.pivot, k), rows.partial);
  } else if (is_finite(tau)) {
    double part = 0;
    for (int64_t e = t; e < entries; e += int(blockDim.x)) part += double(g[e]) * g[e];
    norm2 = block_reduce(part, Sum{}, rows.partial);
    h = 2 * log(tau) - log(norm2);
  }
  const bool good = is_finite(h);
  if (t == 0) value[index] = good ? T(h) : quiet_nan<T>();
  if (!weight) return;
  if (!good) {
    fill(weight, entries, quiet_nan<T>());
  } else if (quantity == Quantity::kCodingRate) {
    const Shared<T> a = shared_array<T>(plan.triangle, k * (k + 1) / 2);
    const T factor = -T(c);
    write_weight<T>(
        in, rows, index, [&](int i, int j) { return factor * a[lower(PackedRows{}, i, j)]; },
        weight);
  } else {
    const T factor = T(-2 / norm2), shift = T(2 / tau);
    write_weight<T>(
        in, rows, index,
        [&](int i, int j) { return factor * g[int64_t(i) * k + j] + (i == j ? shift : T(0)); },
        weight);
  }
}

}  // namespace cuda
}  // namespace mmae
