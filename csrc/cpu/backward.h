// Gradients of the features: products with the weight W' (see kernels.inl). Included inside an
// instruction-set namespace after gram.h.

// The product grad · W' z of weight_bwd_samples where z lies ready for it: whole tiles, the last
// ones moved back so that they end with the matrix (what they share with their neighbours comes out
// the same), and so small that nothing needs to be packed. Returns false where this does not hold.
template <class T>
bool weight_bwd_in_place(const Features& f, const Rows<T, T>& rows, int64_t index, int64_t last,
                         T grad, const T* weight, T* out) {
  constexpr int VL = kLanes<T>;
  const int64_t n = rows.n, d = rows.d, ld = rows.row_stride;
  if (rows.mask || rows.column_stride != 1 || n < MR || d < VL || n * d > kInPlace) return false;
  const bool whole = d % VL == 0 && reinterpret_cast<uintptr_t>(out) % kVectorBytes == 0;
  const int64_t calls = ceil_div(n, MR) * ceil_div(d, NR<T>);
  Prefetch ahead(f, sizeof(T), index, last, calls);
  Prefetch weights(weight + n * n, index + 1 < last ? n * n * int64_t(sizeof(T)) : 0, calls);
  for (int64_t c = 0, vectors; c < d; c += vectors * VL) {
    vectors = std::clamp<int64_t>((d - c) / VL, 1, NV);
    const int64_t c0 = std::min(c, d - vectors * VL);
    for (int64_t r = 0; r < n; r += MR) {
      ahead.some();
      weights.some();
      const int quarters = tile_quarters(n - r);
      const int64_t r0 = std::min<int64_t>(r, n - quarters * (MR / 4));
      const T* a = weight + r0;  // its columns, which are its rows
      T* to = out + r0 * d + c0;
      if (whole)
        tile_of_size<T, true, Write::kStream>(quarters, int(vectors), n, a, n, rows.z + c0, ld, to,
                                              d, grad);
      else
        tile_of_size<T, true, Write::kScale>(quarters, int(vectors), n, a, n, rows.z + c0, ld, to,
                                             d, grad);
    }
  }
  return true;
}

// grad_z of one matrix on the samples side: grad · W' z, raw z. W' is symmetric.
template <class S, class T>
void weight_bwd_samples(const Features& f, int64_t index, int64_t last, T grad, const T* weight,
                        S* out, const Executor& executor) {
  constexpr int64_t kDepth = 256;  // rows of z in a panel that stays in a first-level cache
  Memory memory;
  const Rows<S, T> rows(f, index);
  if constexpr (std::is_same_v<S, T>)
    if (weight_bwd_in_place(f, rows, index, last, grad, weight, out)) return;
  const int64_t n = f.n, d = f.d, tiles = ceil_div(n, MR);
  // Tile t of W' as n rows of MR: column k of its rows is row k of these columns.
  T* w = memory.take<T>(tiles * MR * n);
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t width = std::min<int64_t>(MR, n - t * MR);
    T* to = w + t * MR * n;
    if (width < MR) std::memset(to, 0, size_t(MR * n) * sizeof(T));
    for (int64_t k = 0; k < n; ++k) {
      const T* from = weight + k * n + t * MR;
      if (width == MR)
        std::memcpy(to + k * MR, from, MR * sizeof(T));
      else
        std::memcpy(to + k * MR, from, size_t(width) * sizeof(T));
    }
  }
  Prefetch ahead(f, sizeof(S), index, last, tiles * ceil_div(d, NR<T>) * ceil_div(n, kDepth));
  const bool whole = std::is_same_v<S, T> && n <= kDepth && d % kLanes<T> == 0 &&
                     reinterpret_cast<uintptr_t>(out) % kVectorBytes == 0;
  executor.run(ceil_div(d, NR<T>), 1, [&](int64_t begin, int64_t end) {
    Memory inner;
    T* panel = inner.take<T>(std::min(n, kDepth) * NR<T>);
    T* buffer = inner.take<T>(NR<T>);
    T* sum = inner.take<T>(tiles * MR * NR<T>);
    for (int64_t p = begin; p < end; ++p) {
      const int64_t c0 = p * NR<T>, width = std::min(NR<T> + int64_t(0), d - c0);
      const int vectors = int(ceil_div(width, kLanes<T>));
      for (int64_t at = 0; at < n; at += kDepth) {
        const int64_t depth = std::min(kDepth, n - at);
        // pack_features addresses panel p of a whole set: step back to where panel 0 would be.
        pack_features<S, T>(rows, nullptr, nullptr, false, at, at + depth, p, p + 1,
                            panel - p * NR<T> * depth, buffer);
        for (int64_t t = 0; t < tiles; ++t) {
          if (!executor.parallel) ahead.some();
          const T* a = w + t * MR * n + at * MR;
          if constexpr (std::is_same_v<S, T>)
            if (whole && (t + 1) * MR <= n) {
              tile_of_width<T, true, Write::kStream>(vectors, n, a, MR, panel, NR<T>,
                                                     out + t * MR * d + c0, d, grad);
              continue;
            }
          T* to = sum + t * MR * NR<T>;
          const int quarters = tile_quarters(n - t * MR);
          if (at == 0)
            tile_of_size<T, true, Write::kSet>(quarters, vectors, depth, a, MR, panel, NR<T>, to,
                                               NR<T>);
          else
            tile_of_size<T, true, Write::kAdd>(quarters, vectors, depth, a, MR, panel, NR<T>, to,
                                               NR<T>);
        }
      }
      for (int64_t i = whole ? n / MR * MR : 0; i < n; ++i)
        for (int64_t j = 0; j < width; ++j)
          out[i * d + c0 + j] = to_storage<S>(grad * sum[i * NR<T> + j]);
    }
  });
}

