// Matrix entropies H_alpha(G / tr G), matrix by matrix: from eigenvalues, from powers (integer
// alpha), from the Frobenius norm (alpha = 2); of one Gram matrix and of the product of two.
// Included inside an instruction-set namespace after gram.h.

// V of H_2 = 2 log tr G - log ||G||²: 2/tau I - 2 G / ||G||²; v may be g.
template <class T>
double renyi2(const T* g, int64_t k, int64_t ldg, double tau, T* v) {
  constexpr int VL = kLanes<T>;
  double square = 0;
  for (int64_t i = 0; i < k; ++i) {
    const T* row = g + i * ldg;
    const int64_t first = i / VL * VL;
    const Vec<T> x = lanes_above<T>(load(row + first), Vec<T>{}, int(i - first));
    Vec<T> sum = x * x;
    for (int64_t j = first + VL; j < k; j += VL) sum += load(row + j) * load(row + j);
    square += 2 * double(reduce_add<T>(sum)) + double(row[i]) * row[i];
  }
  if (v) {
    const Vec<T> factor = splat(T(-2 / square));
    for (int64_t i = 0; i < k; ++i) {
      for (int64_t j = 0; j < ldg; j += VL) store(v + i * ldg + j, factor * load(g + i * ldg + j));
      v[i * ldg + i] += T(2 / tau);
    }
  }
  return 2 * std::log(tau) - std::log(square);
}

// H_alpha (alpha finite) from the eigenvalues lam of rho, and f with V = 1/tau sum_r f_r v_r v_rᵀ.
template <class T>
double entropy_of_spectrum(const double* lam, int64_t k, double alpha, T* f) {
  const double largest = *std::max_element(lam, lam + k);
  // Eigenvalues below the rounding of T are noise around zero: values treat them as they are,
  // f, which is singular at zero, treats them as this.
  const double floor = 0.1 * largest * double(std::numeric_limits<T>::epsilon());
  double sum = 0;
  if (alpha == 1) {
    for (int64_t r = 0; r < k; ++r)
      if (lam[r] > 0) sum -= lam[r] * std::log(lam[r]);
    if (f)
      for (int64_t r = 0; r < k; ++r) f[r] = T(-(std::log(std::max(lam[r], floor)) + sum));
    return sum;
  }
  for (int64_t r = 0; r < k; ++r)
    if (lam[r] > 0) sum += std::pow(lam[r], alpha);
  if (f)
    for (int64_t r = 0; r < k; ++r)
      f[r] = T(alpha / (1 - alpha) * (std::pow(std::max(lam[r], floor), alpha - 1) / sum - 1));
  return std::log(sum) / (1 - alpha);
}

// out = pᵀ q where that is symmetric, as for symmetric p and q that commute; full. Columns past k
// are zero in p.
template <class T>
void symmetric_product(const T* p, const T* q, int64_t k, int64_t ld, T* out,
                       const Executor& executor) {
  Memory memory;
  const int64_t rows = round_up(k, MR), panels = ceil_div(k, NR<T>);
  T* left = memory.take<T>(rows * rows);  // tiles of MR columns, row after row
  executor.run(rows / MR, 4, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      for (int64_t r = 0; r < k; ++r)
        std::memcpy(left + (t * rows + r) * MR, p + r * ld + t * MR, MR * sizeof(T));
  });
  const auto columns = [&](int64_t panel) {
    Memory inner;
    T* right = inner.take<T>(kTileDepth * NR<T>);
    const int64_t j0 = panel * NR<T>;
    const int vectors = int(std::min<int64_t>(NV, (ld - j0) / kLanes<T>));
    for (int64_t at = 0; at < k; at += kTileDepth) {
      const int64_t depth = std::min(kTileDepth, k - at);
      for (int64_t r = 0; r < depth; ++r)
        for (int v = 0; v < vectors; ++v)
          store(right + r * NR<T> + v * kLanes<T>, load(q + (at + r) * ld + j0 + v * kLanes<T>));
      for (int64_t i = 0; i < std::min(j0 + NR<T>, rows); i += MR) {
        const T* a = left + i * rows + at * MR;
        T* to = out + i * ld + j0;
        if (at == 0)
          tile_of_width<T, true, Write::kSet>(vectors, depth, a, MR, right, NR<T>, to, ld);
        else
          tile_of_width<T, true, Write::kAdd>(vectors, depth, a, MR, right, NR<T>, to, ld);
      }
    }
  };
  // Columns of the triangle lengthen: each thread takes panels from both ends.
  executor.run(ceil_div(panels, 2), 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      columns(t);
      if (panels - 1 - t != t) columns(panels - 1 - t);
    }
  });
  std::memset(out + rows * ld, 0, size_t((ld - rows) * ld) * sizeof(T));
  mirror<T, true>(out, k, ld, executor);
}

