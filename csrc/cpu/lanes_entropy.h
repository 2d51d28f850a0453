// Entropies of small matrices in the vector lanes. Included inside an instruction-set namespace
// after entropy.h and lanes_eigen.h.

// H of the packed matrices g of trace tau to value (per lane), and
// V = factor · v if v is wanted. Marks lanes that need to be computed alone.
template <class T>
struct LaneEntropy {
  static constexpr int VL = kLanes<T>;
  double value[VL];
  bool failed[VL] = {};
  Vec<T>* v = nullptr;
  Vec<T> factor;

  LaneEntropy(const Vec<T>* g, int64_t k, int64_t order, double alpha, bool want_v,
              Memory& memory) {
    Vec<T> tau{};
    for (int64_t i = 0; i < k; ++i) tau += g[packed_row(i) + i];
    const Flags<T> empty = tau == 0;
    // Without normalisation the entries may be of any size, and squares of them are taken.
    const Flags<T> usable = empty | ((tau > T(kTraceLow<T>)) & (tau < T(kTraceHigh<T>)));
    for (int m = 0; m < VL; ++m) failed[m] = !usable[m];
    const Vec<T> inverse = empty ? Vec<T>{} : 1 / tau;
    if (want_v) v = memory.take<Vec<T>>(packed_row(order));
    if (alpha == 2)
      of_order_2(g, k, order, inverse);
    else
      of_spectrum(g, k, order, alpha, inverse);
    for (int m = 0; m < VL; ++m)
      if (empty[m]) value[m] = 0;
  }

 private:
  // H = -log tr rho², V = 2 / tau (I - rho / tr rho²).
  void of_order_2(const Vec<T>* g, int64_t k, int64_t order, Vec<T> inverse) {
    double square[VL] = {};
    for (int64_t i = 0; i < k; ++i) {
      const Vec<T>* row = g + packed_row(i);
      Vec<T> sum{};
      for (int64_t j = 0; j < i; ++j) sum += row[j] * row[j];
      sum += sum + row[i] * row[i];
      T x[VL];
      store(x, Vec<T>(sum * inverse * inverse));
      for (int m = 0; m < VL; ++m) square[m] += double(x[m]);
    }
    Vec<T> purity;
    for (int m = 0; m < VL; ++m) {
      value[m] = -std::log(square[m]);
      purity[m] = square[m] > 0 ? T(square[m]) : T(1);
    }
    factor = 2 * inverse;
    if (!v) return;
    const Vec<T> scale = -inverse / purity;
    for (int64_t i = 0; i < order; ++i) {
      Vec<T>* row = v + packed_row(i);
      for (int64_t j = 0; j <= i; ++j) row[j] = scale * g[packed_row(i) + j];
      row[i] += T(1);
    }
  }

  // H from eigenvalues, V from eigenvectors; for float32 and alpha = 1 without either.
  void of_spectrum(const Vec<T>* g, int64_t k, int64_t order, double alpha, Vec<T> inverse) {
    Memory memory;
    // An odd stride: rows an even number of lines apart would share the sets of a cache.
    const int64_t ld = k | 1;
    Vec<T>*a = memory.take<Vec<T>>(k * ld), *d = memory.take<Vec<T>>(k),
    *e = memory.take<Vec<T>>(k), *t = memory.take<Vec<T>>(k), *q = nullptr;
    for (int64_t i = 0; i < k; ++i)
      for (int64_t j = 0; j <= i; ++j) a[i * ld + j] = inverse * g[packed_row(i) + j];
    tridiagonalize_lanes<T>(a, k, ld, d, e, t);
    if (std::isinf(alpha)) return of_order_infinity(a, k, order, ld, d, e, t, inverse);
    if constexpr (sizeof(T) == 4)
      if (by_poles<T>(alpha)) return of_order_1(a, k, order, ld, d, e, t, inverse);
    if (v) {
      q = memory.take<Vec<T>>(order * ld);
      form_q_lanes<T>(a, k, ld, t, q, ld);
      for (int64_t i = k * ld; i < order * ld; ++i) q[i] = Vec<T>{};
    }
    const Flags<T> converged = v ? ql_lanes<T>(d, e, k, q, ld, k) : eigenvalues_lanes<T>(d, e, k);
    Vec<T>* f = e;  // the off-diagonal is zero by now
    double* lam = memory.take<double>(k);
    T* spectral = memory.take<T>(k);
    for (int m = 0; m < VL; ++m) {
      failed[m] |= !converged[m];
      const bool some = !failed[m] && inverse[m] > 0;
      for (int64_t r = 0; r < k; ++r) lam[r] = some ? double(d[r][m]) : 1;
      value[m] = entropy_of_spectrum<T>(lam, k, alpha, v ? spectral : nullptr);
      if (v)
        for (int64_t r = 0; r < k; ++r) f[r][m] = some ? spectral[r] : T(0);
    }
    factor = inverse;
    if (v) spectral_lanes<T>(q, f, k, ld, v);
  }

