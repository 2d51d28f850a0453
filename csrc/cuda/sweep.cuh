// log det A and -A⁻¹ of one symmetric positive definite matrix in shared memory, by the symmetric
// sweep operator, one pivot p at a time, u = A_:p, P = 1 / u_p:
//
//     A_ij -= u_i P u_j (i, j ≠ p),   A_ip = P u_i,   A_pp = -P;    in the end A holds -A⁻¹,
//
// log det A = Σ log u_p. Without the inverse only i, j > p are swept. k³/2 multiply-adds with the
// inverse, k³/6 without; one barrier per pivot, because each step writes the next pivot column into
// the other half of `column`. Every pivot of I + cG is at least 1 in exact arithmetic: one that
// rounding took below counts as 1, and one below 1/2 says that I + cG is lost (c lambda_max near
// 1 / eps of T), which makes the result NaN.
#pragma once
#include "device.cuh"

namespace mmae {
namespace cuda {

// Where row i of a lower triangle begins.
struct SquareRows {
  int ld;
  MMAE_DEVICE int operator()(int i) const { return i * ld; }
};
struct PackedRows {
  MMAE_DEVICE int operator()(int i) const { return i * (i + 1) / 2; }
};

// Entry (i, j), either triangle.
template <class Row>
MMAE_DEVICE int lower(const Row& row, int i, int j) {
  return i >= j ? row(i) + j : row(j) + i;
}

// a: lower triangle, entry (i, j <= i) at row(i) + j, filled here from entry(i, j), a function for
// j <= i. column: (2, k). pivot: (k). Ends with a barrier.
template <class T, class Row, class Entry>
MMAE_DEVICE double sweep(int k, Shared<T> a, const Row& row, const Entry& entry, bool invert,
                         Shared<T> column, Shared<T> pivot, Shared<double> partial) {
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  const int warps = int(blockDim.x) / kWarp;
#pragma unroll 1
  for (int i = warp; i < k; i += warps)
#pragma unroll 1
    for (int j = lane; j <= i; j += kWarp) {
      const T x = entry(i, j);
      a[row(i) + j] = x;
      if (j == 0) column[i] = x;
    }
  __syncthreads();  // A and its first column are complete
  for (int p = 0; p < k; ++p) {
    const int u = p % 2 * k, next = k - u;
    T head = column[u + p];
    if (head < T(1)) head = head > T(0.5) ? T(1) : quiet_nan<T>();  // NaN stays
    const T inverse = T(1) / head;
    if (threadIdx.x == 0) pivot[p] = head;
    const int start = invert ? 0 : p + 1;
    for (int i = start + warp; i < k; i += warps) {
      const T ui = column[u + i] * inverse;
      const int at = row(i);
      for (int j = start + lane; j <= i; j += kWarp) {
        T x;
        if (i == p)
          x = j == p ? -inverse : column[u + j] * inverse;
        else if (j == p)
          x = ui;
        else
          x = a[at + j] - ui * column[u + j];
        a[at + j] = x;
        if (j == p + 1)
          column[next + i] = x;
        else if (i == p + 1)
          column[next + j] = x;
      }
    }
    __syncthreads();  // the next pivot column is complete, and this one has been read
  }
  double part = 0;
#pragma unroll 1
  for (int i = int(threadIdx.x); i < k; i += int(blockDim.x)) part += log(double(pivot[i]));
  return block_reduce(part, Sum{}, partial);
}

}  // namespace cuda
}  // namespace mmae
