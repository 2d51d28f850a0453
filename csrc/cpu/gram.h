// From prepared rows to the Gram matrix of one matrix, and from V = d value / dG to the weight W'
// (see kernels.inl). Included inside an instruction-set namespace after rows.h.

// Leading dimension and row count of a k x k work matrix: whole register tiles in both directions.
template <class T>
int64_t padded(int64_t k) {
  return round_up(std::max<int64_t>(k, 1), std::max<int64_t>(kLanes<T>, MR));
}

// G (+ zero padding) of the prepared rows: upper triangle of k x k, leading dimension padded(k).
// With `squares` (samples side, n to whole vectors), of the raw rows, whose sums of squares go
// there.
template <class S, class T>
void gram_upper(const Rows<S, T>& rows, bool samples, const T* scale, const T* mean, T* squares,
                T* g, Prefetch& ahead, const Executor& executor) {
  constexpr int VL = kLanes<T>;
  Memory memory;
  const int64_t k = samples ? rows.n : rows.d, depth_total = samples ? rows.d : rows.n;
  const int64_t ldg = padded<T>(k), panels = ceil_div(k, NR<T>), pairs = ceil_div(panels, 2);
  const int64_t written = depth_total == 0 ? 0 : k;
  std::memset(g + written * ldg, 0, size_t((ldg - written) * ldg) * sizeof(T));
  if (written == 0) return;
  const int64_t wanted = depth_slices(pairs, depth_total, executor);
  const int64_t length = round_up(ceil_div(depth_total, wanted), VL);
  const int64_t slices = ceil_div(depth_total, length), block = std::min(length, kPackDepth);
  struct Slice {
    T *packed, *g, *squares;
    int64_t at, depth;  // the block in work
  };
  Slice* slice = memory.take<Slice>(slices);
  for (int64_t s = 0; s < slices; ++s)
    slice[s] = {memory.take<T>(panels * NR<T> * std::min(block, depth_total)),
                s == 0 ? g : memory.take<T>(ldg * ldg),
                s == 0 || !squares ? squares : memory.take<T>(round_up(k, VL)), 0, 0};
  for (int64_t offset = 0; offset < length; offset += block) {
    for (int64_t s = 0; s < slices; ++s) {
      const int64_t end = std::min((s + 1) * length, depth_total);
      slice[s].at = std::min(s * length + offset, end);
      slice[s].depth = std::min(block, end - slice[s].at);
    }
    executor.run(slices * panels, 1, [&](int64_t begin, int64_t end) {
      Memory inner;
      T* buffer = inner.take<T>(samples ? VL * round_up(block, VL) : panels * NR<T>);
      for (int64_t t = begin, next; t < end; t = next) {
        const Slice& x = slice[t / panels];
        const int64_t first = t % panels, last = std::min(panels, first + end - t);
        next = t + last - first;
        if (!samples)
          pack_features(rows, scale, mean, true, x.at, x.at + x.depth, first, last, x.packed,
                        buffer);
        for (int64_t p = first; samples && p < last; ++p)
          pack_samples(rows, scale, mean, x.squares, offset > 0, p * NR<T>, x.at, x.at + x.depth,
                       x.packed + p * NR<T> * x.depth, buffer);
      }
    });
    const auto between = [&]() {
      if (!executor.parallel) ahead.some();
    };
    const auto columns = [&](const Slice& x, int64_t p) {
      for (int64_t sub = 0; sub < x.depth; sub += kTileDepth) {
        const T* from = x.packed + sub * NR<T>;
        const int64_t count = std::min(kTileDepth, x.depth - sub);
        if (offset + sub == 0)
          gram_panel<T, Write::kSet>(from, x.depth, count, k, p * NR<T>, x.g, ldg, between);
        else
          gram_panel<T, Write::kAdd>(from, x.depth, count, k, p * NR<T>, x.g, ldg, between);
      }
    };
    // Columns of the triangle lengthen: each thread takes panels from both ends.
    executor.run(slices * pairs, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t p = t % pairs;
        columns(slice[t / pairs], p);
        if (panels - 1 - p != p) columns(slice[t / pairs], panels - 1 - p);
      }
    });
  }
  const int64_t whole = k / VL * VL;  // what gram_panel has written of each row
  executor.run(slices > 1 ? k : 0, 64, [&](int64_t begin, int64_t end) {
    for (int64_t s = 1; s < slices; ++s)
      for (int64_t i = begin; i < end; ++i)
        for (int64_t j = i < whole ? i / VL * VL : 0; j < (i < whole ? whole : k); j += VL)
          store(g + i * ldg + j, load(g + i * ldg + j) + load(slice[s].g + i * ldg + j));
  });
  for (int64_t s = 1; squares && s < slices; ++s)
    for (int64_t i = 0; i < k; i += VL)
      store(squares + i, load(squares + i) + load(slice[s].squares + i));
  complete_upper(k, g, ldg);
}

