// Pivots of shifted block tridiagonal matrices, several shifts side by side: a vector lane each, in
// float64. Included inside an instruction-set namespace after blocks.h.

using Wide = Vec<double>;

constexpr int64_t kLowerEntries = kBlock * (kBlock + 1) / 2;
constexpr int kRows = 4, kColumns = MMAE_VECTOR_BYTES == 64 ? 4 : 2;  // what fits the registers

// s[r][c] += sum_q a[q * aq + r * ar] b[q * kBlock + c], q in [from, to).
template <int R, int C>
inline void add_products(int64_t from, int64_t to, const Wide* a, int64_t aq, int64_t ar,
                         const Wide* b, Wide (&s)[R][C]) {
  for (int64_t q = from; q < to; ++q) {
    Wide x[C];
    for (int c = 0; c < C; ++c) x[c] = b[q * kBlock + c];
    for (int r = 0; r < R; ++r) {
      const Wide y = a[q * aq + r * ar];
      for (int c = 0; c < C; ++c) s[r][c] += y * x[c];
    }
  }
}

// L D Lᵀ of the block a (its lower triangle): L below the diagonal, inverse = D⁻¹; *least is
// lowered to the smallest pivot, which is not positive (or NaN) if the matrix is not positive
// definite.
inline void factor_blocks(Wide* a, Wide* inverse, Wide* least) {
  Wide scaled[kBlockEntries];  // D Lᵀ
  for (int64_t j0 = 0; j0 < kBlock; j0 += kRows)
    for (int64_t i0 = j0; i0 < kBlock; i0 += kRows)
      for (int64_t j = j0; j < j0 + kRows; ++j) {
        // Column j of these rows, with all columns before it.
        Wide sum[kRows][1] = {};
        add_products<kRows, 1>(0, j, a + i0 * kBlock, 1, kBlock, scaled + j, sum);
        for (int64_t i = i0; i < i0 + kRows; ++i) {
          if (i < j) continue;
          const Wide entry = a[i * kBlock + j] - sum[i - i0][0];
          if (i == j) {
            *least = entry >= *least ? *least : entry;
            inverse[j] = 1 / entry;
          }
          scaled[j * kBlock + i] = entry;
          a[i * kBlock + j] = entry * inverse[j];
        }
      }
}

// y = L⁻¹ y; of a lower triangle (the rest zero) if `lower`.
inline void solve_lower_blocks(const Wide* l, Wide* y, bool lower) {
  for (int64_t i0 = 0; i0 < kBlock; i0 += kRows)
    for (int64_t c0 = 0; c0 < (lower ? i0 + kRows : kBlock); c0 += kColumns) {
      Wide sum[kRows][kColumns] = {};
      add_products(lower ? c0 : 0, i0, l + i0 * kBlock, 1, kBlock, y + c0, sum);
      for (int64_t i = 0; i < kRows; ++i)
        for (int64_t c = 0; c < kColumns; ++c) {
          Wide* at = y + (i0 + i) * kBlock + c0 + c;
          for (int64_t q = 0; q < i; ++q)
            sum[i][c] += l[(i0 + i) * kBlock + i0 + q] * y[(i0 + q) * kBlock + c0 + c];
          *at -= sum[i][c];
        }
    }
}

// y = L⁻ᵀ y.
inline void solve_upper_blocks(const Wide* l, Wide* y) {
  for (int64_t i0 = kBlock - kRows; i0 >= 0; i0 -= kRows)
    for (int64_t c0 = 0; c0 < kBlock; c0 += kColumns) {
      Wide sum[kRows][kColumns] = {};
      add_products(i0 + kRows, kBlock, l + i0, kBlock, 1, y + c0, sum);
      for (int64_t i = kRows - 1; i >= 0; --i)
        for (int64_t c = 0; c < kColumns; ++c) {
          for (int64_t q = i + 1; q < kRows; ++q)
            sum[i][c] += l[(i0 + q) * kBlock + i0 + i] * y[(i0 + q) * kBlock + c0 + c];
          y[(i0 + i) * kBlock + c0 + c] -= sum[i][c];
        }
    }
}

// out = yᵀ D⁻¹ y, of which the lower triangle is used; y becomes D⁻¹ y.
inline void square_blocks(Wide* y, const Wide* inverse, bool lower, Wide* out) {
  Wide z[kBlockEntries];
  for (int64_t q = 0; q < kBlock; ++q)
    for (int64_t c = 0; c < kBlock; ++c) z[q * kBlock + c] = inverse[q] * y[q * kBlock + c];
  for (int64_t r0 = 0; r0 < kBlock; r0 += kRows)
    for (int64_t c0 = 0; c0 < r0 + kRows; c0 += kColumns) {
      Wide sum[kRows][kColumns] = {};
      add_products(lower ? r0 : 0, kBlock, z + r0, kBlock, 1, y + c0, sum);
      for (int64_t r = 0; r < kRows; ++r)
        for (int64_t c = 0; c < kColumns; ++c) out[(r0 + r) * kBlock + c0 + c] = sum[r][c];
    }
  std::copy_n(z, kBlockEntries, y);
}

// The lower triangle of scale D_i + u; zeros above it, which are loaded too.
inline void shifted_block(const BlockTridiagonal& b, int64_t i, double scale, Wide u, Wide* a) {
  const float* d = b.diagonal(i);
  for (int64_t r = 0; r < kBlock; ++r) {
    for (int64_t c = 0; c <= r; ++c) a[r * kBlock + c] = splat(scale * double(d[r * b.lda + c]));
    a[r * kBlock + r] += u;
    std::fill_n(a + r * (kBlock + 1) + 1, kBlock - 1 - r, Wide{});
  }
}

// The pivots of M = scale T + u from the last block to the first: before(i, eta_i), its lower
// triangle; after(i, L, D⁻¹, y) with eta_i = L D Lᵀ and y = D⁻¹ L⁻¹ M_{i,i-1}, which block 0 lacks.
template <class Before, class After>
void pivots_from_bottom(const BlockTridiagonal& b, double scale, Wide u, Wide* least,
                        const Before& before, const After& after) {
  Wide a[kBlockEntries], inverse[kBlock], y[kBlockEntries], next[kBlockEntries] = {};
  for (int64_t i = b.blocks - 1; i >= 0; --i) {
    shifted_block(b, i, scale, u, a);
    for (int64_t r = 0; r < kBlock; ++r)
      for (int64_t c = 0; c <= r; ++c) a[r * kBlock + c] -= next[r * kBlock + c];
    before(i, a);
    factor_blocks(a, inverse, least);
    if (i > 0) {
      const float* off = b.right + (i - 1) * kBlockEntries;
      for (int64_t r = 0; r < kBlock; ++r)
        for (int64_t c = 0; c < kBlock; ++c)
          y[r * kBlock + c] = splat(scale * double(off[c * kBlock + r]));
      solve_lower_blocks(a, y, false);
      square_blocks(y, inverse, false, next);
    }
    after(i, a, inverse, y);
  }
}
