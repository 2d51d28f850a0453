// Launch plans of the CUDA kernels: tile shapes, threads and the layout of shared memory, as pure
// functions of the problem. No CUDA and no torch header: tests and launchers ask the same code.
//
// Every block stays within kSharedBudget, so that one plan serves every GPU from sm_80 on; the
// largest orders of the fused kernel follow from it.
#pragma once
#include "cpu/api.h"

namespace mmae {
namespace cuda {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 256;
// What one block may have on the GPUs with the least (sm_86, sm_89, sm_120); others have more.
constexpr int kSharedBudget = 99 * 1024;
// Accumulators in registers are added to a second level after this many products: the error of a
// long sum then grows with the number of levels, not with its length.
constexpr int kFlushDepth = 512;
// Largest k = min(n, d) of the fused kernel, and d of the features side of the backward kernel.
constexpr int64_t kMaxOrderFloat = 128, kMaxOrderDouble = 96;

constexpr int64_t max_order(bool is_double) { return is_double ? kMaxOrderDouble : kMaxOrderFloat; }
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Hands out consecutive pieces of shared memory as byte offsets, each aligned to 16 bytes.
struct Layout {
  int bytes = 0;
  constexpr int take(int64_t count, int size) {
    const int offset = bytes;
    bytes += int(ceil_div(count * size, 16) * 16);
    return offset;
  }
};

// Fused kernel: one block per matrix. side x side threads, each with tile x tile entries of G.
struct SpectralPlan {
  int k, ld;         // order; odd leading dimension of the k x ld square (ld > k)
  int side, tile;    // side * tile >= k
  int width, depth;  // a staged step of the product: depth x (width + 1), width = side * tile
  int threads;
  // Byte offsets of the arrays in shared memory, T but for `partial`.
  int square;   // (k, ld): lower triangle A, then -A⁻¹ or V; G_ij, i <= j, at column j + 1
  int stage;    // (depth, width + 1)
  int scale;    // (max(k, depth)): of all rows (samples side), of the staged rows (features side)
  int keep;     // (max(k, depth)): 1 for rows that the mask keeps, else 0; rows as in scale
  int mean;     // (max(k, depth)): mean row; on the samples side the part of the staged columns
  int along;    // (k): centred row times mean row
  int column;   // (2, k): pivot column of this step of the sweep and of the next
  int pivot;    // (k)
  int partial;  // (warps) float64, for reductions over the block
  int shared_bytes;
};

constexpr SpectralPlan spectral_plan(int64_t order, bool is_double) {
  SpectralPlan p{};
  const int size = is_double ? 8 : 4;
  p.k = int(order);
  p.ld = p.k + 1 + p.k % 2;
  p.side = order <= 32 ? 8 : 16;
  p.tile = order <= 64 ? 4 : is_double ? 6 : 8;
  p.width = p.side * p.tile;
  p.depth = is_double ? 16 : 32;
  p.threads = p.side * p.side;
  const int rows = p.k > p.depth ? p.k : p.depth;
  Layout layout;
  p.partial = layout.take(p.threads / kWarp, 8);
  p.square = layout.take(int64_t(p.k) * p.ld, size);
  p.stage = layout.take(int64_t(p.depth) * (p.width + 1), size);
  p.scale = layout.take(rows, size);
  p.keep = layout.take(rows, size);
  p.mean = layout.take(rows, size);
  p.along = layout.take(p.k, size);
  p.column = layout.take(2 * int64_t(p.k), size);
  p.pivot = layout.take(p.k, size);
  p.shared_bytes = layout.bytes;
  return p;
}

static_assert(spectral_plan(kMaxOrderFloat, false).shared_bytes <= kSharedBudget);
static_assert(spectral_plan(kMaxOrderDouble, true).shared_bytes <= kSharedBudget);

// Tiled products: kTile x kTile outputs per block of 16 x 16 threads with 4 x 4 entries each.
struct ProductPlan {
  static constexpr int kTile = 64, kSide = 16, kRegister = 4, kThreads = kSide * kSide;
  int depth, ld;    // a staged step of either operand: depth x ld, ld odd
  int left, right;  // byte offsets
  int shared_bytes;
};

constexpr ProductPlan product_plan(bool is_double) {
  ProductPlan p{};
  const int size = is_double ? 8 : 4;
  p.depth = is_double ? 16 : 32;
  p.ld = ProductPlan::kTile + 1;
  Layout layout;
  p.left = layout.take(int64_t(p.depth) * p.ld, size);
  p.right = layout.take(int64_t(p.depth) * p.ld, size);
  p.shared_bytes = layout.bytes;
  return p;
}

// Features side of the backward pass: kRows whole rows per block.
struct RowsPlan {
  static constexpr int kRows = 32, kSide = 16, kThreads = kSide * kSide;
  int width, depth;  // staged step of W': depth x (width + 1); width >= d
  int x, w;          // byte offsets: x (d, kRows + 1), w (depth, width + 1)
  int shared_bytes;
};

constexpr int rows_tile(bool is_double) { return is_double ? 6 : 8; }

constexpr RowsPlan rows_plan(int64_t d, bool is_double) {
  RowsPlan p{};
  const int size = is_double ? 8 : 4;
  p.width = RowsPlan::kSide * rows_tile(is_double);
  p.depth = is_double ? 16 : 32;
  Layout layout;
  p.x = layout.take(d * (RowsPlan::kRows + 1), size);
  p.w = layout.take(int64_t(p.depth) * (p.width + 1), size);
  p.shared_bytes = layout.bytes;
  return p;
}

static_assert(rows_plan(kMaxOrderFloat, false).shared_bytes <= kSharedBudget);
static_assert(rows_plan(kMaxOrderDouble, true).shared_bytes <= kSharedBudget);

}  // namespace cuda
}  // namespace mmae