// grad_z on the features side: y_i = ẑ_i W', then grad · (y_i - (ẑ_i · y_i) ẑ_i) / ||z_i||.
template <class S, class T>
void weight_bwd_features(const Features& f, int64_t index, T grad, const T* weight, S* out,
                         const Executor& executor) {
  constexpr int64_t kRowBlock = 6 * MR;  // so that a panel of W' is used six times per load
  Memory memory;
  const Rows<S, T> rows(f, index);
  const int64_t n = f.n, d = f.d, panels = ceil_div(d, NR<T>), ld = panels * NR<T>;
  T* scale = memory.take<T>(n);
  T* mean = memory.take<T>(ld);
  prepare(rows, T(1), scale, mean, executor);
  T* packed = memory.take<T>(ld * d);
  const auto vectors = [&](int64_t p) {
    return int(std::min<int64_t>(NV, ceil_div(d - p * NR<T>, kLanes<T>)));
  };
  executor.run(panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p)
      for (int64_t r = 0; r < d; ++r) {
        T* to = packed + p * NR<T> * d + r * NR<T>;
        const int64_t width = std::min<int64_t>(NR<T>, d - p * NR<T>);
        const T* from = weight + r * d + p * NR<T>;
        for (int64_t j = 0; j < width; ++j) to[j] = grad * from[j];
        for (int64_t j = width; j < NR<T>; ++j) to[j] = 0;
      }
  });
  executor.run(ceil_div(n, kRowBlock), 1, [&](int64_t begin, int64_t end) {
    Memory inner;
    T* x = inner.take<T>(kRowBlock * ld);
    T* y = inner.take<T>(kRowBlock * ld);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t r0 = b * kRowBlock, count = std::min(kRowBlock, n - r0);
      std::memset(x, 0, size_t(kRowBlock * ld) * sizeof(T));
      for (int64_t r = 0; r < count; ++r) {
        if (!rows.kept(r0 + r)) continue;
        T* xr = x + r * ld;
        const T* source = rows.fetch(r0 + r, 0, d, xr);
        const T s = scale[r0 + r];
        for (int64_t j = 0; j < d; ++j) xr[j] = s * source[j] - mean[j];
      }
      for (int64_t p = 0; p < panels; ++p)
        for (int64_t at = 0; at < d; at += kTileDepth)
          for (int64_t r = 0; r < count; r += MR) {
            const T* w = packed + p * NR<T> * d + at * NR<T>;
            T *from = x + r * ld + at, *to = y + r * ld + p * NR<T>;
            const int64_t depth = std::min(kTileDepth, d - at);
            const int quarters = tile_quarters(count - r);
            if (at == 0)
              tile_of_size<T, false, Write::kSet>(quarters, vectors(p), depth, from, ld, w, NR<T>,
                                                  to, ld);
            else
              tile_of_size<T, false, Write::kAdd>(quarters, vectors(p), depth, from, ld, w, NR<T>,
                                                  to, ld);
          }
      for (int64_t r = 0; r < count; ++r) {
        S* o = out + (r0 + r) * d;
        if (!rows.kept(r0 + r)) {
          for (int64_t j = 0; j < d; ++j) o[j] = to_storage<S>(T(0));
          continue;
        }
        T *xr = x + r * ld, *yr = y + r * ld;
        const T s = scale[r0 + r];
        T along = 0;
        if (rows.normalize) {
          if (rows.center)
            for (int64_t j = 0; j < d; ++j) xr[j] += mean[j];
          along = T(dot(xr, yr, d));
        }
        for (int64_t j = 0; j < d; ++j) o[j] = to_storage<S>(s * (yr[j] - along * xr[j]));
      }
    }
  });
}

// Gradient of z from the gradient (k x k) of its Gram matrix, one matrix.
template <class S, class T>
void gram_bwd_one(const Features& f, int64_t index, int64_t end, bool samples, const T* grad,
                  const T* gram, const T* inverse_norm, const T* mean, S* out,
                  const Executor& executor) {
  Memory memory;
  const int64_t k = samples ? f.n : f.d;
  T* scale = memory.take<T>(f.n);
  T* mean_row = memory.take<T>(round_up(f.d, NR<T>) + kLanes<T>);
  std::copy_n(inverse_norm + index * f.n, f.n, scale);
  std::fill_n(mean_row, round_up(f.d, NR<T>) + kLanes<T>, T(0));
  std::copy_n(mean + index * f.d, f.d, mean_row);
  const Gram<S, T> one(f, index, samples, gram + index * k * k, scale, mean_row, memory);
  const int64_t ld = one.ldg;
  T *v = memory.take<T>(ld * ld), *t = memory.take<T>(ld * ld), *w = memory.take<T>(k * k);
  std::memset(v, 0, size_t(ld * ld) * sizeof(T));
  const T* from = grad + index * k * k;
  for (int64_t i = 0; i < k; ++i) std::memcpy(v + i * ld, from + i * k, size_t(k) * sizeof(T));
  executor.run(
      ld, 32, [&](int64_t i0, int64_t i1) { transpose(v + i0 * ld, ld, i1 - i0, ld, t + i0, ld); });
  executor.run(k, 32, [&](int64_t i0, int64_t i1) {
    for (int64_t i = i0 * ld; i < i1 * ld; i += kLanes<T>)
      store(v + i, (load(v + i) + load(t + i)) * splat(T(0.5)));
  });
  one.fold(v, T(1), w, executor);
  S* to = out + index * f.n * f.d;
  if (samples)
    weight_bwd_samples<S, T>(f, index, end, T(1), w, to, executor);
  else
    weight_bwd_features<S, T>(f, index, T(1), w, to, executor);
}
