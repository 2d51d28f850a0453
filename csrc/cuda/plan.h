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

// How a block multiplies: float64 by threads; float32 by warps, as TF32 numbers; 16-bit numbers by
// warps, two to a word.
enum class Unit { kDouble, kFloat, kPairs };

constexpr bool by_warps(Unit unit) { return unit != Unit::kDouble; }
constexpr int word_bytes(Unit unit) { return unit == Unit::kDouble ? 8 : 4; }
// Words, and numbers, of a row or column in a staged step.
constexpr int depth_of(Unit unit) { return unit == Unit::kDouble ? 16 : 32; }
constexpr int numbers_of(Unit unit) { return depth_of(unit) * (unit == Unit::kPairs ? 2 : 1); }

// A staged operand of depth x width entries (step p, row or column i) in shared memory.
//   By warps: word i * row_words(depth) + p. Of entries (p + q, i + g), g = lane / 4, q = lane % 4,
//   which a warp reads at once, a row of 4 words more than a multiple of 32 makes banks 4 g + q:
//   all
//   32. They are written along p, or, by stage_columns, 8 along i times 4 along p: all banks again,
//   and whole sectors of global memory.
//   By threads: word p * step + i, read along i; an odd step lets neighbours in p be written.
struct Stage {
  int offset, count;  // byte offset, words
  int step;
};

constexpr int row_words(int depth) { return int(ceil_div(depth, 32)) * 32 + 4; }

constexpr Stage stage_of(Layout& layout, Unit unit, int width, int depth) {
  Stage s{};
  s.step = width + 1;
  s.count = by_warps(unit) ? width * row_words(depth) : depth * s.step;
  s.offset = layout.take(s.count, word_bytes(unit));
  return s;
}

// Fused kernel: one block per matrix. G is made by side x side threads, each with tile x tile
// entries, or by their warps, with 32 x 16 entries each (width = 128: 32 x 64).
struct SpectralPlan {
  int k, ld;       // order; odd leading dimension of the k x ld square (ld > k)
  int side, tile;  // side * tile >= k
  int width;       // side * tile
  int rows;        // all rows (samples side), or those of a staged step
  int threads;
  // Byte offsets of the arrays in shared memory, T but for `partial`.
  int square;  // (k, ld): lower triangle A, then -A⁻¹ or V; G_ij, i <= j, at column j + 1
  Stage stage;
  int scale;    // (rows)
  int keep;     // (rows): 1 for rows that the mask keeps, else 0
  int mean;     // (rows): mean row; on the samples side the part of the staged columns
  int along;    // (k): centred row times mean row
  int column;   // (2, k): pivot column of this step of the sweep and of the next
  int pivot;    // (k)
  int partial;  // (warps) float64, for reductions over the block
  int shared_bytes;
};

constexpr SpectralPlan spectral_plan(int64_t order, Unit unit) {
  SpectralPlan p{};
  const bool is_double = unit == Unit::kDouble;
  const int size = is_double ? 8 : 4;
  p.k = int(order);
  p.ld = p.k + 1 + p.k % 2;
  p.side = order <= 32 ? 8 : 16;
  p.tile = order <= 64 ? 4 : is_double ? 6 : 8;
  p.width = p.side * p.tile;
  p.threads = p.side * p.side;
  p.rows = p.k > depth_of(unit) ? p.k : depth_of(unit);  // no step of pairs needs more
  Layout layout;
  p.partial = layout.take(p.threads / kWarp, 8);
  p.square = layout.take(int64_t(p.k) * p.ld, size);
  p.stage = stage_of(layout, unit, p.width, depth_of(unit));
  p.scale = layout.take(p.rows, size);
  p.keep = layout.take(p.rows, size);
  p.mean = layout.take(p.rows, size);
  p.along = layout.take(p.k, size);
  p.column = layout.take(2 * int64_t(p.k), size);
  p.pivot = layout.take(p.k, size);
  p.shared_bytes = layout.bytes;
  return p;
}

static_assert(spectral_plan(kMaxOrderFloat, Unit::kFloat).shared_bytes <= kSharedBudget);
static_assert(spectral_plan(kMaxOrderDouble, Unit::kDouble).shared_bytes <= kSharedBudget);

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
  const Unit unit = is_double ? Unit::kDouble : Unit::kFloat;
  return kernel == Kernel::kSpectral ? spectral_plan(order, unit).shared_bytes
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

// Tiled products: kTile x kTile outputs per block, by 16 x 16 threads with 4 x 4 entries each, or
// by 8 warps with 32 x 16 each.
struct ProductPlan {
  static constexpr int kTile = 64, kSide = 16, kThreads = kSide * kSide;
  Stage left, right;
  int shared_bytes;
};

constexpr ProductPlan product_plan(Unit unit) {
  ProductPlan p{};
  Layout layout;
  p.left = stage_of(layout, unit, ProductPlan::kTile, depth_of(unit));
  p.right = stage_of(layout, unit, ProductPlan::kTile, depth_of(unit));
  p.shared_bytes = layout.bytes;
  return p;
}

// Features side of the backward pass: kRows whole rows per block, by 16 x 16 threads with 2 x tile
// entries each, or by 8 warps with all rows of an eighth of the columns each.
struct RowsPlan {
  static constexpr int kRows = 32, kSide = 16, kThreads = kSide * kSide;
  int width;    // columns, at least d
  int steps;    // of the product: d, filled up to a multiple of a staged step
  int across;   // warps that share a row
  Stage x, w;   // x (steps, kRows; by warps a row has room for width), w (a staged step, width)
  int partial;  // (across, kRows) float64
  int shared_bytes;
};

constexpr int rows_width(int64_t d, bool is_double) {
  return d > (is_double ? kMaxOrderDouble : kMaxOrderFloat) ? 256 : is_double ? 96 : 128;
}

constexpr RowsPlan rows_plan(int64_t d, Unit unit) {
  RowsPlan p{};
  p.width = rows_width(d, unit == Unit::kDouble);
  p.steps = int(ceil_div(d, depth_of(unit))) * depth_of(unit);
  p.across = by_warps(unit) ? RowsPlan::kThreads / kWarp : 1;
  Layout layout;
  p.x = stage_of(layout, unit, RowsPlan::kRows, by_warps(unit) ? p.width : p.steps);
  p.w = stage_of(layout, unit, p.width, depth_of(unit));
  p.partial = layout.take(p.across * RowsPlan::kRows, 8);
  p.shared_bytes = layout.bytes;
  return p;
}

static_assert(kMaxOrder <= kFlushDepth);  // one level of sums
static_assert(rows_plan(kMaxOrder, Unit::kFloat).shared_bytes <= kSharedBudget);
static_assert(rows_plan(kMaxOrder, Unit::kDouble).shared_bytes <= kSharedBudget);

}  // namespace cuda
}  // namespace mmae
