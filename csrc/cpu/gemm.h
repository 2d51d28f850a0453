// Matrix products on packed panels. Included inside an instruction-set namespace after simd.h.
//
// One register tile of MR x NR outputs serves every product of the project: the Gram matrix, the
// rank-MR updates of the factorisation, and the backward product. The right operand B is stored as
// panels: panel p holds columns [p NR, p NR + NR), row after row, padded with zeros; so the inner
// loop reads NR contiguous values and MR scalars per step and writes nothing.

#if MMAE_VECTOR_BYTES == 64  // 32 registers: 24 accumulators + 3 for B + 1 for A
constexpr int MR = 8, NV = 3;
#else  // 16 registers: 8 accumulators + 2 for B + 1 for A
constexpr int MR = 4, NV = 2;
#endif

template <class T>
constexpr int NR = NV * kLanes<T>;

inline int64_t round_up(int64_t x, int64_t m) { return (x + m - 1) / m * m; }
inline int64_t ceil_div(int64_t x, int64_t m) { return (x + m - 1) / m; }

enum class Write { kSet, kAdd, kSubtract };

// c[i][j] (=, +=, -=) sum_k a(i, k) b[k * ldb + j] for MR rows and V vectors of columns.
// kColumns: a(i, k) = a[k * lda + i] (a panel); otherwise a(i, k) = a[i * lda + k] (rows).
template <class T, int V, bool kColumns, Write kWrite>
inline void tile(int64_t depth, const T* a, int64_t lda, const T* b, int64_t ldb, T* c,
                 int64_t ldc) {
  Vec<T> acc[MR][V];
  for (int i = 0; i < MR; ++i)
    for (int v = 0; v < V; ++v) acc[i][v] = Vec<T>{};
  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> bk[V];
    for (int v = 0; v < V; ++v) bk[v] = load(b + k * ldb + v * kLanes<T>);
    for (int i = 0; i < MR; ++i) {
      const T x = kColumns ? a[k * lda + i] : a[i * lda + k];
      for (int v = 0; v < V; ++v) acc[i][v] += splat(x) * bk[v];
    }
  }
  for (int i = 0; i < MR; ++i)
    for (int v = 0; v < V; ++v) {
      T* p = c + i * ldc + v * kLanes<T>;
      if constexpr (kWrite == Write::kSet) store(p, acc[i][v]);
      if constexpr (kWrite == Write::kAdd) store(p, load(p) + acc[i][v]);
      if constexpr (kWrite == Write::kSubtract) store(p, load(p) - acc[i][v]);
    }
}

// The same for a width given at run time, in vectors, 1..NV.
template <class T, bool kColumns, Write kWrite>
inline void tile_of_width(int vectors, int64_t depth, const T* a, int64_t lda, const T* b,
                          int64_t ldb, T* c, int64_t ldc) {
  if (vectors == NV) return tile<T, NV, kColumns, kWrite>(depth, a, lda, b, ldb, c, ldc);
  if constexpr (NV >= 3)
    if (vectors == 2) return tile<T, 2, kColumns, kWrite>(depth, a, lda, b, ldb, c, ldc);
  tile<T, 1, kColumns, kWrite>(depth, a, lda, b, ldb, c, ldc);
}

// Rows [i0, i0 + MR) of the upper triangle of G (k x k, leading dimension ldg) from packed panels
// of the k columns: G (+)= Bᵀ B. Columns left of i0 (down to a multiple of the panel) may be
// written too, with their true values.
template <class T, Write kWrite>
inline void gram_rows(const T* panels, int64_t depth, int64_t k, int64_t i0, T* g, int64_t ldg) {
  const T* a = panels + i0 / NR<T> * NR<T> * depth + i0 % NR<T>;
  for (int64_t j0 = i0 / NR<T> * NR<T>; j0 < k; j0 += NR<T>) {
    const T* b = panels + j0 * depth;
    // Whole vectors of this panel that lie left of the diagonal are skipped.
    const int64_t skip = j0 < i0 ? (i0 - j0) / kLanes<T> : 0;
    const int64_t end = std::min<int64_t>(NV, ceil_div(k - j0, kLanes<T>));
    tile_of_width<T, true, kWrite>(int(end - skip), depth, a, NR<T>, b + skip * kLanes<T>, NR<T>,
                                   g + i0 * ldg + j0 + skip * kLanes<T>, ldg);
  }
}

// out(j, :) = column j of the k x k matrix g whose upper triangle is valid.
template <class T>
inline void mirror_upper(T* g, int64_t k, int64_t ldg) {
  constexpr int64_t B = 16;  // block, so that both sides stay in few cache lines
  for (int64_t i0 = 0; i0 < k; i0 += B)
    for (int64_t j0 = i0; j0 < k; j0 += B)
      for (int64_t i = i0; i < std::min(i0 + B, k); ++i)
        for (int64_t j = std::max(j0, i + 1); j < std::min(j0 + B, k); ++j)
          g[j * ldg + i] = g[i * ldg + j];
}
