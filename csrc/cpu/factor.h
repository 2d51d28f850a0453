// log det (I + X) and (I + X)⁻¹ of a symmetric positive semidefinite X, in place, by the block
// sweep operator. Included inside an instruction-set namespace after plan.h.
//
// Sweeping block b of a symmetric A with A_bb = L D Lᵀ, R = A_b,:, Y = L⁻¹ R and P = A_bb⁻¹ R:
//     A_ij -= Y_iᵀ D⁻¹ Y_j (i, j outside b),   A_b,: = P,   A_:,b = Pᵀ,   A_bb = -A_bb⁻¹.
// After all blocks A holds -A⁻¹, and the pivots in the D's multiply to det A. Only one triangle is
// kept, so the cost is k³ / 2 multiply-adds, k³ / 6 without the inverse (a Cholesky factorisation
// in other words). Which triangle changes on the way, so that a block row is always contiguous:
// the rows still to be swept hold the swept columns and their own upper triangle, the swept rows
// the lower triangle of the swept part. What else a row holds is never used.
//
// A = I + X, but the identity is never stored: it is added to a pivot when its turn comes. So a
// small X keeps all its digits, where 1 + x would round them away, k times in the same direction.
// For the same reason the inverse of a small X comes without its identity (`offset`); of a large X
// it would be (I + X)⁻¹ - I that loses digits.

// L D Lᵀ of I + X for a block X (MR x MR, its upper triangle): unit lower l, inverse[p] = 1 / D_p.
// Adds the logs of the pivots D_p to *log_det; returns false at a pivot that cannot be one of I +
// X, which are at least 1 (NaN included): a float32 pivot much below 1 tells that rounding of X has
// swamped the identity.
template <class T>
inline bool factor_block(const T* x, int64_t ld, T* l, T* inverse, double* log_det) {
  typedef T Row __attribute__((vector_size(MR * sizeof(T))));
  Row d[MR];
  for (int i = 0; i < MR; ++i) std::memcpy(&d[i], x + i * ld, sizeof(Row));
  double product = 1;
  bool possible = true;
#pragma GCC unroll 8
  for (int p = 0; p < MR; ++p) {
    const double pivot = 1 + double(d[p][p]);
    possible &= pivot > (sizeof(T) == 4 ? 0.999 : 0);
    product *= pivot;
    if (sizeof(T) == 8 || p % 4 == 3) {  // 4 float32 pivots cannot overflow a double
      *log_det += std::log(product);
      product = 1;
    }
    // Only a factor of what is subtracted from X, so rounding 1 + x to T does no harm here.
    inverse[p] = 1 / (1 + d[p][p]);
    const Row factor = d[p] * (inverse[p] - Row{});
    // Whole rows, for whole vectors: what is left of the diagonal is not used again.
#pragma GCC unroll 8
    for (int i = p + 1; i < MR; ++i) {
      l[i * MR + p] = factor[i];
      d[i] -= (factor[i] - Row{}) * d[p];
    }
  }
  return possible;
}

// For rows r (MR x width), columns [first, last): y = L⁻¹ r.
template <class T>
inline void solve_lower(const T* l, T* y, int64_t ld, int64_t first, int64_t last) {
  for (int64_t j = first; j < last; j += kLanes<T>) {
    Vec<T> v[MR];
    for (int i = 0; i < MR; ++i) v[i] = load(y + i * ld + j);
    for (int q = 0; q < MR; ++q)
      for (int i = q + 1; i < MR; ++i) v[i] -= splat(l[i * MR + q]) * v[q];
    for (int i = 0; i < MR; ++i) store(y + i * ld + j, v[i]);
  }
}

// p = L⁻ᵀ p.
template <class T>
inline void solve_upper(const T* l, T* p, int64_t ld, int64_t first, int64_t last) {
  for (int64_t j = first; j < last; j += kLanes<T>) {
    Vec<T> v[MR];
    for (int i = 0; i < MR; ++i) v[i] = load(p + i * ld + j);
    for (int q = MR - 1; q >= 0; --q)
      for (int i = 0; i < q; ++i) v[i] -= splat(l[q * MR + i]) * v[q];
    for (int i = 0; i < MR; ++i) store(p + i * ld + j, v[i]);
  }
}

// c -= A b for columns [first, last): `depth` rows of b, MR of c.
template <class T, bool kColumns>
inline void subtract_product(int64_t depth, const T* a, int64_t lda, const T* b, int64_t ldb, T* c,
                             int64_t ldc, int64_t first, int64_t last) {
  if (depth == 0) return;
  for (int64_t j = first; j < last; j += NR<T>)
    tile_of_width<T, kColumns, Write::kSubtract>(int(std::min<int64_t>(NV, (last - j) / kLanes<T>)),
                                                 depth, a, lda, b + j, ldb, c + j, ldc);
}

// The factor L D Lᵀ of I + F for a diagonal block F of h <= kSweepMax rows: the diagonal tiles of
// L, the inverses of D, and D⁻¹ L⁻¹ (I + F) = Lᵀ in `lt` (its tiles right of the diagonal).

template <class T>
struct BlockFactor {
  T l[kSweepMax / MR][MR * MR], inverse[kSweepMax], lt[kSweepMax * kSweepMax];

