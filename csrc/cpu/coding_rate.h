// log det (I + cG): matrix by matrix, and small ones in the vector lanes. Included inside an
// instruction-set namespace after lanes.h.

// a = factor · g: the upper triangle; zero in all rows past k.
template <class T>
void scaled(const T* g, T factor, int64_t k, int64_t ldg, T* a, const Executor& executor) {
  constexpr int VL = kLanes<T>;
  executor.run(k, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t j = i / VL * VL; j < ldg; j += VL)
        store(a + i * ldg + j, load(g + i * ldg + j) * splat(factor));
  });
  std::memset(a + k * ldg, 0, size_t((ldg - k) * ldg) * sizeof(T));
}

// Returns false where I + cG is not positive definite in T, or z is not finite.
template <class S, class T, class Out>
bool coding_rate_one(const Features& f, int64_t index, int64_t end, double c, Out* value,
                     Out* weight, const Executor& executor) {
  Memory memory;
  Gram<S, T> gram(f, index, end, f.samples(), false, executor, memory);
  const int64_t k = gram.k, ld = gram.ldg;
  if (!std::isfinite(trace_of(gram.g, k, ld))) return false;
  const bool project = f.normalize && f.samples();  // needs G once more
  T* a = project ? memory.take<T>(ld * ld) : gram.g;
  scaled(gram.g, T(c), k, ld, a, executor);
  T largest = 0;
  for (int64_t i = 0; i < k; ++i) largest = std::max(largest, a[i * ld + i]);
  const bool offset = largest <= 1;
  const double log_det = sweep(a, k, ld, weight != nullptr, offset, executor);
  if (!std::isfinite(log_det)) return false;
  *value = Out(log_det);
  if (!weight) return true;
  if (project) mirror<T, true>(gram.g, k, ld, executor);
  mirror<T, false>(a, k, ld, executor);
  // V = c (I + cG)⁻¹ = -c a. With `offset` its cI is missing, which only changes the norm of
  // normalised, uncentred rows: there it stays out, before it can drown the rest.
  if (offset && (!f.normalize || f.center))
    for (int64_t i = 0; i < k; ++i) a[i * ld + i] -= 1;
  gram.fold(a, T(-c), weight, executor);
  return true;
}

template <class S, class T>
void coding_rate_range(const Features& f, double c, T* value, T* weight, int64_t begin, int64_t end,
                       const Executor& executor) {
  for (int64_t i = begin; i < end; ++i) {
    T* w = weight ? weight + i * f.k() * f.k() : nullptr;
    if (coding_rate_one<S, T>(f, i, end, c, value + i, w, executor)) continue;
    // Rounding of a float32 Gram matrix swamps I when c · lambda_max comes near 1e7; float64 has
    // the digits to spare.
    if constexpr (sizeof(T) == 4)
      if (coding_rate_one<S, double>(f, i, end, c, value + i, w, executor)) continue;
    fill_nan(value + i, 1);
    if (w) fill_nan(w, f.k() * f.k());
  }
}

template <class S, class T>
void coding_rate_lanes(const Features& f, double c, T* value, T* weight, int64_t first,
                       int64_t count) {
  constexpr int VL = kLanes<T>;
  Memory memory;
  LaneGroup<S, T> group(f, first, count, f.samples(), memory);
  LaneFactor<T> factor(group.g, splat(T(c)), group.order, memory);
  for (int m = 0; m < count; ++m) {
    group.failed[m] |= !factor.possible[m];
    value[first + m] = T(factor.pivots.log(m));
  }
  if (weight) {
    Vec<T> largest{};
    for (int64_t i = 0; i < group.k; ++i) {
      const Vec<T> x = T(c) * group.g[packed_row(i) + i];
      largest = x > largest ? x : largest;
    }
    // See coding_rate_one.
    const Flags<T> offset = f.normalize ? largest <= T(1) : Flags<T>{};
    group.store_weight(factor.invert(offset, memory), splat(T(-c)), weight);
  }
  for (int m = 0; m < std::min<int64_t>(count, VL); ++m)
    if (group.failed[m])
      coding_rate_range<S, T>(f, c, value, weight, first + m, first + m + 1, Executor{nullptr});
}