// v = factor · sum_r f_r v_r v_rᵀ with v_r the rows of vt; full.
template <class T>
void spectral_matrix(const T* vt, const T* f, T factor, int64_t k, int64_t ld, T* v,
                     const Executor& executor) {
  Memory memory;
  T* left = memory.take<T>(k * ld);
  executor.run(k, 64, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const Vec<T> scale = splat(factor * f[r]);
      for (int64_t j = 0; j < ld; j += kLanes<T>)
        store(left + r * ld + j, scale * load(vt + r * ld + j));
    }
  });
  symmetric_product(left, vt, k, ld, v, executor);
}

// b to a power >= 1, by squaring; the result is b or lies in `memory`.
template <class T>
const T* matrix_power(const T* b, int64_t exponent, int64_t k, int64_t ld, Memory& memory,
                      const Executor& executor) {
  if (exponent == 1) return b;
  T *next = memory.take<T>(ld * ld), *spare = memory.take<T>(ld * ld);
  const T* power = b;
  int64_t bit = 1;
  while (2 * bit <= exponent) bit *= 2;
  for (bit /= 2; bit > 0; bit /= 2) {
    symmetric_product(power, power, k, ld, next, executor);
    power = next;
    std::swap(next, spare);
    if (!(exponent & bit)) continue;
    symmetric_product(power, b, k, ld, next, executor);
    power = next;
    std::swap(next, spare);
  }
  return power;
}

template <class T>
double inner_product(const T* x, const T* y, int64_t k, int64_t ld) {
  double sum = 0;
  for (int64_t i = 0; i < k; ++i) sum += dot(x + i * ld, y + i * ld, k);
  return sum;
}

// H_alpha and V for an integer alpha >= 3 without eigenvalues, from B = G / ||G||, whose
// eigenvalues are at most 1 and whose largest is at least 1 / sqrt(k), so that no power of it
// vanishes:
//     tr rho^alpha = (||G|| / tr G)^alpha tr B^alpha,
//     V = alpha / (1 - alpha) / tr G (tr G / ||G|| · B^(alpha - 1) / tr B^alpha - I).
// g and, if V is wanted, v: full; v may be g.
template <class T>
double entropy_by_powers(const T* g, int64_t k, int64_t ld, double tau, int64_t alpha, T* v,
                         const Executor& executor) {
  Memory memory;
  const double norm = std::sqrt(inner_product(g, g, k, ld));
  const Vec<T> inverse = splat(T(1 / norm));
  T* b = v == g ? v : memory.take<T>(ld * ld);
  executor.run(ld, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * ld; i < end * ld; i += kLanes<T>) store(b + i, load(g + i) * inverse);
  });
  double trace;
  if (!v && alpha % 2 == 0) {
    const T* half = matrix_power(b, alpha / 2, k, ld, memory, executor);
    trace = inner_product(half, half, k, ld);
  } else {
    const T* power = matrix_power(b, alpha - 1, k, ld, memory, executor);
    trace = inner_product(power, b, k, ld);
    if (v) {
      const double factor = double(alpha) / double(1 - alpha) / tau;
      const Vec<T> scale = splat(T(factor * tau / norm / trace));
      executor.run(k, 64, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          for (int64_t j = 0; j < ld; j += kLanes<T>)
            store(v + i * ld + j, load(power + i * ld + j) * scale);
          v[i * ld + i] -= T(factor);
        }
      });
    }
  }
  return (double(alpha) * std::log(norm / tau) + std::log(trace)) / double(1 - alpha);
}

