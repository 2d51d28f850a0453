// Small matrices, one per vector lane. Included inside an instruction-set namespace after gram.h.
//
// A vector holds the same entry of kLanes matrices, so every step below is written as for one
// matrix and has no edges, no sums across a vector, and a division or square root that serves
// kLanes matrices. From Z to the weight a group of matrices stays in a second-level cache; what
// differs between the lanes (convergence of an eigenvalue, rows that are dropped) is a masked
// assignment.
//
// Symmetric matrices are packed: row i of the lower triangle starts at i (i + 1) / 2. Orders are
// padded with zero rows to whole blocks of LB.
//
// A lane that meets a number out of range (a square that vanishes or overflows, a pivot that
// rounding has swamped, no convergence) is reported as failed, and its matrix is computed alone.

constexpr int LB = 4;

template <class T>
using Index = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
template <class T>
using Flags = Vec<Index<T>>;  // a lane is 0 or -1

template <class T>
inline Vec<T> sqrt_lanes(Vec<T> v) {
  T x[kLanes<T>];
  store(x, v);
  for (int i = 0; i < kLanes<T>; ++i) x[i] = std::sqrt(x[i]);
  return load(x);
}

template <class T>
inline Vec<T> abs_lanes(Vec<T> v) {
  return v < 0 ? -v : v;
}

template <class T>
inline bool any(Flags<T> flags) {
  Index<T> x[kLanes<T>], sum = 0;
  __builtin_memcpy(x, &flags, sizeof x);
  for (int i = 0; i < kLanes<T>; ++i) sum |= x[i];
  return sum != 0;
}

inline int64_t packed_row(int64_t i) { return i * (i + 1) / 2; }

// s[i][j] += sum_p a[i][p] b[j][p], p < depth: the inner loop of everything cubic. kLower: only
// where j <= i. between(): called at every step.
template <class T, bool kLower, class F>
inline void dots(int64_t depth, const Vec<T>* const (&a)[LB], const Vec<T>* const (&b)[LB],
                 Vec<T> (&s)[LB][LB], const F& between) {
  constexpr int C = MMAE_VECTOR_BYTES == 64 ? LB : LB / 2;  // what fits the registers
  for (int c = 0; c < LB; c += C) {
    Vec<T> acc[LB][C];
    for (int i = 0; i < LB; ++i)
      for (int j = 0; j < C; ++j) acc[i][j] = s[i][c + j];
    for (int64_t p = 0; p < depth; ++p) {
      between();
      Vec<T> x[C];
      for (int j = 0; j < C; ++j) x[j] = b[c + j][p];
      for (int i = 0; i < LB; ++i) {
        const Vec<T> y = a[i][p];
        for (int j = 0; j < C; ++j)
          if (!kLower || c + j <= i) acc[i][j] += y * x[j];
      }
    }
    for (int i = 0; i < LB; ++i)
      for (int j = 0; j < C; ++j) s[i][c + j] = acc[i][j];
  }
}
template <class T>
inline void dots(int64_t depth, const Vec<T>* const (&a)[LB], const Vec<T>* const (&b)[LB],
                 Vec<T> (&s)[LB][LB]) {
  dots<T, false>(depth, a, b, s, [] {});
}

// --------------------------------------------------------------------------------------------------
// From features to Gram matrices and back to memory

// Matrices [first, first + count) of out (batch, rows, columns); fill(i, to) writes row i of all.
template <class T, class F>
void store_rows(const F& fill, int64_t rows, int64_t columns, int64_t first, int64_t count,
                int64_t batch, T* out) {
  constexpr int VL = kLanes<T>;
  const int64_t size = rows * columns;
  // What no cache will hold goes past them, where every store is aligned.
  const bool past = batch * size * int64_t(sizeof(T)) > kPastBatch && size % VL == 0 &&
                    reinterpret_cast<uintptr_t>(out) % kVectorBytes == 0;
  Memory memory;
  Vec<T>* waiting = memory.take<Vec<T>>(columns + VL);  // what does not fill a vector yet
  int64_t at = 0, held = 0;
  const auto write = [&](Vec<T>(&x)[VL], int64_t width) {
    transpose_block<T>(x);
    for (int64_t m = 0; m < count; ++m) {
      T* to = out + (first + m) * size + at;
      if (past)
        stream(to, x[m]);
      else if (width == VL)
        store(to, x[m]);
      else
        for (int64_t q = 0; q < width; ++q) to[q] = x[m][q];
    }
    at += width;
  };
  for (int64_t i = 0; i < rows; ++i) {
    fill(i, waiting + held);
    held += columns;
    const Vec<T>* from = waiting;
    for (; held >= VL; held -= VL, from += VL) {
      Vec<T> x[VL];
      for (int q = 0; q < VL; ++q) x[q] = from[q];
      write(x, VL);
    }
    std::memmove(waiting, from, size_t(held) * sizeof(Vec<T>));
  }
  Vec<T> x[VL];
  for (int q = 0; q < VL; ++q) x[q] = q < held ? waiting[q] : Vec<T>{};
  if (held > 0) write(x, held);
}

