// A symmetric float32 matrix to block tridiagonal form and back, all by matrix products. Included
// inside an instruction-set namespace after gram.h.
//
// Tridiagonal form costs a product of the whole matrix with one vector per row, at the speed of
// memory. Blocks of kBlock rows make that a product with kBlock vectors: for the rows R of a block,
// right of the next block's first column,
//
//     R Q = (L 0),    Q = I - Vᵀ T V,    V: kBlock reflectors as rows,
//     A <- Qᵀ A Q = A - Vᵀ W - Wᵀ V,    W = Tᵀ (V A - 1/2 (V A Vᵀ) T V),
//
// where A is what lies right of and below. What a function of the matrix needs of tridiagonal
// form, blocks have too (blocks_log.h). Back, A <- Q A Qᵀ, is the same with Tᵀ for T, but has the
// columns left of V besides.
//
// Of a matrix of nearly equal rows all sums have equal terms, whose roundings add up instead of
// averaging out: sums are of kBlock · 3 terms at most before they are added to others, and small
// products, where a wrong digit would touch all of A, are summed in float64.

constexpr int64_t kBlock = 16;
constexpr int64_t kUpdate = 3 * kBlock;  // rows and columns of A updated at once: whole tiles
constexpr int64_t kBlockEntries = kBlock * kBlock;

// A row that is smaller than this, where the trace is 1, is zero.
constexpr double kNoRow = 1e-15;

struct BlockTridiagonal {
  int64_t k, order, lda, blocks;  // order: k in whole blocks, the rest zero
  float* a;      // order rows; diagonal blocks in place, reflectors right of the next one
  double* t;     // T of every block's reflectors, upper triangles
  float* right;  // the off-diagonal blocks, block row i by block column i + 1

  BlockTridiagonal(int64_t n, Memory& memory) : k(n), order(round_up(n, kBlock)) {
    lda = stride_of(order);
    blocks = order / kBlock;
    a = memory.take<float>(order * lda);
    t = memory.take<double>(blocks * kBlockEntries);
    right = memory.take<float>(blocks * kBlockEntries);
  }

  // Whole vectors of any instruction set; an odd number of cache lines, so that a column of tiles
  // does not fall on few sets of a cache.
  static int64_t stride_of(int64_t order) { return order / 16 % 2 ? order : order + 16; }

  const float* diagonal(int64_t i) const { return a + i * kBlock * (lda + 1); }

  // The trace, and the smaller of two norms: no eigenvalue is larger than either.
  struct Bounds {
    double trace, norm;
  };
  Bounds bounds() const {
    double sum = 0, square = 0, widest = 0;
    for (int64_t i = 0; i < order; ++i) {
      const int64_t block = i / kBlock, at = i % kBlock;
      const float *row = diagonal(block) + at * lda, *off = right + block * kBlockEntries;
      double width = 0;
      const auto add = [&](double x, int times) {
        width += std::abs(x);
        square += times * x * x;
      };
      for (int64_t j = 0; j < kBlock; ++j) add(row[j], 1);
      for (int64_t j = 0; j < kBlock && block + 1 < blocks; ++j) add(off[at * kBlock + j], 2);
      for (int64_t j = 0; j < kBlock && block > 0; ++j) add(off[(j - kBlock) * kBlock + at], 0);
      sum += row[at];
      widest = std::max(widest, width);
    }
    return {sum, std::min(std::sqrt(square), widest)};
  }
};