inline bool by_powers(double alpha, int64_t k) {
  return k >= kPowersFrom && alpha >= 3 && alpha <= double(kMaxPower) && alpha == std::floor(alpha);
}

// Between Gram matrix and value: the entropy of one symmetric matrix g (its upper triangle on
// entry) of trace tau, and V = dH / dg if it is wanted.
template <class T>
struct EntropyTask {
  T* g;
  int64_t k, ld;
  double tau, h = std::numeric_limits<double>::quiet_NaN();
  T *v = nullptr, *vt = nullptr;

  EntropyTask(T* matrix, int64_t order, int64_t stride)
      : g(matrix), k(order), ld(stride), tau(trace_of(matrix, order, stride)) {}

  // No rows, or only zero rows: entropy 0 by convention. Where tau is not finite h stays NaN.
  bool empty() const { return tau == 0; }

  // The tridiagonal form of rho: d, e; its reflectors in v, what scales them in `factor`.
  void reduce(double* d, double* e, T* factor, T* work) {
    const T inverse = T(1 / tau);
    std::memset(v, 0, size_t(ld * ld) * sizeof(T));
    for (int64_t i = 0; i < k; ++i)
      for (int64_t j = 0; j < k; ++j) v[i * ld + j] = inverse * g[i * ld + j];
    tridiagonalize(v, k, ld, d, e, factor, work);
  }

  // H_inf and, if wanted, V.
  void of_order_infinity(bool want_v, Memory& memory, const Executor& executor) {
    double *d = memory.take<double>(k), *e = memory.take<double>(k);
    double* x = want_v ? memory.take<double>(k) : nullptr;
    T *factor = memory.take<T>(k), *work = memory.take<T>(3 * ld);
    reduce(d, e, factor, work);
    const LargestPair<1> largest(d, e, k, bracket<T>(want_v), x);
    if (!largest.found[0]) return;
    h = -std::log(largest.value[0]);
    if (!want_v) return;
    transform_back_vector(v, k, ld, factor, x);
    largest_derivative(x, largest.value[0], tau, k, ld, v, executor);
  }

  // For QL: the tridiagonal form, and the rows of Qᵀ if V is wanted.
  QlState<T> spectrum(bool want_vectors, Memory& memory) {
    double* lam = memory.take<double>(4 * k + 1);
    T *factor = memory.take<T>(k), *work = memory.take<T>(3 * ld);
    reduce(lam, lam + k, factor, work);
    if (want_vectors) {
      vt = memory.take<T>(ld * ld);
      form_q(v, k, ld, factor, vt, work);
      for (int64_t i = 0; i < k; ++i)
        for (int64_t j = 0; j < i; ++j) std::swap(vt[i * ld + j], vt[j * ld + i]);
    }
    return QlState<T>(lam, k, vt, ld);
  }
};

template <class T>
bool by_blocks(double alpha, int64_t k) {
  return sizeof(T) == 4 && (alpha == 1 || std::isinf(alpha)) && k >= kBlocksFrom;
}

// Matrices whose QL sweeps are interleaved.
template <class T>
int64_t entropy_group(double alpha, int64_t k) {
  const bool ql =
      alpha != 2 && !std::isinf(alpha) && !by_powers(alpha, k) && !by_blocks<T>(alpha, k);
  return ql ? kQlGroup : 1;
}