// to[j] = value(j, G_ij), j < k: row i of the symmetric matrix whose lower triangle is packed in g.
template <class T, class F>
inline void unpack_row(const Vec<T>* g, int64_t i, int64_t k, const F& value, Vec<T>* to) {
  const Vec<T>* row = g + packed_row(i);
  for (int64_t j = 0; j <= i; ++j) to[j] = value(j, row[j]);
  for (int64_t j = i + 1; j < k; ++j) to[j] = value(j, g[packed_row(j) + i]);
}

// The lower triangles of kLanes matrices of leading dimension ld to the packed g.
template <class T>
void pack_lower(const T* const (&from)[kLanes<T>], int64_t k, int64_t ld, Vec<T>* g) {
  constexpr int VL = kLanes<T>;
  for (int64_t i = 0; i < k; ++i)
    for (int64_t j = 0; j <= i; j += VL) {
      const int64_t width = std::min<int64_t>(VL, i + 1 - j);
      Vec<T> x[VL];
      for (int m = 0; m < VL; ++m) {
        T part[VL] = {};
        std::memcpy(part, from[m] + i * ld + j, size_t(width) * sizeof(T));
        x[m] = load(part);
      }
      transpose_block<T>(x);
      std::memcpy(g + packed_row(i) + j, x, size_t(width) * sizeof(Vec<T>));
    }
}

// Matrices [first, first + count) of the batch, their prepared rows' Gram matrix and row scales.
template <class S, class T>
struct LaneGroup {
  static constexpr int VL = kLanes<T>;
  static constexpr int64_t kDepth = 32;  // of a product's depth at once: 8 rows of it fit a cache

  const Features& f;
  const int64_t first, count, k, order;  // order: k in whole blocks
  const bool samples;
  Vec<T>*g, *scale;  // packed Gram matrix (order); 1 / row norm, 0 for dropped and zero rows (n)
  bool failed[VL] = {};

  LaneGroup(const Features& features, int64_t begin, int64_t matrices, bool samples_side,
            Memory& memory)
      : f(features), first(begin), count(matrices), k(samples_side ? f.n : f.d),
        order(round_up(k, LB)), samples(samples_side) {
    g = memory.take<Vec<T>>(packed_row(order));
    scale = memory.take<Vec<T>>(std::max(f.n, order));
    for (int64_t i = 0; i < packed_row(order); ++i) g[i] = Vec<T>{};
    if (f.n * f.d > kLanesLoad) {
      copy_gram();
      return;
    }
    Memory inner;
    rows_ = memory.take<Rows<S, T>>(VL);
    // Lanes past the last matrix repeat it: they cost nothing and their results are not stored.
    for (int m = 0; m < VL; ++m)
      new (&rows_[m]) Rows<S, T>(f, first + std::min<int64_t>(m, count - 1));
    const int64_t depth_total = samples ? f.d : f.n;
    const int64_t blocks = order / LB;
    ahead_ = Prefetch(f, sizeof(S), first + VL - 1, f.batch,
                      blocks * (blocks + 1) / 2 * depth_total, VL);
    Vec<T>* panel = inner.take<Vec<T>>(order * kDepth);
    for (int64_t i = k * kDepth; i < order * kDepth; ++i) panel[i] = Vec<T>{};
    for (int64_t at = 0; at < depth_total; at += kDepth) {
      const int64_t depth = std::min(kDepth, depth_total - at);
      if (samples) {
        for (int64_t i = 0; i < f.n; ++i) fetch(i, at, at + depth, panel + i * kDepth, 1);
      } else {
        for (int64_t i = 0; i < depth; ++i) fetch(at + i, 0, f.d, panel + i, kDepth);
        scale_rows(panel, at, depth);
      }
      add_product(panel, depth);
    }
    if (samples) scale_gram();
    for (int64_t i = f.n; i < order; ++i) scale[i] = Vec<T>{};
  }