// out[i][j] = x_i · y_j for kBlock rows each, m (whole blocks) long.
inline void block_products(const float* x, int64_t ldx, const float* y, int64_t ldy, int64_t m,
                           double* out) {
  constexpr int R = MMAE_VECTOR_BYTES == 64 ? 4 : 2, VL = kLanes<float>;
  std::fill_n(out, kBlockEntries, 0.0);
  for (int64_t at = 0; at < m; at += 8 * kBlock)
    for (int64_t i = 0; i < kBlock; i += R)
      for (int64_t j = 0; j < kBlock; j += R) {
        Vec<float> acc[R][R] = {};
        for (int64_t c = at; c < std::min(at + 8 * kBlock, m); c += VL) {
          Vec<float> b[R];
          for (int q = 0; q < R; ++q) b[q] = load(y + (j + q) * ldy + c);
          for (int p = 0; p < R; ++p) {
            const Vec<float> v = load(x + (i + p) * ldx + c);
            for (int q = 0; q < R; ++q) acc[p][q] += v * b[q];
          }
        }
        for (int p = 0; p < R; ++p)
          for (int q = 0; q < R; ++q)
            out[(i + p) * kBlock + j + q] += double(reduce_add<float>(acc[p][q]));
      }
}

// r (kBlock rows of m) becomes its reflectors, `left` its L; their T to t.
inline void reflect_block(float* r, int64_t ld, int64_t m, float* left, double* t) {
  constexpr int VL = kLanes<float>;
  double tau[kBlock], products[kBlockEntries];
  for (int64_t i = 0; i < kBlock; ++i) {
    float *x = r + i * ld, *l = left + i * kBlock;
    for (int64_t j = 0; j < kBlock; ++j) l[j] = j < i ? x[j] : 0;
    std::fill_n(x, i, 0.f);
    const double alpha = x[i];
    x[i] = 0;
    const double rest = dot(x, x, m);
    x[i] = 1;
    if (rest <= kNoRow * kNoRow) {
      l[i] = float(alpha);
      std::fill(x + i + 1, x + m, 0.f);
      tau[i] = 0;
      continue;
    }
    const double beta = std::copysign(std::sqrt(alpha * alpha + rest), -alpha);
    l[i] = float(beta);
    const Vec<float> inverse = splat(float(1 / (alpha - beta)));
    for (int64_t c = 0; c < m; c += VL) store(x + c, load(x + c) * inverse);
    x[i] = 1;
    // Of the rounded reflector, so that it is one.
    tau[i] = 2 / dot(x, x, m);
    for (int64_t p = i + 1; p < kBlock; ++p) {
      float* y = r + p * ld;
      const Vec<float> factor = splat(float(tau[i] * dot(x, y, m)));
      for (int64_t c = 0; c < m; c += VL) store(y + c, load(y + c) - factor * load(x + c));
    }
  }
  block_products(r, ld, r, ld, m, products);
  std::fill_n(t, kBlockEntries, 0.0);
  for (int64_t j = 0; j < kBlock; ++j) {
    t[j * kBlock + j] = tau[j];
    for (int64_t i = 0; i < j; ++i) {
      double sum = 0;
      for (int64_t q = i; q < j; ++q) sum += t[i * kBlock + q] * products[q * kBlock + j];
      t[i * kBlock + j] = -tau[j] * sum;
    }
  }
}

// Work memory of one transformation: V over W, and W over V, of which one is the left factor and
// one the right in Vᵀ W + Wᵀ V.
struct BlockWork {
  struct Piece {  // of A, its first row and column
    int64_t i, j;
  };
  float *left, *right;
  std::vector<Piece> pieces;

  BlockWork(int64_t lda, Memory& memory)
      : left(memory.take<float>(2 * kBlock * lda)), right(memory.take<float>(2 * kBlock * lda)) {}
};

