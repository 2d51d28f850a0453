// log det (I + X) and (I + X)⁻¹ of a symmetric positive semidefinite X, in place, by the block
// sweep operator. Included inside an instruction-set namespace after gemm.h.
//
// Sweeping block b of a symmetric A with A_bb = L D Lᵀ, R = A_b,:, Y = L⁻¹ R and P = A_bb⁻¹ R:
//     A_ij -= Y_iᵀ D⁻¹ Y_j (i, j outside b),   A_b,: = P,   A_:,b = Pᵀ,   A_bb = -A_bb⁻¹.
// After all blocks A holds -A⁻¹, and the pivots in the D's multiply to det A. The cost is
// k³ multiply-adds in rank-MR updates on register tiles; without the inverse only the trailing
// upper triangle is updated, k³/6, which is a Cholesky factorisation in other words.
//
// A = I + X, but the identity is never stored: it is added to a pivot when its turn comes. So a
// small X keeps all its digits, where 1 + x would round them away, k times in the same direction.
// For the same reason the inverse of a small X comes without its identity (`offset`); of a large X
// it would be (I + X)⁻¹ - I that loses digits.

// L D Lᵀ of I + X for a block X (MR x MR): unit lower l, inverse[p] = 1 / D_p. Adds the logs of the
// pivots D_p to *log_det; returns false at a pivot that cannot be one of I + X, which are at least
// 1 (NaN included): a float32 pivot much below 1 tells that rounding of X has swamped the identity.
template <class T>
inline bool factor_block(const T* x, T* l, T* inverse, double* log_det) {
  T d[MR * MR];
  std::memcpy(d, x, sizeof d);
  double product = 1;
  for (int p = 0; p < MR; ++p) {
    const double pivot = 1 + double(d[p * MR + p]);
    if (!(pivot > (sizeof(T) == 4 ? 0.999 : 0))) return false;
    product *= pivot;
    if (sizeof(T) == 8 || p % 4 == 3) {  // 4 float32 pivots cannot overflow a double
      *log_det += std::log(product);
      product = 1;
    }
    inverse[p] = T(1 / pivot);
    for (int i = p + 1; i < MR; ++i) l[i * MR + p] = d[p * MR + i] * inverse[p];
    for (int i = p + 1; i < MR; ++i)
      for (int j = i; j < MR; ++j) d[i * MR + j] -= l[i * MR + p] * d[p * MR + j];
  }
  return true;
}

// x (MR x MR), a block X, becomes (I + X)⁻¹ - offset I, by Gauss-Jordan on the pivots of
// factor_block.
template <class T>
inline void invert_block(T* x, bool offset) {
  for (int p = 0; p < MR; ++p) {
    const double pivot = 1 + double(x[p * MR + p]);
    const T inverse = T(1 / pivot);
    T row[MR];
    for (int j = 0; j < MR; ++j) row[j] = (j == p ? T(1) : x[p * MR + j]) * inverse;
    for (int i = 0; i < MR; ++i) {
      if (i == p) continue;
      const T factor = x[i * MR + p];
      for (int j = 0; j < MR; ++j)
        x[i * MR + j] = (j == p ? T(0) : x[i * MR + j]) - factor * row[j];
    }
    for (int j = 0; j < MR; ++j) x[p * MR + j] = row[j];
    if (offset) x[p * MR + p] = T((1 - pivot) / pivot);
  }
}

// For rows r (MR x lda) from column `first` on: y = L⁻¹ r, z = D⁻¹ y and, if p is given,
// p = L⁻ᵀ z = (I + X_bb)⁻¹ r. Triangular solves, not a product with the inverse, which would lose
// the digits of an ill-conditioned block.
template <class T>
inline void solve_rows(const T* l, const T* inverse, const T* r, int64_t first, int64_t lda, T* y,
                       T* z, T* p) {
  for (int64_t j = first; j < lda; j += kLanes<T>) {
    Vec<T> v[MR];
    for (int i = 0; i < MR; ++i) v[i] = load(r + i * lda + j);
    for (int q = 0; q < MR; ++q)
      for (int i = q + 1; i < MR; ++i) v[i] -= splat(l[i * MR + q]) * v[q];
    for (int i = 0; i < MR; ++i) store(y + i * lda + j, v[i]);
    for (int i = 0; i < MR; ++i) v[i] *= splat(inverse[i]);
    for (int i = 0; i < MR; ++i) store(z + i * lda + j, v[i]);
    if (!p) continue;
    for (int q = MR - 1; q >= 0; --q)
      for (int i = 0; i < q; ++i) v[i] -= splat(l[q * MR + i]) * v[q];
    for (int i = 0; i < MR; ++i) store(p + i * lda + j, v[i]);
  }
}

// a: X, with zero rows and columns up to whole tiles; leading dimension lda a multiple of the
// vector length. With `invert` all of X must be given and becomes (I + X)⁻¹ - offset I; without,
// only the upper triangle is read, and a is destroyed. work: 3 MR lda. Returns log det (I + X), NaN
// where I + X is not positive definite.
template <class T>
double sweep(T* a, int64_t k, int64_t lda, bool invert, bool offset, T* work) {
  const int64_t rows = round_up(k, MR);
  T *y = work, *z = y + MR * lda, *p = z + MR * lda;
  double log_det = 0;
  for (int64_t b = 0; b < rows; b += MR) {
    T block[MR * MR], l[MR * MR], inverse[MR];
    for (int i = 0; i < MR; ++i)
      for (int j = 0; j < MR; ++j)
        block[i * MR + j] = a[(b + std::min(i, j)) * lda + b + std::max(i, j)];
    if (!factor_block(block, l, inverse, &log_det)) return std::numeric_limits<double>::quiet_NaN();
    if (!invert && b + MR >= rows) break;
    const int64_t first = invert ? 0 : b / kLanes<T> * kLanes<T>;
    solve_rows<T>(l, inverse, a + b * lda, first, lda, y, z, invert ? p : nullptr);
    for (int64_t i = invert ? 0 : b + MR; i < rows; i += MR) {
      if (i == b) continue;
      const int64_t start = invert ? 0 : i / kLanes<T> * kLanes<T>;
      for (int64_t j = start; j < lda; j += NR<T>)
        tile_of_width<T, true, Write::kSubtract>(int(std::min<int64_t>(NV, (lda - j) / kLanes<T>)),
                                                 MR, y + i, lda, z + j, lda, a + i * lda + j, lda);
    }
    if (!invert) continue;
    invert_block(block, offset);
    for (int i = 0; i < MR; ++i) {
      std::memcpy(a + (b + i) * lda, p + i * lda, lda * sizeof(T));
      for (int j = 0; j < MR; ++j) a[(b + i) * lda + b + j] = -block[i * MR + j];
    }
    for (int64_t i = 0; i < rows; ++i)
      if (i < b || i >= b + MR)
        for (int j = 0; j < MR; ++j) a[i * lda + b + j] = p[j * lda + i];
  }
  if (invert)
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < lda; ++j) a[i * lda + j] = -a[i * lda + j];
  return log_det;
}