  // W' of V = factor · v, v packed (see kernels.inl), to the batch's weight: 2 V, on the samples
  // side with the normalisation folded in, 2 factor · D⁻¹ (v - Diag(diag(v G))) D⁻¹.
  void store_weight(const Vec<T>* v, Vec<T> factor, T* weight) const {
    Memory memory;
    const Vec<T> twice = factor + factor;
    Vec<T>* projection = memory.take<Vec<T>>(order);
    for (int64_t i = 0; i < order; ++i) projection[i] = Vec<T>{};
    if (samples && f.normalize)
      for (int64_t i = 0; i < k; ++i) {
        const Vec<T>*vi = v + packed_row(i), *gi = g + packed_row(i);
        Vec<T> sum = vi[i] * gi[i];
        for (int64_t j = 0; j < i; ++j) {
          const Vec<T> x = vi[j] * gi[j];
          sum += x;
          projection[j] += x;
        }
        projection[i] += sum;
      }
    const auto fill = [&](int64_t i, Vec<T>* to) {
      if (!samples) return unpack_row<T>(v, i, k, [&](int64_t, Vec<T> x) { return twice * x; }, to);
      const Vec<T> left = twice * scale[i];
      unpack_row<T>(v, i, k, [&](int64_t j, Vec<T> x) { return left * scale[j] * x; }, to);
      to[i] = left * scale[i] * (v[packed_row(i) + i] - projection[i]);
    };
    store_rows<T>(fill, k, k, first, count, f.batch, weight);
  }

 private:
  void copy_gram() {
    Memory inner;
    const T *from[VL], *row_scale[VL];
    int64_t ld = 0;
    for (int m = 0; m < count; ++m) {
      const Gram<S, T> one(f, first + m, first + count, samples, false, Executor{nullptr}, inner);
      from[m] = one.g;
      row_scale[m] = one.scale;
      ld = one.ldg;
    }
    for (int m = int(count); m < VL; ++m) from[m] = from[0], row_scale[m] = row_scale[0];
    Vec<T> x[VL];
    for (int64_t j = 0; j < k; ++j)
      for (int64_t i = j / VL * VL; i < k; i += VL) {
        for (int m = 0; m < VL; ++m) x[m] = load(from[m] + j * ld + i);
        transpose_block<T>(x);
        for (int64_t q = std::max<int64_t>(0, j - i); q < std::min<int64_t>(VL, k - i); ++q)
          g[packed_row(i + q) + j] = x[q];
      }
    for (int64_t i = 0; i < f.n; ++i)
      for (int m = 0; m < VL; ++m) scale[i][m] = row_scale[m][i];
    for (int64_t i = f.n; i < order; ++i) scale[i] = Vec<T>{};
  }

  Rows<S, T>* rows_;
  Prefetch ahead_;  // the next group: short rows of kLanes matrices are no pattern to the hardware

  // Columns [c0, c1) of row i of every matrix to `to`, `step` apart. Dropped rows become zero.
  void fetch(int64_t i, int64_t c0, int64_t c1, Vec<T>* to, int64_t step) {
    Flags<T> kept{};
    if (f.mask)
      for (int m = 0; m < VL; ++m) kept[m] = rows_[m].kept(i) ? -1 : 0;
    for (int64_t c = c0; c < c1; c += VL) {
      const int64_t width = std::min<int64_t>(VL, c1 - c);
      Vec<T> x[VL];
      if constexpr (std::is_same_v<S, T>) {
        if (width == VL && f.column_stride == 1 && !f.mask) {  // without a question in the loop
          for (int m = 0; m < VL; ++m) x[m] = load(rows_[m].z + (i * f.row_stride + c));
          transpose_block<T>(x);
          for (int q = 0; q < VL; ++q) to[(c - c0 + q) * step] = x[q];
          continue;
        }
      }
      for (int m = 0; m < VL; ++m) {
        T buffer[VL];
        const T* from = rows_[m].fetch(i, c, c + width, buffer);
        if (width == VL) {
          x[m] = load(from);
        } else {
          T tail[VL] = {};
          std::memcpy(tail, from, size_t(width) * sizeof(T));
          x[m] = load(tail);
        }
      }
      transpose_block<T>(x);
      for (int64_t q = 0; q < width; ++q)
        to[(c - c0 + q) * step] = f.mask ? (kept ? x[q] : Vec<T>{}) : x[q];
    }
  }

  // g += P Pᵀ for the panel P (order x depth).
  void add_product(const Vec<T>* panel, int64_t depth) {
    for (int64_t i = 0; i < order; i += LB)
      for (int64_t j = 0; j <= i; j += LB) {
        const Vec<T>*a[LB], *b[LB];
        for (int r = 0; r < LB; ++r)
          a[r] = panel + (i + r) * kDepth, b[r] = panel + (j + r) * kDepth;
        Vec<T> s[LB][LB] = {};
        const auto between = [&] { ahead_.some(); };
        if (i == j)
          dots<T, true>(depth, a, b, s, between);
        else
          dots<T, false>(depth, a, b, s, between);
        for (int r = 0; r < LB; ++r)
          for (int c = 0; c < (i == j ? r + 1 : LB); ++c) g[packed_row(i + r) + j + c] += s[r][c];
      }
  }