// A <- Qᵀ A Q on rows and columns [s, order), Q = I - Vᵀ T V with V (kBlock rows of order - s) and
// m = T. A is full there. With `wide`, of which the columns [0, s) of the rows from s on are a part
// too, m = Tᵀ and A <- Q A Qᵀ.
inline void transform(float* a, int64_t lda, int64_t s, int64_t order, const float* v, int64_t ldv,
                      const double* m, bool wide, BlockWork& work, const Executor& executor) {
  constexpr int VL = kLanes<float>;
  const int64_t first = wide ? 0 : s, size = order - s;
  float *above = work.right, *below = work.right + kBlock * lda;  // U, later W; V
  for (int64_t i = 0; i < kBlock; ++i) {
    std::memcpy(work.left + i * lda + s, v + i * ldv, size_t(size) * sizeof(float));
    std::memcpy(below + i * lda + s, v + i * ldv, size_t(size) * sizeof(float));
    std::fill(below + i * lda + first, below + i * lda + s, 0.f);
  }
  const auto over_columns = [&](const auto& body) {
    executor.run(ceil_div(order - first, NR<float>), 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        const int64_t j = first + p * NR<float>;
        body(j, int(std::min<int64_t>(NV, (order - j) / VL)));
      }
    });
  };
  over_columns([&](int64_t j, int vectors) {  // U = V A
    for (int64_t at = 0; at < size; at += kUpdate)
      for (int64_t i = 0; i < kBlock; i += MR) {
        const float *x = below + i * lda + s + at, *y = a + (s + at) * lda + j;
        const int64_t depth = std::min(kUpdate, size - at);
        float* to = above + i * lda + j;
        if (at == 0)
          tile_of_width<float, false, Write::kSet>(vectors, depth, x, lda, y, lda, to, lda);
        else
          tile_of_width<float, false, Write::kAdd>(vectors, depth, x, lda, y, lda, to, lda);
      }
  });
  double middle[kBlockEntries];  // V A Vᵀ
  block_products(above + s, lda, below + s, lda, size, middle);
  float half[kBlockEntries], factor[kBlockEntries];
  for (int64_t i = 0; i < kBlock; ++i)
    for (int64_t j = 0; j < kBlock; ++j) {
      double sum = 0;
      for (int64_t q = 0; q < kBlock; ++q)
        sum += (middle[i * kBlock + q] + middle[q * kBlock + i]) * m[q * kBlock + j];
      half[i * kBlock + j] = float(sum / 4);
      factor[i * kBlock + j] = float(m[i * kBlock + j]);
    }
  over_columns([&](int64_t j, int vectors) {  // W = mᵀ (U - half V)
    for (int64_t i = 0; i < kBlock && j + vectors * VL > s; i += MR)
      tile_of_width<float, false, Write::kSubtract>(vectors, kBlock, half + i * kBlock, kBlock,
                                                    below + j, lda, above + i * lda + j, lda);
    float* w = work.left + kBlock * lda + j;
    for (int64_t i = 0; i < kBlock; i += MR)
      tile_of_width<float, true, Write::kSet>(vectors, kBlock, factor + i, kBlock, above + j, lda,
                                              w + i * lda, lda);
    for (int64_t i = 0; i < kBlock; ++i)
      std::memcpy(above + i * lda + j, w + i * lda, size_t(vectors) * VL * sizeof(float));
  });
  // Rows of pieces from both ends, since they shorten.
  work.pieces.clear();
  const int64_t rows = ceil_div(size, kUpdate);
  for (int64_t q = 0; q < rows; ++q) {
    const int64_t i = s + (q % 2 ? rows - 1 - q / 2 : q / 2) * kUpdate;
    for (int64_t j = first; j < s; j += kUpdate) work.pieces.push_back({i, j});
    for (int64_t j = i; j < order; j += kUpdate) work.pieces.push_back({i, j});
  }
  executor.run(int64_t(work.pieces.size()), 2, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const auto [i, j] = work.pieces[size_t(p)];
      const int64_t height = std::min(kUpdate, order - i);
      const int64_t width = std::min(kUpdate, (j < s ? s : order) - j);
      for (int64_t c = j; c < j + width; c += NR<float>)
        for (int64_t r = i; r < i + height; r += MR)
          tile_of_width<float, true, Write::kSubtract>(
              int(std::min<int64_t>(NV, (j + width - c) / VL)), (j < s ? 1 : 2) * kBlock,
              work.left + r, lda, work.right + c, lda, a + r * lda + c, lda);
      if (i == j)
        mirror<float, true>(a + i * (lda + 1), height, lda, Executor{nullptr});
      else if (j > i)
        transpose(a + i * lda + j, lda, height, width, a + j * lda + i, lda);
    }
  });
}