  // The same for the tridiagonal (d, e) of a: the largest eigenvalue and v = I - x xᵀ / lambda.
  void of_order_infinity(const Vec<T>* a, int64_t k, int64_t order, int64_t ld, const Vec<T>* d,
                         const Vec<T>* e, const Vec<T>* t, Vec<T> inverse) {
    Memory memory;
    double *diagonal = memory.take<double>(k * VL), *off = memory.take<double>(k * VL);
    double* vector = v ? memory.take<double>(k * VL) : nullptr;
    for (int64_t i = 0; i < k; ++i)
      for (int m = 0; m < VL; ++m) diagonal[i * VL + m] = d[i][m], off[i * VL + m] = e[i][m];
    const LargestPair<VL> largest(diagonal, off, k, bracket<T>(v), vector);
    Vec<T>* x = v ? memory.take<Vec<T>>(order) : nullptr;
    if (v) std::fill_n(x, order, Vec<T>{});
    Vec<T> reciprocal{};
    for (int m = 0; m < VL; ++m) {
      failed[m] |= !largest.found[m];
      value[m] = -std::log(largest.value[m]);
      if (!v || failed[m] || !(inverse[m] > 0)) continue;
      reciprocal[m] = T(1 / largest.value[m]);
      for (int64_t i = 0; i < k; ++i) x[i][m] = T(vector[i * VL + m]);
    }
    factor = inverse;
    if (!v) return;
    transform_back_vector_lanes<T>(a, k, ld, t, x);
    for (int64_t i = 0; i < order; ++i) {
      Vec<T>* row = v + packed_row(i);
      for (int64_t j = 0; j <= i; ++j) row[j] = -x[i] * x[j] * reciprocal;
      row[i] += T(1);
    }
  }

  // The same without the spectrum.
  void of_order_1(Vec<T>* a, int64_t k, int64_t order, int64_t ld, const Vec<T>* d, const Vec<T>* e,
                  const Vec<T>* t, Vec<T> inverse) {
    Memory memory;
    LaneLog<T> log(d, e, k, memory);
    for (int m = 0; m < VL; ++m) failed[m] |= !log.definite[m];
    log.entropy(value, v ? a : nullptr, ld);
    if (!v) return;
    transform_back_lanes<T>(a, k, ld, t);
    for (int64_t i = 0; i < k; ++i) std::copy_n(a + i * ld, i + 1, v + packed_row(i));
    for (int64_t i = packed_row(k); i < packed_row(order); ++i) v[i] = Vec<T>{};
    factor = inverse;
  }
};

template <class S, class T>
void entropy_lanes(const Features& f, double alpha, T* value, T* weight, int64_t first,
                   int64_t count) {
  Memory memory;
  const LaneGroup<S, T> group(f, first, count, f.samples(), memory);
  const LaneEntropy<T> entropy(group.g, group.k, group.order, alpha, weight != nullptr, memory);
  for (int64_t m = 0; m < count; ++m) value[first + m] = T(entropy.value[m]);
  if (weight) group.store_weight(entropy.v, entropy.factor, weight);
  for (int64_t m = first; m < first + count; ++m)
    if (group.failed[m - first] || entropy.failed[m - first])
      entropy_range<S, T>(f, alpha, value, weight, m, m + 1, Executor{nullptr});
}

template <class S, class T>
void joint_entropy_lanes(const Features& f1, const Features& f2, double alpha, T* value, T* weight1,
                         T* weight2, int64_t first, int64_t count) {
  Memory memory;
  const LaneGroup<S, T> one(f1, first, count, true, memory), two(f2, first, count, true, memory);
  const int64_t entries = packed_row(one.order);
  Vec<T>* product = memory.take<Vec<T>>(entries);
  for (int64_t i = 0; i < entries; ++i) product[i] = one.g[i] * two.g[i];
  const LaneEntropy<T> entropy(product, one.k, one.order, alpha, weight1 != nullptr, memory);
  for (int64_t m = 0; m < count; ++m) value[first + m] = T(entropy.value[m]);
  if (weight1) {
    for (int64_t i = 0; i < entries; ++i) product[i] = entropy.v[i] * two.g[i];
    one.store_weight(product, entropy.factor, weight1);
    for (int64_t i = 0; i < entries; ++i) product[i] = entropy.v[i] * one.g[i];
    two.store_weight(product, entropy.factor, weight2);
  }
  for (int64_t m = first; m < first + count; ++m)
    if (one.failed[m - first] || two.failed[m - first] || entropy.failed[m - first])
      joint_entropy_range<S, T>(f1, f2, alpha, value, weight1, weight2, m, m + 1,
                                Executor{nullptr});
}

// Of ready Gram matrices.
template <class T>
void gram_entropy_lanes(const T* gram, int64_t batch, int64_t k, double alpha, T* value, T* v,
                        int64_t first, int64_t count) {
  constexpr int VL = kLanes<T>;
  Memory memory;
  const int64_t order = round_up(k, LB);
  Vec<T>* g = memory.take<Vec<T>>(packed_row(order));
  std::fill(g + packed_row(k), g + packed_row(order), Vec<T>{});
  const T* from[VL];
  for (int m = 0; m < VL; ++m) from[m] = gram + (first + std::min<int64_t>(m, count - 1)) * k * k;
  pack_lower<T>(from, k, k, g);
  const LaneEntropy<T> entropy(g, k, order, alpha, v != nullptr, memory);
  for (int64_t m = 0; m < count; ++m) value[first + m] = T(entropy.value[m]);
  if (v)
    store_rows<T>(
        [&](int64_t i, Vec<T>* to) {
          unpack_row<T>(entropy.v, i, k, [&](int64_t, Vec<T> x) { return entropy.factor * x; }, to);
        },
        k, k, first, count, batch, v);
  for (int64_t m = first; m < first + count; ++m)
    if (entropy.failed[m - first])
      gram_entropy_range(gram, k, alpha, value, v, m, m + 1, Executor{nullptr});
}
