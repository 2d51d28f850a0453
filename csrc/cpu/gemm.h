// Matrix products on packed panels. Included inside an instruction-set namespace after simd.h and
// threads.h.
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

enum class Write { kSet, kAdd, kSubtract, kScale, kStream };  // kStream: kScale past the caches

// c[i][j] (=, +=, -=, = scale ·) sum_k a(i, k) b[k * ldb + j] for R rows and V vectors of columns.
// kColumns: a(i, k) = a[k * lda + i] (a panel); otherwise a(i, k) = a[i * lda + k] (rows).
template <class T, int V, bool kColumns, Write kWrite, int R = MR>
inline void tile(int64_t depth, const T* a, int64_t lda, const T* b, int64_t ldb, T* c, int64_t ldc,
                 T scale = 1) {
  Vec<T> acc[R][V];
  for (int i = 0; i < R; ++i)
    for (int v = 0; v < V; ++v) acc[i][v] = Vec<T>{};
  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> bk[V];
    for (int v = 0; v < V; ++v) bk[v] = load(b + k * ldb + v * kLanes<T>);
    for (int i = 0; i < R; ++i) {
      const T x = kColumns ? a[k * lda + i] : a[i * lda + k];
      for (int v = 0; v < V; ++v) acc[i][v] += splat(x) * bk[v];
    }
  }
  for (int i = 0; i < R; ++i)
    for (int v = 0; v < V; ++v) {
      T* p = c + i * ldc + v * kLanes<T>;
      if constexpr (kWrite == Write::kSet) store(p, acc[i][v]);
      if constexpr (kWrite == Write::kScale) store(p, splat(scale) * acc[i][v]);
      if constexpr (kWrite == Write::kStream) stream(p, Vec<T>(splat(scale) * acc[i][v]));
      if constexpr (kWrite == Write::kAdd) store(p, load(p) + acc[i][v]);
      if constexpr (kWrite == Write::kSubtract) store(p, load(p) - acc[i][v]);
    }
}

// The same for a width given at run time, in vectors, 1..NV.
template <class T, bool kColumns, Write kWrite, int R = MR>
inline void tile_of_width(int vectors, int64_t depth, const T* a, int64_t lda, const T* b,
                          int64_t ldb, T* c, int64_t ldc, T scale = 1) {
  if (vectors == NV) return tile<T, NV, kColumns, kWrite, R>(depth, a, lda, b, ldb, c, ldc, scale);
  if constexpr (NV >= 3)
    if (vectors == 2) return tile<T, 2, kColumns, kWrite, R>(depth, a, lda, b, ldb, c, ldc, scale);
  tile<T, 1, kColumns, kWrite, R>(depth, a, lda, b, ldb, c, ldc, scale);
}

// The same for rows given at run time too, in quarters of a tile, 1..4.
template <class T, bool kColumns, Write kWrite>
inline void tile_of_size(int quarters, int vectors, int64_t depth, const T* a, int64_t lda,
                         const T* b, int64_t ldb, T* c, int64_t ldc, T scale = 1) {
  const auto run = [&](auto rows) {
    tile_of_width<T, kColumns, kWrite, decltype(rows)::value>(vectors, depth, a, lda, b, ldb, c,
                                                              ldc, scale);
  };
  if (quarters == 1) return run(std::integral_constant<int, MR / 4>{});
  if (quarters == 2) return run(std::integral_constant<int, MR / 2>{});
  if (quarters == 3) return run(std::integral_constant<int, MR / 4 * 3>{});
  run(std::integral_constant<int, MR>{});
}
inline int tile_quarters(int64_t rows) {
  return int(ceil_div(std::min<int64_t>(rows, MR), MR / 4));
}