// H and, if wanted, V of up to entropy_group(alpha, k) matrices. g becomes full or, without
// `keep_g`, may be where V is.
template <class T>
void entropies(std::vector<EntropyTask<T>>& tasks, double alpha, bool want_v, bool keep_g,
               Memory& memory, const Executor& executor) {
  std::vector<QlState<T>> states;
  std::vector<EntropyTask<T>*> spectral;
  states.reserve(tasks.size());
  for (EntropyTask<T>& task : tasks) {
    const int64_t k = task.k, ld = task.ld;
    if (task.empty() || !std::isfinite(task.tau)) continue;
    const bool eigen = alpha != 2 && !by_powers(alpha, k);
    if (want_v || alpha != 2) mirror<T, true>(task.g, k, ld, executor);
    if constexpr (sizeof(T) == 4)
      if (by_blocks<T>(alpha, k)) {
        if (want_v) task.v = memory.take<T>(std::max(ld * ld, blocks_entries(k)));
        task.h = entropy_by_blocks(task.g, k, ld, task.tau, alpha, task.v, executor);
        if (std::isfinite(task.h) || k > kMaxEigen) continue;
      }
    if (want_v || eigen) task.v = keep_g || eigen ? memory.take<T>(ld * ld) : task.g;
    if (std::isinf(alpha)) {
      task.of_order_infinity(want_v, memory, executor);
    } else if (eigen) {
      states.push_back(task.spectrum(want_v, memory));
      spectral.push_back(&task);
    } else if (alpha == 2) {
      task.h = renyi2(task.g, k, ld, task.tau, task.v);
    } else {
      task.h = entropy_by_powers(task.g, k, ld, task.tau, int64_t(alpha), task.v, executor);
    }
  }
  ql(states.data(), int(states.size()));
  for (size_t i = 0; i < states.size(); ++i) {
    if (states[i].failed) continue;
    EntropyTask<T>& task = *spectral[i];
    T* f = want_v ? memory.take<T>(task.k) : nullptr;
    task.h = entropy_of_spectrum<T>(states[i].d, task.k, alpha, f);
    if (want_v)
      spectral_matrix(states[i].vt, f, T(1 / task.tau), task.k, task.ld, task.v, executor);
  }
}

// The weight of a matrix without rows is 0, of one that is not finite NaN; returns whether that is
// all.
template <class T>
bool trivial_weight(const EntropyTask<T>& task, T* weight) {
  if (task.empty()) std::fill_n(weight, task.k * task.k, T(0));
  if (!task.empty() && !std::isfinite(task.h)) fill_nan(weight, task.k * task.k);
  return task.empty() || !std::isfinite(task.h);
}

template <class S, class T>
void entropy_range(const Features& f, double alpha, T* value, T* weight, int64_t begin, int64_t end,
                   const Executor& executor) {
  const int64_t k = f.k(), group = entropy_group<T>(alpha, k);
  std::vector<Gram<S, T>> grams;
  std::vector<EntropyTask<T>> tasks;
  grams.reserve(size_t(group));
  for (int64_t first = begin; first < end; first += group) {
    Memory memory;
    grams.clear();
    tasks.clear();
    for (int64_t index = first; index < std::min(first + group, end); ++index) {
      grams.emplace_back(f, index, end, f.samples(), true, executor, memory);
      tasks.emplace_back(grams.back().g, k, grams.back().ldg);
    }
    const bool keep_g = f.normalize && f.samples();  // for the fold
    entropies(tasks, alpha, weight != nullptr, keep_g, memory, executor);
    for (size_t i = 0; i < tasks.size(); ++i) {
      value[first + int64_t(i)] = tasks[i].empty() ? T(0) : T(tasks[i].h);
      if (!weight) continue;
      T* w = weight + (first + int64_t(i)) * k * k;
      if (!trivial_weight(tasks[i], w)) grams[i].fold(tasks[i].v, T(1), w, executor);
    }
  }
}

// out = (sx x) ⊙ (sy y), all rows and columns of the work matrices.
template <class T>
void hadamard(const T* x, T sx, const T* y, T sy, int64_t ld, T* out, const Executor& executor) {
  executor.run(ld, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * ld; i < end * ld; i += kLanes<T>)
      store(out + i, (load(x + i) * splat(sx)) * (load(y + i) * splat(sy)));
  });
}

// The power of two that brings the diagonal of g to about 1. Entropies do not see it, and a product
// of two small matrices (of nearly collapsed views, centred) could vanish without it.
template <class T>
T unit_scale(const T* g, int64_t k, int64_t ld) {
  T largest = 0;
  for (int64_t i = 0; i < k; ++i) largest = std::max(largest, g[i * ld + i]);
  if (!(largest > 0) || !std::isfinite(largest)) return 1;
  return T(std::ldexp(1.0, std::clamp(-std::ilogb(largest), -120, 120)));
}

