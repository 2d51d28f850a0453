// Launch plans of the CUDA kernels: tile shapes, threads and the layout of shared memory, as pure
// functions of the problem. No CUDA and no torch header: tests and launchers ask the same code.
//
// The fused kernel and the products stay within kSharedBudget, so that one plan serves every GPU
// from sm_80 on. The kernels on ready Gram matrices go as far as the GPU's shared memory allows.
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
// Largest k = min(n, d) of the fused kernel.
constexpr int64_t kMaxOrderFloat = 128, kMaxOrderDouble = 96;

// Of the kernels on ready Gram matrices, and d of the features side of the backward kernel.
constexpr int64_t kMaxOrder = 256;

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

// Coding rate and Rényi-2 of ready Gram matrices, one block per matrix.
constexpr int kPackedThreads = 512;

struct PackedPlan {
  int k, threads;
  int triangle;                           // (k (k + 1) / 2), coding rate only
  int scale, keep, along, column, pivot;  // (k)
  int columns;                            // (2, k)
  int partial;                            // (warps) float64
  int shared_bytes;
};

constexpr PackedPlan packed_plan(int64_t order, bool is_double, bool is_rate) {
  PackedPlan p{};
  const int size = is_double ? 8 : 4;
  p.k = int(order);
  p.threads = kPackedThreads;
  Layout layout;
  p.partial = layout.take(p.threads / kWarp, 8);
  p.scale = layout.take(p.k, size);
  p.keep = layout.take(p.k, size);
  p.along = layout.take(p.k, size);
  p.column = layout.take(p.k, size);
  p.triangle = layout.take(is_rate ? order * (order + 1) / 2 : 0, size);
  p.columns = layout.take(is_rate ? 2 * order : 0, size);
  p.pivot = layout.take(is_rate ? order : 0, size);
  p.shared_bytes = layout.bytes;
  return p;
}

// Entropies of any order from ready Gram matrices, one block per matrix. A pair of columns is held
// by `lanes` threads with kEntries entries of each. Columns begin ld apart, an odd multiple of
// `lanes`: what the 32 / lanes pairs of a warp read at once then lies in different banks.
struct JacobiPlan {
  static constexpr int kEntries = 8, kSweeps = 30, kMaxBlock = 512;
  int k, ld, lanes, threads;
  int w;                                  // (k, ld)
  int norms;                              // (2, k)
  int coefficient, spectral, projection;  // (k)
  int scale, keep, along, column;         // (k)
  int order;                              // (k) int
  int lam, partial;                       // (k), (warps) float64
  int shared_bytes;
};

constexpr JacobiPlan jacobi_plan(int64_t order, bool is_double) {
  JacobiPlan p{};
  const int size = is_double ? 8 : 4;
  p.k = int(order);
  p.lanes = order <= 32 ? 4 : order <= 64 ? 8 : order <= 128 ? 16 : 32;
  p.ld = p.lanes == 32 ? p.k : int(ceil_div(order, 2 * p.lanes)) * 2 * p.lanes - p.lanes;
  if (p.ld < p.k) p.ld += 2 * p.lanes;
  p.threads = order <= 32 ? 64 : order <= 128 ? 256 : JacobiPlan::kMaxBlock;
  Layout layout;
  p.partial = layout.take(p.threads / kWarp, 8);
  p.lam = layout.take(p.k, 8);
  p.w = layout.take(int64_t(p.k) * p.ld, size);
  p.norms = layout.take(2 * order, size);
  p.coefficient = layout.take(p.k, size);
  p.spectral = layout.take(p.k, size);
  p.projection = layout.take(p.k, size);
  p.scale = layout.take(p.k, size);
  p.keep = layout.take(p.k, size);
  p.along = layout.take(p.k, size);
  p.column = layout.take(p.k, size);
  p.order = layout.take(p.k, 4);
  p.shared_bytes = layout.bytes;
  return p;
}

// The kernels that take one matrix per block, and the largest order of each on a GPU that gives a
// block `shared` bytes.
enum class Kernel { kSpectral, kPackedRate, kPackedRenyi2, kJacobi };