template <class T>
double trace_of(const T* g, int64_t k, int64_t ldg) {
  double sum = 0;
  for (int64_t i = 0; i < k; ++i) sum += g[i * ldg + i];
  return sum;
}

// Everything of one matrix up to the Gram matrix.
template <class S, class T>
struct Gram {
  Rows<S, T> rows;
  bool samples;
  int64_t k, ldg, kept = 0;
  T *scale, *mean, *g, common_scale = 1;

  // In `place` if there is one: ldg rows of ldg.
  Gram(const Features& f, int64_t index, int64_t end, bool samples_side, bool scale_free,
       const Executor& executor, Memory& memory, T* place = nullptr)
      : rows(f, index), samples(samples_side), k(samples_side ? f.n : f.d), ldg(padded<T>(k)) {
    scale = memory.take<T>(f.n + 2 * kLanes<T>);
    mean = memory.take<T>(round_up(f.d, NR<T>) + kLanes<T>);
    g = place ? place : memory.take<T>(ldg * ldg);
    // Tiles of the product, about: half of (k / MR)(k / NR), for every block of the depth.
    const int64_t tiles = ceil_div(k, MR) * ceil_div(k + NR<T>, NR<T>) / 2;
    Prefetch ahead(f, sizeof(S), index, end, tiles * ceil_div(f.d, kTileDepth));
    if (samples && f.normalize && !f.center && normalized_after(ahead, executor)) return;
    common_scale = scale_free && !f.normalize ? power_of_two_scale(rows) : T(1);
    kept = prepare(rows, common_scale, scale, mean, executor);
    Prefetch none;
    gram_upper<S, T>(rows, samples, scale, mean, nullptr, g, none, executor);
    set_unit_diagonal(f);
  }

  // Of a Gram matrix that was computed before.
  Gram(const Features& f, int64_t index, bool samples_side, const T* gram, T* inverse_norm,
       T* mean_row, Memory& memory)
      : rows(f, index), samples(samples_side), k(samples_side ? f.n : f.d), ldg(padded<T>(k)),
        scale(inverse_norm), mean(mean_row), g(memory.take<T>(ldg * ldg)) {
    for (int64_t i = 0; i < k; ++i) {
      std::memcpy(g + i * ldg, gram + i * k, size_t(k) * sizeof(T));
      std::fill(g + i * ldg + k, g + (i + 1) * ldg, T(0));
    }
    for (int64_t i = 0; i < f.n; ++i) kept += rows.kept(i);
  }

  // The common case reads z once: the product of the raw rows, scaled by 1 / (‖z_i‖ ‖z_j‖) after.
  // Returns false if a square might not be in range.
  bool normalized_after(Prefetch& ahead, const Executor& executor) {
    constexpr int VL = kLanes<T>;
    Memory memory;
    T* squares = memory.take<T>(round_up(k, VL));
    std::memset(mean, 0, size_t(round_up(rows.d, NR<T>)) * sizeof(T));
    if (!rows.d) std::memset(squares, 0, size_t(k) * sizeof(T));
    gram_upper<S, T>(rows, true, nullptr, nullptr, squares, g, ahead, executor);
    for (int64_t i = 0; i < k; ++i) scale[i] = T(1 / std::sqrt(double(squares[i])));
    for (int64_t i = 0; i < k; ++i) {
      kept += rows.kept(i);
      if (squares[i] > T(kSquareLow<T>) && squares[i] < T(kSquareHigh<T>)) continue;
      scale[i] = 0;
      if (rows.kept(i) && (squares[i] != 0 || !rows.zero(i))) {
        kept = 0;
        return false;
      }
    }
    for (int64_t i = k; i < round_up(k, VL); ++i) scale[i] = 0;
    for (int64_t i = 0; i < k; ++i) {
      T* row = g + i * ldg;
      const Vec<T> left = splat(scale[i]);
      for (int64_t j = i / VL * VL; j < k; j += VL)
        store(row + j, load(row + j) * (left * load(scale + j)));
      if (scale[i] > 0) row[i] = 1;
    }
    return true;
  }