  // 1 / sqrt(square), 0 where the row is zero; a lane whose square is out of range fails.
  Vec<T> inverse_norm_lanes(Vec<T> square, int64_t i) {
    const Flags<T> usable = (square > T(kSquareLow<T>)) & (square < T(kSquareHigh<T>));
    if (any<T>(~usable))
      for (int m = 0; m < VL; ++m)
        if (!usable[m]) failed[m] |= square[m] != 0 || (rows_[m].kept(i) && !rows_[m].zero(i));
    return usable ? 1 / sqrt_lanes<T>(square) : Vec<T>{};
  }

  Vec<T> ones_where_kept(int64_t i) const {
    Vec<T> x = splat(T(1));
    if (f.mask)
      for (int m = 0; m < VL; ++m) x[m] = rows_[m].kept(i);
    return x;
  }

  // Features side: rows [r0, r0 + depth), which are columns of the panel, take their scale.
  void scale_rows(Vec<T>* panel, int64_t r0, int64_t depth) {
    if (!f.normalize) {
      for (int64_t i = 0; i < depth; ++i) scale[r0 + i] = ones_where_kept(r0 + i);
      return;
    }
    Vec<T> squares[kDepth] = {};
    for (int64_t c = 0; c < k; ++c)
      for (int64_t i = 0; i < depth; ++i) {
        const Vec<T> x = panel[c * kDepth + i];
        squares[i] += x * x;
      }
    for (int64_t i = 0; i < depth; ++i)
      scale[r0 + i] = squares[i] = inverse_norm_lanes(squares[i], r0 + i);
    for (int64_t c = 0; c < k; ++c)
      for (int64_t i = 0; i < depth; ++i) panel[c * kDepth + i] *= squares[i];
  }

  // Samples side: the product of raw rows is scaled after; the diagonal is 1 by definition.
  void scale_gram() {
    for (int64_t i = 0; i < k; ++i) {
      Vec<T>* row = g + packed_row(i);
      if (!f.normalize) {
        scale[i] = ones_where_kept(i);
        continue;
      }
      const Vec<T> s = scale[i] = inverse_norm_lanes(row[i], i);
      for (int64_t j = 0; j < i; ++j) row[j] *= s * scale[j];
      row[i] = s > 0 ? splat(T(1)) : Vec<T>{};
    }
  }
};

template <class S, class T>
void gram_lanes(const Features& f, bool samples, T* out, T* inverse_norm, T* mean, int64_t first,
                int64_t count) {
  Memory memory;
  const LaneGroup<S, T> group(f, first, count, samples, memory);
  const int64_t k = group.k;
  const auto fill = [&](int64_t i, Vec<T>* to) {
    unpack_row<T>(group.g, i, k, [](int64_t, Vec<T> x) { return x; }, to);
  };
  store_rows<T>(fill, k, k, first, count, f.batch, out);
  store_rows<T>([&](int64_t, Vec<T>* to) { std::copy_n(group.scale, f.n, to); }, 1, f.n, first,
                count, f.batch, inverse_norm);
  std::fill_n(mean + first * f.d, count * f.d, T(0));
  for (int m = 0; m < count; ++m)
    if (group.failed[m])
      gram_one<S, T>(f, first + m, first + m + 1, samples, out, inverse_norm, mean,
                     Executor{nullptr});
}

// --------------------------------------------------------------------------------------------------
// Which batches go this way

// Whether lanes serve matrices of order k; `most` is the limit of plan.h for the quantity.
template <class T>
bool in_lanes(const Features& f, int64_t k, int64_t most, Threads threads) {
  return k > 0 && k <= most && !f.center && f.batch >= kLanes<T> / 2 * threads.count;
}

// The same for what is little more than the product itself.
template <class T>
bool product_in_lanes(const Features& f, int64_t k, Threads threads) {
  return f.n * f.d <= kLanesLoad && in_lanes<T>(f, k, kLanesProduct, threads);
}

// Shares groups of kLanes matrices among threads: body(first, count).
template <class T, class F>
void over_groups(const Features& f, Threads threads, const F& body) {
  constexpr int VL = kLanes<T>;
  Executor{threads.parallel}.run(ceil_div(f.batch, VL), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i * VL, std::min<int64_t>(VL, f.batch - i * VL));
  });
}
