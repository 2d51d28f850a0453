// Which algorithm serves which shape: the thresholds of the CPU kernels and the measurements behind
// them. Included inside an instruction-set namespace after gemm.h. k = min(n, d).
//
// clang-format off
// | quantity            | in vector lanes (lanes.h)        | one matrix per thread | its loops shared |
// |---------------------|----------------------------------|-----------------------|------------------|
// | Gram, alpha = 2     | k <= 32, n d <= 4096             | batch >= threads      | batch < threads  |
// | coding rate         | k <= 160                         | batch >= threads      | batch < threads  |
// | alpha = 3, 4 ... 16 | k <= 16                          | powers, k > 16        | powers           |
// | alpha = 1, inf      | k <= 256                         | blocks, k >= 128      | blocks           |
// | ... of float64      | inf: k <= 256                    | k <= 256              | - (LAPACK above) |
// | other alpha         | k <= 200, without gradient 256   | k <= 256              | - (LAPACK above) |
// | alpha < 1.5         | k <= 64, without gradient 256    | k <= 256              | - (LAPACK above) |
// | gradient of z       | -                                | batch >= threads      | batch < threads  |
// clang-format on
//
// Lanes also need half of them filled on every thread, and rows that are not centred. The loops of
// large matrices that are left over from a batch are shared too (kShareLeft).
//
// Measured on one core of an AMD EPYC (Zen 4, AVX-512), float32: time per matrix of 7 matrices (too
// few for lanes) over that of a batch in lanes, value and gradient's weight (value alone). Of the
// smaller ones, part is the call.
//
// clang-format off
//     batch x n x d    alpha = 2    coding rate   von Neumann   alpha = 1.5
//     1952 x 32 x 32     1.8          2.3 (2.5)     3.0 (3.5)     2.1 (3.3)
//      640 x 48 x 64     -            1.6 (1.6)     2.6 (2.8)     1.7 (2.7)
//      480 x 64 x 64     -            1.5 (1.4)     2.5 (2.3)     1.4 (2.2)
//      112 x 128 x 128   -            1.1 (1.0)     2.2 (2.0)     0.9 (2.4)
//       64 x 160 x 160   -            1.2 (1.0)     2.3 (1.6)     1.3 (1.9)
//       16 x 197 x 768   -            -             2.0 (1.4)     1.0 (1.4)
//       16 x 256 x 256   -            -             1.9 (1.5)     - (1.2)
// clang-format on

constexpr int64_t kLanesProduct = 32, kLanesFactor = 160;
constexpr int64_t kLanesValues = 256, kLanesVectors = 200;

// alpha < 1 magnifies the noise of eigenvalues near zero, which rotating vectors in float32 adds
// to: 0.8 of what the accuracy rule allows at k = 66, 1.6 at 130. Alone a matrix is rotated in
// float64.
constexpr int64_t kLanesSingular = 64;

// Orders up to which float32 eigenvalues in lanes are rotated in float32: the noise of rows that
// repeat 3 is 0.8 of what the accuracy rule allows at k = 97, 1.0 at 128, 1.2 at 256; in float64,
// at four times the cost (64 x 197 x 768: 60 and 66 ms for value and weight), 0.2.
constexpr int64_t kNarrowValues = 96;

// Entries of z above which the lanes take finished Gram matrices and not features: kLanes matrices
// are read at once there, and long rows of so many do not stay in a cache (512 x 32 x 256, alpha =
// 2: 1.5 ms matrix by matrix, 2.2 ms in lanes; 1024 x 64 x 64: 2.6 and 2.8).
constexpr int64_t kLanesLoad = 4096;

// Above this, LAPACK's divide and conquer is the better eigensolver.
constexpr int64_t kMaxEigen = 256;

// From here on alpha = 1 and inf of a float32 matrix that is not in lanes take blocks.h.
constexpr int64_t kBlocksFrom = 128;

// Integer orders that take powers of the Gram matrix instead of its eigenvalues.
constexpr int64_t kPowersFrom = 17, kMaxPower = 16;

// Multiply-adds of a matrix from which on its loops are worth sharing among threads (of one that is
// left over from a batch: 3 x 768 x 500, two threads, 16 -> 13 ms; 7 x 100 x 100 would lose 8 %),
// and of a thread's share of a batch.
constexpr int64_t kShareLoops = 200000, kShareLeft = 2000000, kShareBatch = 20000;

// Rows of a packed block of the product, so that all its panels fit a second-level cache, and rows
// of it that one pass of tiles uses, so that a panel fits a first-level cache.
constexpr int64_t kPackDepth = 512, kTileDepth = 128;

// Slices of a product's depth that threads work on side by side, each with a sum of its own. Short
// ones, where a matrix has too few panels to occupy all threads (two threads: 1 x 197 x 768: 0.30
// -> 0.20 ms, 1 x 100000 x 64: 8.0 -> 4.3 ms); otherwise long ones, next to which adding up the
// sums is nothing, one per thread: then no core waits for panels that another one has packed (1 x
// 16384 x 384: 14.9 ms, in some minutes 20.8 -> 13.6 at any time).
inline int64_t depth_slices(int64_t panel_pairs, int64_t depth, const Executor& executor) {
  if (!executor.parallel) return 1;
  const int64_t threads = executor.threads;
  const int64_t few = std::min(depth / kTileDepth, ceil_div(2 * threads, panel_pairs));
  const int64_t own = std::min(depth / (kTileDepth * threads), threads);
  return std::max<int64_t>({few, own, 1});
}

// Entries of z up to which the backward product reads z and W' where they lie: both fit a
// first-level cache (1024 x 64 x 64: 4.4 ms, packed first 6.1).
constexpr int64_t kInPlace = 4096;

// Entries of a Gram matrix that a second-level cache holds, and bytes of a batch of them that no
// cache need hold: then they are written past the caches (1024 x 64 x 64: 2.8 ms, 3.6 through
// them).
constexpr int64_t kPastMatrix = 1 << 16, kPastBatch = 2 << 20;

// Rows of a block of the sweep (factor.h): many make the update a deep product, few keep the
// solves, 2 block / k of the whole, cheap. Multiples of MR, at most kSweepMax (which whole vectors
// divide).
constexpr int64_t kSweepMax = 96;
inline int64_t sweep_rows(int64_t k) {
  return k <= 96 ? MR : k <= 256 ? 16 : k <= 512 ? 32 : k <= 1024 ? 48 : kSweepMax;
}

// What float32 and float64 can square without losing weight: sums of squares of a row, traces.
template <class T>
constexpr double kSquareLow = sizeof(T) == 4 ? 1e-30 : 1e-280;
template <class T>
constexpr double kSquareHigh = sizeof(T) == 4 ? 1e37 : 1e300;
template <class T>
constexpr double kTraceLow = sizeof(T) == 4 ? 1e-18 : 1e-140;
template <class T>
constexpr double kTraceHigh = sizeof(T) == 4 ? 1e18 : 1e140;