// Columns [j0, j0 + NR) of the upper triangle of G (k x k, leading dimension ldg): G (+)= Bᵀ B, B
// packed in panels of `stride` rows of which `depth` are used. One panel stays in the first-level
// cache while all rows above its diagonal use it. Entries below the diagonal may be written too.
// between(): called after every tile.
//
// The last k % kLanes columns, which would not fill a vector, are computed as rows instead: of all
// the columns up to them, below the diagonal, from where complete_upper takes them.
template <class T, Write kWrite, class F>
inline void gram_panel(const T* panels, int64_t stride, int64_t depth, int64_t k, int64_t j0, T* g,
                       int64_t ldg, const F& between) {
  constexpr int VL = kLanes<T>;
  const T* b = panels + j0 * stride;
  const int64_t whole = k / VL * VL;
  const auto left = [&](int64_t i0) { return panels + i0 / NR<T> * NR<T> * stride + i0 % NR<T>; };
  const int64_t end = std::min<int64_t>(NV, (whole - j0) / VL);
  for (int64_t i0 = 0; i0 < std::min(j0 + NR<T>, whole); i0 += MR) {
    // Whole vectors that lie left of the diagonal are skipped.
    const int64_t skip = j0 < i0 ? (i0 - j0) / VL : 0;
    if (skip >= end) break;
    tile_of_size<T, true, kWrite>(tile_quarters(whole - i0), int(end - skip), depth, left(i0),
                                  NR<T>, b + skip * VL, NR<T>, g + i0 * ldg + j0 + skip * VL, ldg);
    between();
  }
  const int vectors = int(std::min<int64_t>(NV, ceil_div(k - j0, VL)));
  for (int64_t i0 = whole; i0 < k; i0 += MR) {
    tile_of_size<T, true, kWrite>(tile_quarters(k - i0), vectors, depth, left(i0), NR<T>, b, NR<T>,
                                  g + i0 * ldg + j0, ldg);
    between();
  }
}

// The upper triangle after all gram_panel calls, and zeros right of it.
template <class T>
void complete_upper(int64_t k, T* g, int64_t ldg) {
  const int64_t whole = k / kLanes<T> * kLanes<T>;
  for (int64_t j = 0; j < whole; ++j) {
    T* row = g + j * ldg;
    for (int64_t i = whole; i < k; ++i) row[i] = g[i * ldg + j];
    std::fill(row + k, row + ldg, T(0));
  }
  for (int64_t i = whole; i < k; ++i) std::fill(g + i * ldg + k, g + (i + 1) * ldg, T(0));
}

// dst (columns x rows) = transpose of src (rows x columns); whole blocks in registers.
template <class T>
inline void transpose(const T* src, int64_t lds, int64_t rows, int64_t columns, T* dst,
                      int64_t ldd) {
  constexpr int VL = kLanes<T>;
  int64_t i0 = 0;
  for (; i0 + VL <= rows; i0 += VL) {
    int64_t j0 = 0;
    for (; j0 + VL <= columns; j0 += VL) {
      Vec<T> x[VL];
      for (int i = 0; i < VL; ++i) x[i] = load(src + (i0 + i) * lds + j0);
      transpose_block<T>(x);
      for (int j = 0; j < VL; ++j) store(dst + (j0 + j) * ldd + i0, x[j]);
    }
    for (; j0 < columns; ++j0)
      for (int i = 0; i < VL; ++i) dst[j0 * ldd + i0 + i] = src[(i0 + i) * lds + j0];
  }
  for (; i0 < rows; ++i0)
    for (int64_t j = 0; j < columns; ++j) dst[j * ldd + i0] = src[i0 * lds + j];
}

// Completes the k x k matrix g from its upper triangle, or from its lower one; rows and columns up
// to a multiple of the vector length exist.
template <class T, bool kFromUpper>
inline void mirror(T* g, int64_t k, int64_t ldg, const Executor& executor) {
  constexpr int VL = kLanes<T>;
  executor.run(ceil_div(k, VL), 4, [&](int64_t begin, int64_t end) {
    for (int64_t i0 = begin * VL; i0 < end * VL; i0 += VL) {
      T* diagonal = g + i0 * ldg + i0;
      Vec<T> x[VL], y[VL];
      for (int i = 0; i < VL; ++i) x[i] = y[i] = load(diagonal + i * ldg);
      transpose_block<T>(y);
      for (int i = 0; i < VL; ++i)
        store(diagonal + i * ldg,
              kFromUpper ? lanes_above<T>(x[i], y[i], i - 1) : lanes_above<T>(y[i], x[i], i));
      for (int64_t j0 = i0 + VL; j0 < k; j0 += VL) {
        T *upper = g + i0 * ldg + j0, *lower = g + j0 * ldg + i0;
        if constexpr (kFromUpper)
          transpose(upper, ldg, VL, VL, lower, ldg);
        else
          transpose(lower, ldg, VL, VL, upper, ldg);
      }
    }
  });
}