  bool factor(const T* a, int64_t lda, int64_t h, double* log_det) {
    if (h == MR) return factor_block(a, lda, l[0], inverse, log_det);
    T f[kSweepMax * kSweepMax];
    for (int64_t i = 0; i < h; ++i) std::memcpy(f + i * kSweepMax, a + i * lda, h * sizeof(T));
    const int64_t width = round_up(h, kLanes<T>);
    for (int64_t p = 0; p < h; p += MR) {
      T* row = f + p * kSweepMax;
      if (!factor_block(row + p, kSweepMax, l[p / MR], inverse + p, log_det)) return false;
      if (p + MR >= h) break;
      const int64_t first = (p + MR) / kLanes<T> * kLanes<T>;
      solve_lower(l[p / MR], row, kSweepMax, first, width);
      for (int i = 0; i < MR; ++i)
        for (int64_t j = first; j < width; ++j)
          lt[(p + i) * kSweepMax + j] = inverse[p + i] * row[i * kSweepMax + j];
      for (int64_t q = p + MR; q < h; q += MR)
        subtract_product<T, true>(MR, row + q, kSweepMax, lt + p * kSweepMax, kSweepMax,
                                  f + q * kSweepMax, kSweepMax, q / kLanes<T> * kLanes<T>, width);
    }
    return true;
  }

  // Columns [first, last) of r (h rows, in y): y = L⁻¹ r, z = D⁻¹ y and, if p is given,
  // p = L⁻ᵀ z = (I + F)⁻¹ r. Triangular solves, not a product with the inverse, which would lose
  // the digits of an ill-conditioned block.
  void solve(int64_t h, T* y, T* z, T* p, int64_t ld, int64_t first, int64_t last) const {
    for (int64_t q = 0; q < h; q += MR) {
      subtract_product<T, true>(q, lt + q, kSweepMax, y, ld, y + q * ld, ld, first, last);
      solve_lower(l[q / MR], y + q * ld, ld, first, last);
    }
    for (int64_t i = 0; i < h; ++i) {
      const Vec<T> d = splat(inverse[i]);
      for (int64_t j = first; j < last; j += kLanes<T>) {
        const Vec<T> x = load(y + i * ld + j) * d;
        store(z + i * ld + j, x);
        if (p) store(p + i * ld + j, x);
      }
    }
    if (!p) return;
    for (int64_t q = h - MR; q >= 0; q -= MR) {
      subtract_product<T, false>(h - q - MR, lt + q * kSweepMax + q + MR, kSweepMax,
                                 p + (q + MR) * ld, ld, p + q * ld, ld, first, last);
      solve_upper(l[q / MR], p + q * ld, ld, first, last);
    }
  }
};

// a: the upper triangle of X, with zero rows and columns up to whole tiles; leading dimension lda a
// multiple of the vector length; destroyed. With `invert` its lower triangle becomes
// offset I - (I + X)⁻¹. Returns log det (I + X), NaN where I + X is not positive definite.
template <class T>
double sweep(T* a, int64_t k, int64_t lda, bool invert, bool offset, const Executor& executor) {
  constexpr int VL = kLanes<T>;
  Memory memory;
  const int64_t rows = round_up(k, MR), block = sweep_rows(k);
  // An odd number of cache lines between rows, so that a column of tiles does not fall on one set.
  const int64_t ld = lda + (lda * sizeof(T) / 64 % 2 == 0 ? 64 / int64_t(sizeof(T)) : 0);
  T *y = memory.take<T>(block * ld), *z = memory.take<T>(block * ld);
  T* p = invert ? memory.take<T>(block * ld) : nullptr;
  BlockFactor<T>& factor = *memory.take<BlockFactor<T>>(1);
  double log_det = 0;
  for (int64_t b = 0; b < rows; b += block) {
    const int64_t h = std::min(block, rows - b), end = b + h;
    if (!factor.factor(a + b * lda + b, lda, h, &log_det))
      return std::numeric_limits<double>::quiet_NaN();
    if (!invert && end >= rows) break;

    const int64_t first = invert ? 0 : end / VL * VL, vectors = (lda - first) / VL;
    executor.run(vectors, 4 * NV, [&](int64_t begin, int64_t stop) {
      const int64_t c0 = first + begin * VL, c1 = first + stop * VL;
      for (int64_t i = 0; i < h; ++i) {
        T* r = y + i * ld;
        std::memcpy(r + c0, a + (b + i) * lda + c0, (c1 - c0) * sizeof(T));
        // The block's own columns: I or X, of which the solution is (I + X)⁻¹ or I - (I + X)⁻¹.
        if (!invert) continue;
        const int64_t own = std::min(end, c1);
        if (offset)
          for (int64_t j = std::max(b, c0); j < std::min(b + i, own); ++j)
            r[j] = a[j * lda + b + i];
        else
          for (int64_t j = std::max(b, c0); j < own; ++j) r[j] = T(b + i == j);
      }
      factor.solve(h, y, z, p, ld, c0, c1);
    });

    // Rows are of unequal length: each thread takes rows from both ends.
    const int64_t tiles = rows / MR;
    const auto update = [&](int64_t i, int64_t c0, int64_t c1) {
      subtract_product<T, true>(h, y + i, ld, z, ld, a + i * lda, lda, c0, c1);
    };
    const auto update_row = [&](int64_t i) {
      if (i >= end) {
        if (invert && b > 0) update(i, 0, round_up(b, VL));
        update(i, i / VL * VL, lda);
      } else if (invert && i < b) {
        update(i, 0, round_up(i + MR, VL));
      }
    };
    executor.run(ceil_div(tiles, 2), 1, [&](int64_t begin, int64_t stop) {
      for (int64_t t = begin; t < stop; ++t) {
        update_row(t * MR);
        if (tiles - 1 - t != t) update_row((tiles - 1 - t) * MR);
      }
    });
    if (!invert) continue;
    for (int64_t i = 0; i < h; ++i) {
      T* to = a + (b + i) * lda;
      std::memcpy(to, p + i * ld, b * sizeof(T));
      for (int64_t j = b; j < end; ++j) to[j] = offset ? p[i * ld + j] : -p[i * ld + j];
    }
    transpose(p + end, ld, h, rows - end, a + end * lda + b, lda);
  }
  return log_det;
}