  // The diagonal of normalised rows is 1 by definition: say so, instead of 1 ± rounding.
  void set_unit_diagonal(const Features& f) {
    if (samples && f.normalize && !f.center)
      for (int64_t i = 0; i < k; ++i)
        if (scale[i] > 0) g[i * ldg + i] = 1;
  }

  // V = factor · v on entry (full, leading dimension ldg; changed), W' on return to weight (k x k,
  // contiguous). g must hold the full Gram matrix if rows are normalised on the samples side;
  // columns of v and g past k, to whole vectors, are zero in one of them and finite in the other.
  template <class Out>
  void fold(T* v, T factor, Out* weight, const Executor& executor) const {
    Memory memory;
    const bool project = samples && rows.normalize;
    T* along_mean = nullptr;  // ẑ_i (centred) · mean: the part of ẑ_i that G does not see
    if (samples && rows.center) {
      center_both_sides(v);
      along_mean = memory.take<T>(ldg);
      T* buffer = memory.take<T>(rows.d);
      const double mean2 = dot(mean, mean, rows.d);
      std::memset(along_mean, 0, size_t(ldg) * sizeof(T));
      for (int64_t i = 0; i < k; ++i)
        if (rows.kept(i))
          along_mean[i] = T(scale[i] * dot(rows.fetch(i, 0, rows.d, buffer), mean, rows.d) - mean2);
    }
    executor.run(k, 32, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const T* vi = v + i * ldg;
        T projection = 0;
        if (project) {
          double sum = dot(vi, g + i * ldg, round_up(k, kLanes<T>));
          if (along_mean) sum += dot(vi, along_mean, round_up(k, kLanes<T>));
          projection = T(sum);
        }
        Out* w = weight + i * k;
        const T left = 2 * factor * (samples ? scale[i] : common_scale * common_scale);
        if (samples)
          for (int64_t j = 0; j < k; ++j) w[j] = Out(left * (scale[j] * vi[j]));
        else
          for (int64_t j = 0; j < k; ++j) w[j] = Out(left * vi[j]);
        if (project) w[i] = Out(left * (scale[i] * (vi[i] - projection)));
      }
    });
  }

 private:
  // V <- P V P with P the projection that subtracts the mean over the kept rows.
  void center_both_sides(T* v) const {
    Memory memory;
    T* row_mean = memory.take<T>(k);
    double total = 0;
    for (int64_t i = 0; i < k; ++i) {
      double sum = 0;
      for (int64_t j = 0; j < k; ++j)
        if (rows.kept(j)) sum += v[i * ldg + j];
      row_mean[i] = kept ? T(sum / kept) : T(0);
      if (rows.kept(i)) total += row_mean[i];
    }
    const T grand = kept ? T(total / kept) : T(0);
    for (int64_t i = 0; i < k; ++i)
      for (int64_t j = 0; j < k; ++j)
        v[i * ldg + j] = rows.kept(i) && rows.kept(j)
                             ? v[i * ldg + j] - row_mean[i] - row_mean[j] + grand
                             : T(0);
  }
};

template <class T>
void fill_nan(T* p, int64_t n) {
  std::fill(p, p + n, std::numeric_limits<T>::quiet_NaN());
}

template <class S, class T>
void gram_one(const Features& f, int64_t index, int64_t end, bool samples, T* out, T* inverse_norm,
              T* mean, const Executor& executor) {
  Memory memory;
  const int64_t k = samples ? f.n : f.d;
  out += index * k * k;
  const bool whole = padded<T>(k) == k;
  // What no cache will hold goes past them: stores would read the lines that they overwrite.
  const bool past = whole && k * k <= kPastMatrix &&
                    f.batch * k * k * int64_t(sizeof(T)) > kPastBatch &&
                    reinterpret_cast<uintptr_t>(out) % kVectorBytes == 0;
  const bool in_place = whole && !past;
  const Gram<S, T> gram(f, index, end, samples, false, executor, memory, in_place ? out : nullptr);
  mirror<T, true>(gram.g, k, gram.ldg, executor);
  if (past)
    for (int64_t i = 0; i < k * k; i += kLanes<T>) stream(out + i, load(gram.g + i));
  for (int64_t r = 0; r < k && !whole; ++r)
    std::memcpy(out + r * k, gram.g + r * gram.ldg, size_t(k) * sizeof(T));
  // Of an empty matrix the outputs may be null, which memcpy does not allow.
  std::copy_n(gram.scale, f.n, inverse_norm + index * f.n);
  std::copy_n(gram.mean, f.d, mean + index * f.d);
}
