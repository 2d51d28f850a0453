// From V = d value / dG to the weight W' of the backward pass, inside one block:
//
//     samples side   W' = 2 D⁻¹ (C - Diag(s)) D⁻¹,  C = V centred on both sides,  D⁻¹ = Diag(scale)
//                    s_i = ẑ_i · (C Ẑ)_i = Σ_j C_ij (G_ij + along_j)
//     features side  W' = 2 common² V                    (csrc/cpu/kernels.inl derives both)
//
// along_j = (ẑ_j - m) · m is the part of a centred row that G does not see; common is the factor of
// rows that are not normalised.
#pragma once
#include "rows.cuh"

namespace mmae {
namespace cuda {

enum class Quantity { kCodingRate, kRenyi2 };

// What the samples side knows of its rows, in shared memory.
template <class T>
struct RowData {
  int k;
  bool normalize, center;
  double count;            // rows kept (only if centred)
  Shared<T> scale;         // (k)
  Shared<T> keep;          // (k): 1 for rows that the mask keeps, else 0
  Shared<T> along;         // (k), only if normalised and centred
  Shared<T> column;        // (k): row means of V, if centred
  Shared<double> partial;  // (warps)

  // C_ij from V_ij; grand: mean of `column` over the rows kept.
  MMAE_DEVICE T centered(T v, T grand, int i, int j) const {
    return center ? keep[i] * keep[j] * (v - column[i] - column[j] + grand) : v;
  }
};

// weight (k, k) from V and G, two functions of (i, j) that any thread may call.
template <class T, class V, class G>
MMAE_DEVICE void fold_samples(const RowData<T>& rows, const V& v, const G& g, T* weight) {
  const int k = rows.k, lane = int(threadIdx.x) % kWarp, first = int(threadIdx.x) / kWarp;
  const int warps = int(blockDim.x) / kWarp;
  T grand = 0;
  if (rows.center) {
    double total = 0;  // sum of the row means; lane 0 of each warp holds its rows'
#pragma unroll 1
    for (int i = first; i < k; i += warps) {
      double sum = 0;
#pragma unroll 1
      for (int j = lane; j < k; j += kWarp)
        if (rows.keep[j] != T(0)) sum += v(i, j);
      sum = warp_reduce(sum, Sum{});
      if (lane == 0) {
        const T mean = rows.count > 0 ? T(sum / rows.count) : T(0);
        rows.column[i] = mean;
        if (rows.keep[i] != T(0)) total += mean;
      }
    }
    total = block_reduce(total, Sum{}, rows.partial);  // its barriers also complete `column`
    grand = rows.count > 0 ? T(total / rows.count) : T(0);
  }
#pragma unroll 1
  for (int i = first; i < k; i += warps) {
    double projection = 0;
    if (rows.normalize) {
#pragma unroll 1
      for (int j = lane; j < k; j += kWarp) {
        T x = g(i, j);
        if (rows.center) x += rows.along[j];
        projection += double(rows.centered(v(i, j), grand, i, j)) * x;
      }
      projection = warp_reduce(projection, Sum{});
    }
    const T left = 2 * rows.scale[i];
#pragma unroll 1
    for (int j = lane; j < k; j += kWarp) {
      T c = rows.centered(v(i, j), grand, i, j);
      if (i == j) c -= T(projection);
      weight[int64_t(i) * k + j] = left * rows.scale[j] * c;
    }
  }
}

// weight (k, k) = factor · V.
template <class T, class V>
MMAE_DEVICE void write_matrix(int k, T factor, const V& v, T* weight) {
#pragma unroll 1
  for (int i = int(threadIdx.x) / kWarp; i < k; i += int(blockDim.x) / kWarp)
#pragma unroll 1
    for (int j = int(threadIdx.x) % kWarp; j < k; j += kWarp)
      weight[int64_t(i) * k + j] = factor * v(i, j);
}

// A batch of ready Gram matrices, and what folding their V needs of the rows they came from.
enum class Side { kSamples, kFeatures, kGram };  // kGram: the weight is V itself

template <class T>
struct GramInput {
  Side side;
  const T* g;       // (batch, k, k)
  const T* scale;   // (batch, k): row scale, samples side
  const T* along;   // (batch, k), samples side if normalised and centred, else null
  const T* common;  // (batch): scale of rows that are not normalised, null: 1
};

// RowData of matrix `index`: arrays at the byte offsets of the plan, (k) each, filled here. The
// caller puts a barrier between this and their use.
template <class T, class Plan>
MMAE_DEVICE RowData<T> load_rows(const Features& f, const GramInput<T>& in, const Plan& plan,
                                 int64_t index) {
  const bool samples = in.side == Side::kSamples;
  RowData<T> rows{plan.k,
                  f.normalize,
                  f.center,
                  0,
                  shared_array<T>(plan.scale, plan.k),
                  shared_array<T>(plan.keep, plan.k),
                  shared_array<T>(plan.along, plan.k),
                  shared_array<T>(plan.column, plan.k),
                  shared_array<double>(plan.partial, int(blockDim.x) / kWarp)};
  if (!samples) return rows;
  const Rows<T> z(f, index);
  double part = 0;
#pragma unroll 1
  for (int i = int(threadIdx.x); i < plan.k; i += int(blockDim.x)) {
    const bool kept = z.kept(i);
    rows.scale[i] = in.scale[index * plan.k + i];
    rows.keep[i] = kept ? T(1) : T(0);
    if (in.along) rows.along[i] = in.along[index * plan.k + i];
    part += kept;
  }
  if (f.center) rows.count = block_reduce(part, Sum{}, rows.partial);
  return rows;
}

template <class T>
MMAE_DEVICE double trace_of(const T* g, int k, Shared<double> partial) {
  double part = 0;
#pragma unroll 1
  for (int i = int(threadIdx.x); i < k; i += int(blockDim.x)) part += g[int64_t(i) * k + i];
  return block_reduce(part, Sum{}, partial);
}

template <class T>
MMAE_DEVICE void fill(T* out, int64_t count, T x) {
  for (int64_t e = threadIdx.x; e < count; e += blockDim.x) out[e] = x;
}

}  // namespace cuda
}  // namespace mmae