// rho = g / tau (full) to block tridiagonal form.
inline void reduce_to_blocks(const float* g, int64_t ldg, double tau, BlockTridiagonal& b,
                             const Executor& executor) {
  const float inverse = float(1 / tau);
  executor.run(b.order, 32, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float* row = b.a + i * b.lda;
      for (int64_t j = 0; j < b.order; ++j)
        row[j] = i < b.k && j < b.k ? inverse * g[i * ldg + j] : 0.f;
    }
  });
  Memory memory;
  BlockWork work(b.lda, memory);
  for (int64_t i = 0; i + 1 < b.blocks; ++i) {
    const int64_t s = (i + 1) * kBlock;
    float *r = b.a + (s - kBlock) * b.lda + s, *off = b.right + i * kBlockEntries;
    if (i + 2 == b.blocks) {  // it is one block already
      for (int64_t p = 0; p < kBlock; ++p) std::copy_n(r + p * b.lda, kBlock, off + p * kBlock);
      break;
    }
    double* t = b.t + i * kBlockEntries;
    reflect_block(r, b.lda, b.order - s, off, t);
    transform(b.a, b.lda, s, b.order, r, b.lda, t, false, work, executor);
  }
}

// x <- Q x with Q of the whole reduction.
inline void transform_back_vector(const BlockTridiagonal& b, double* x) {
  for (int64_t i = b.blocks - 3; i >= 0; --i) {
    const int64_t s = (i + 1) * kBlock, m = b.order - s;
    const float* v = b.a + (s - kBlock) * b.lda + s;
    const double* t = b.t + i * kBlockEntries;
    double along[kBlock] = {};  // V x, then T V x
    for (int64_t p = 0; p < kBlock; ++p)
      for (int64_t j = 0; j < m; ++j) along[p] += double(v[p * b.lda + j]) * x[s + j];
    for (int64_t p = 0; p < kBlock; ++p) {
      double sum = 0;
      for (int64_t q = p; q < kBlock; ++q) sum += t[p * kBlock + q] * along[q];
      along[p] = sum;
    }
    for (int64_t p = 0; p < kBlock; ++p)
      for (int64_t j = 0; j < m; ++j) x[s + j] -= along[p] * double(v[p * b.lda + j]);
  }
}

// f <- Q f Qᵀ with Q of the whole reduction: from the lower triangle (whole blocks on the
// diagonal), to all of it.
inline void transform_back(const BlockTridiagonal& b, float* f, const Executor& executor) {
  constexpr int VL = kLanes<float>;
  Memory memory;
  BlockWork work(b.lda, memory);
  const auto complete = [&](int64_t s) {  // the rows of a block right of the diagonal
    for (int64_t i = s + kBlock; i < b.order; i += VL)
      for (int64_t j = s; j < s + kBlock; j += VL)
        transpose(f + i * b.lda + j, b.lda, VL, VL, f + j * b.lda + i, b.lda);
  };
  for (int64_t i = b.blocks - 3; i >= 0; --i) {
    const int64_t s = (i + 1) * kBlock;
    double m[kBlockEntries];
    for (int64_t p = 0; p < kBlock; ++p)
      for (int64_t q = 0; q < kBlock; ++q)
        m[p * kBlock + q] = b.t[i * kBlockEntries + q * kBlock + p];
    complete(s);
    transform(f, b.lda, s, b.order, b.a + (s - kBlock) * b.lda + s, b.lda, m, true, work, executor);
  }
  complete(0);
}