// H_alpha of K1 ⊙ K2, K the n x n Gram matrices of two views, each scaled as above. With
// V = dH / d(s1 K1 ⊙ s2 K2) the weights are those of s1 V ⊙ s2 K2 for the first view and of
// s2 V ⊙ s1 K1 for the second.
template <class S, class T>
void joint_entropy_range(const Features& f1, const Features& f2, double alpha, T* value, T* weight1,
                         T* weight2, int64_t begin, int64_t end, const Executor& executor) {
  const int64_t n = f1.n, group = entropy_group<T>(alpha, n);
  std::vector<Gram<S, T>> first_views, second_views;
  std::vector<T> first_scales, second_scales;
  std::vector<EntropyTask<T>> tasks;
  first_views.reserve(size_t(group));
  second_views.reserve(size_t(group));
  for (int64_t first = begin; first < end; first += group) {
    Memory memory;
    first_views.clear();
    second_views.clear();
    first_scales.clear();
    second_scales.clear();
    tasks.clear();
    for (int64_t index = first; index < std::min(first + group, end); ++index) {
      first_views.emplace_back(f1, index, end, true, true, executor, memory);
      second_views.emplace_back(f2, index, end, true, true, executor, memory);
      const T *g1 = first_views.back().g, *g2 = second_views.back().g;
      const int64_t ld = first_views.back().ldg;
      first_scales.push_back(unit_scale(g1, n, ld));
      second_scales.push_back(unit_scale(g2, n, ld));
      T* product = memory.take<T>(ld * ld);
      hadamard(g1, first_scales.back(), g2, second_scales.back(), ld, product, executor);
      tasks.emplace_back(product, n, ld);
    }
    entropies(tasks, alpha, weight1 != nullptr, true, memory, executor);
    for (size_t i = 0; i < tasks.size(); ++i) {
      const int64_t index = first + int64_t(i);
      value[index] = tasks[i].empty() ? T(0) : T(tasks[i].h);
      if (!weight1) continue;
      T *w1 = weight1 + index * n * n, *w2 = weight2 + index * n * n;
      if (trivial_weight(tasks[i], w1)) {
        std::copy_n(w1, n * n, w2);
        continue;
      }
      const Gram<S, T>&one = first_views[i], &two = second_views[i];
      mirror<T, true>(one.g, n, one.ldg, executor);
      mirror<T, true>(two.g, n, two.ldg, executor);
      T* product = tasks[i].g;  // not needed any more
      hadamard(tasks[i].v, T(1), two.g, second_scales[i], one.ldg, product, executor);
      one.fold(product, first_scales[i], w1, executor);
      hadamard(tasks[i].v, T(1), one.g, first_scales[i], one.ldg, product, executor);
      two.fold(product, second_scales[i], w2, executor);
    }
  }
}

// H_alpha of ready Gram matrices (k x k, contiguous), each scaled as above, and V.
template <class T>
void gram_entropy_range(const T* gram, int64_t k, double alpha, T* value, T* v, int64_t begin,
                        int64_t end, const Executor& executor) {
  const int64_t ld = padded<T>(k), group = entropy_group<T>(alpha, k);
  std::vector<EntropyTask<T>> tasks;
  std::vector<T> scales;
  for (int64_t first = begin; first < end; first += group) {
    Memory memory;
    tasks.clear();
    scales.clear();
    for (int64_t index = first; index < std::min(first + group, end); ++index) {
      const T* from = gram + index * k * k;
      T* g = memory.take<T>(ld * ld);
      scales.push_back(unit_scale(from, k, k));
      for (int64_t i = 0; i < k; ++i) {
        for (int64_t j = 0; j < k; ++j) g[i * ld + j] = from[i * k + j] * scales.back();
        std::fill(g + i * ld + k, g + (i + 1) * ld, T(0));
      }
      std::fill(g + k * ld, g + ld * ld, T(0));
      tasks.emplace_back(g, k, ld);
    }
    entropies(tasks, alpha, v != nullptr, false, memory, executor);
    for (size_t i = 0; i < tasks.size(); ++i) {
      const int64_t index = first + int64_t(i);
      value[index] = tasks[i].empty() ? T(0) : T(tasks[i].h);
      if (!v) continue;
      T* to = v + index * k * k;
      if (trivial_weight(tasks[i], to)) continue;
      for (int64_t r = 0; r < k; ++r)
        for (int64_t j = 0; j < k; ++j) to[r * k + j] = scales[i] * tasks[i].v[r * ld + j];
    }
  }
}