constexpr int shared_bytes(Kernel kernel, int64_t order, bool is_double) {
  return kernel == Kernel::kSpectral ? spectral_plan(order, is_double).shared_bytes
         : kernel == Kernel::kJacobi
             ? jacobi_plan(order, is_double).shared_bytes
             : packed_plan(order, is_double, kernel == Kernel::kPackedRate).shared_bytes;
}

constexpr int64_t max_order(Kernel kernel, bool is_double, int shared) {
  int64_t order = kernel != Kernel::kSpectral ? kMaxOrder
                  : is_double                 ? kMaxOrderDouble
                                              : kMaxOrderFloat;
  while (shared_bytes(kernel, order, is_double) > shared) --order;
  return order;
}

// sm_90, sm_100; sm_80; sm_86, sm_89, sm_120.
static_assert(max_order(Kernel::kPackedRate, false, 227 * 1024) == kMaxOrder);
static_assert(2 * packed_plan(197, false, true).shared_bytes + 2048 <= 228 * 1024);
static_assert(max_order(Kernel::kJacobi, false, 227 * 1024) >= 224);
static_assert(max_order(Kernel::kJacobi, false, 163 * 1024) >= 192);
static_assert(max_order(Kernel::kJacobi, false, kSharedBudget) >= 128);
static_assert(max_order(Kernel::kJacobi, true, kSharedBudget) >= 96);

// Tiled products: kTile x kTile outputs per block, 16 per thread: by 16 x 16 threads with 4 x 4
// entries each, or by 8 warps in tensor cores (tiles.cuh).
struct ProductPlan {
  static constexpr int kTile = 64, kSide = 16, kRegister = 4, kThreads = kSide * kSide;
  static constexpr int kThreadStride = kTile + 1, kWarpDepth = 32;
  int depth;        // of a staged step
  int count;        // entries of a staged operand
  int left, right;  // byte offsets
  int shared_bytes;
};

constexpr ProductPlan product_plan(bool is_double, bool by_warps) {
  ProductPlan p{};
  const int size = is_double ? 8 : 4;
  p.depth = by_warps ? ProductPlan::kWarpDepth : is_double ? 16 : 32;
  p.count = by_warps ? ProductPlan::kTile * (ProductPlan::kWarpDepth + 4)
                     : p.depth * ProductPlan::kThreadStride;
  Layout layout;
  p.left = layout.take(p.count, size);
  p.right = layout.take(p.count, size);
  p.shared_bytes = layout.bytes;
  return p;
}

// Either layout of a step of a warp's operands has the same size.
static_assert(ProductPlan::kTile * (ProductPlan::kWarpDepth + 4) ==
              ProductPlan::kWarpDepth * (ProductPlan::kTile + 8));

// Features side of the backward pass: kRows whole rows per block.
struct RowsPlan {
  static constexpr int kRows = 32, kSide = 16, kThreads = kSide * kSide;
  int width, depth;  // staged step of W': depth x (width + 1); width >= d
  int x, w;          // byte offsets: x (d, kRows + 1), w (depth, width + 1)
  int shared_bytes;
};

constexpr int rows_tile(int64_t d, bool is_double) {
  return d <= (is_double ? kMaxOrderDouble : kMaxOrderFloat) ? (is_double ? 6 : 8) : 16;
}

constexpr RowsPlan rows_plan(int64_t d, bool is_double) {
  RowsPlan p{};
  const int size = is_double ? 8 : 4;
  p.width = RowsPlan::kSide * rows_tile(d, is_double);
  p.depth = is_double ? 16 : 32;
  Layout layout;
  p.x = layout.take(d * (RowsPlan::kRows + 1), size);
  p.w = layout.take(int64_t(p.depth) * (p.width + 1), size);
  p.shared_bytes = layout.bytes;
  return p;
}

static_assert(rows_plan(kMaxOrder, false).shared_bytes <= kSharedBudget);
static_assert(rows_plan(kMaxOrder, true).shared_bytes <= kSharedBudget);

}  // namespace cuda
}  // namespace mmae
