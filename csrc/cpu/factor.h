// log det (I + X) and (I + X)⁻¹ of a symmetric positive semidefinite X, in place, by the block
// sweep operator. Included inside an instruction-set namespace after gemm.h.
//
// Sweeping block b of a symmetric A with D = A_bb, R = A_b,: and P = D⁻¹ R:
//     A_ij -= R_iᵀ P_j (i, j outside b),   A_b,: = P,   A_:,b = Pᵀ,   A_bb = -D⁻¹.
// After all blocks A holds -A⁻¹, and the pivots met inside the D's multiply to det A. The cost is
// k³ multiply-adds in rank-MR updates on register tiles; without the inverse only the trailing
// upper triangle is updated, k³/6, which is a Cholesky factorisation in other words.
//
// A = I + X, but the identity is never stored: it is added to a pivot when its turn comes. So a
// small X keeps all its digits, where 1 + x would round them away, k times in the same direction.
// For the same reason the inverse of a small X comes without its identity (`offset`); of a large X
// it would be (I + X)⁻¹ - I that loses digits.

// d (MR x MR), a block X, becomes (I + X)⁻¹ - offset I by unblocked Gauss-Jordan. Adds the log of
// the pivots to *log_det; returns false at a pivot that is not positive (NaN included).
template <class T>
inline bool invert_block(T* d, bool offset, double* log_det) {
  double product = 1;
  for (int p = 0; p < MR; ++p) {
    const double pivot = 1 + double(d[p * MR + p]);
    if (!(pivot > 0)) return false;
    product *= pivot;
    if (sizeof(T) == 8 || p % 4 == 3) {  // 4 float32 pivots cannot overflow a double
      *log_det += std::log(product);
      product = 1;
    }
    const T inverse = T(1 / pivot);
    T row[MR];
    for (int j = 0; j < MR; ++j) row[j] = (j == p ? T(1) : d[p * MR + j]) * inverse;
    for (int i = 0; i < MR; ++i) {
      if (i == p) continue;
      const T factor = d[i * MR + p];
      for (int j = 0; j < MR; ++j)
        d[i * MR + j] = (j == p ? T(0) : d[i * MR + j]) - factor * row[j];
    }
    for (int j = 0; j < MR; ++j) d[p * MR + j] = row[j];
    if (offset) d[p * MR + p] = T((1 - pivot) / pivot);
  }
  return true;
}

// a: X, with zero rows and columns up to whole tiles; leading dimension lda a multiple of the
// vector length. With `invert` all of X must be given and becomes (I + X)⁻¹ - offset I; without,
// only the upper triangle is read, and a is destroyed. work: 2 MR lda. Returns log det (I + X), NaN
// where I + X is not positive definite.
template <class T>
double sweep(T* a, int64_t k, int64_t lda, bool invert, bool offset, T* work) {
  const int64_t rows = round_up(k, MR);
  T* r = work;
  T* p = work + MR * lda;
  double log_det = 0;
  for (int64_t b = 0; b < rows; b += MR) {
    T d[MR * MR];
    for (int i = 0; i < MR; ++i)
      for (int j = 0; j < MR; ++j)
        d[i * MR + j] = a[(b + std::min(i, j)) * lda + b + std::max(i, j)];
    if (!invert_block(d, offset, &log_det)) return std::numeric_limits<double>::quiet_NaN();
    const int64_t first = invert ? 0 : b / kLanes<T> * kLanes<T>;
    if (!invert && b + MR >= rows) break;
    for (int i = 0; i < MR; ++i)
      std::memcpy(r + i * lda + first, a + (b + i) * lda + first, (lda - first) * sizeof(T));
    // P = D⁻¹ R, or R + (D⁻¹ - I) R.
    if (offset)
      for (int i = 0; i < MR; ++i)
        std::memcpy(p + i * lda + first, r + i * lda + first, (lda - first) * sizeof(T));
    else
      for (int i = 0; i < MR; ++i) std::memset(p + i * lda + first, 0, (lda - first) * sizeof(T));
    for (int64_t j = first; j < lda; j += NR<T>)
      tile_of_width<T, false, Write::kAdd>(int(std::min<int64_t>(NV, (lda - j) / kLanes<T>)), MR, d,
                                           MR, r + j, lda, p + j, lda);
    for (int64_t i = invert ? 0 : b + MR; i < rows; i += MR) {
      if (i == b) continue;
      const int64_t start = invert ? 0 : i / kLanes<T> * kLanes<T>;
      for (int64_t j = start; j < lda; j += NR<T>)
        tile_of_width<T, true, Write::kSubtract>(int(std::min<int64_t>(NV, (lda - j) / kLanes<T>)),
                                                 MR, r + i, lda, p + j, lda, a + i * lda + j, lda);
    }
    if (!invert) continue;
    for (int i = 0; i < MR; ++i) {
      std::memcpy(a + (b + i) * lda, p + i * lda, lda * sizeof(T));
      for (int j = 0; j < MR; ++j) a[(b + i) * lda + b + j] = -d[i * MR + j];
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
