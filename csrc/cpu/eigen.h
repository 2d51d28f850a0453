// Eigenvalues and, if wanted, eigenvectors of one small symmetric matrix. Included inside an
// instruction-set namespace after gemm.h.
//
// Householder tridiagonalisation, then implicit QL. All vector loops run along rows, because the
// matrix is kept in full; the scalar recurrence of QL runs in double whatever T is, and its
// rotations are applied a whole sweep at a time to rows of Vᵀ, so that each row is loaded once.

// y[0..m) = sum_i x[i] a[i * lda + 0..m), m padded to whole vectors by the caller.
template <class T>
inline void row_combination(const T* a, int64_t lda, const T* x, int64_t rows, int64_t width,
                            T* y) {
  constexpr int S = 4;  // vectors per strip: enough accumulators to hide the latency
  constexpr int VL = kLanes<T>;
  int64_t j = 0;
  for (; j + S * VL <= width; j += S * VL) {
    Vec<T> acc[S] = {};
    for (int64_t i = 0; i < rows; ++i)
      for (int v = 0; v < S; ++v) acc[v] += splat(x[i]) * load(a + i * lda + j + v * VL);
    for (int v = 0; v < S; ++v) store(y + j + v * VL, acc[v]);
  }
  for (; j < width; j += VL) {
    Vec<T> even{}, odd{};
    int64_t i = 0;
    for (; i + 2 <= rows; i += 2) {
      even += splat(x[i]) * load(a + i * lda + j);
      odd += splat(x[i + 1]) * load(a + (i + 1) * lda + j);
    }
    if (i < rows) even += splat(x[i]) * load(a + i * lda + j);
    store(y + j, even + odd);
  }
}

// a (k x k, full, leading dimension lda >= k rounded up to vectors, padding zero) becomes its
// tridiagonal form (diagonal d, off-diagonal e[0..k-1)); row j of a keeps reflector j in columns
// (j, k), tau[j] its factor: H_j = I - tau v vᵀ. work: 3 lda.
template <class T>
void tridiagonalize(T* a, int64_t k, int64_t lda, double* d, double* e, T* tau, T* work) {
  constexpr int VL = kLanes<T>;
  T* v = work;
  T* p = work + lda;
  for (int64_t j = 0; j + 2 < k; ++j) {
    // Columns from a vector boundary at or left of j + 1; entries left of j + 1 are zero in v.
    const int64_t c0 = (j + 1) / VL * VL, width = round_up(k, VL) - c0;
    T* row = a + j * lda;
    for (int64_t i = c0; i < j + 2; ++i) v[i] = 0;
    for (int64_t i = k; i < c0 + width; ++i) v[i] = 0;
    for (int64_t i = j + 2; i < k; ++i) v[i] = row[i];
    Vec<T> squares{};
    for (int64_t i = c0; i < c0 + width; i += VL) squares += load(v + i) * load(v + i);
    const double norm2 = reduce_add<T>(squares);
    const double alpha = row[j + 1];
    d[j] = row[j];
    if (norm2 == 0) {
      tau[j] = 0;
      e[j] = alpha;
      continue;
    }
    const double beta =
        alpha > 0 ? -std::sqrt(alpha * alpha + norm2) : std::sqrt(alpha * alpha + norm2);
    const T t = T((beta - alpha) / beta), inverse = T(1 / (alpha - beta));
    e[j] = beta;
    tau[j] = t;
    for (int64_t i = c0; i < c0 + width; i += VL) store(v + i, load(v + i) * splat(inverse));
    v[j + 1] = 1;
    std::memcpy(row + j + 1, v + j + 1, (k - j - 1) * sizeof(T));

    // p = tau A v, then w = p - (tau / 2 · pᵀv) v, then A -= v wᵀ + w vᵀ.
    row_combination(a + (j + 1) * lda + c0, lda, v + j + 1, k - j - 1, width, p + c0);
    Vec<T> dot{};
    for (int64_t i = c0; i < c0 + width; i += VL) dot += load(p + i) * load(v + i);
    const T half = T(0.5) * t * t * reduce_add<T>(dot);
    for (int64_t i = c0; i < c0 + width; i += VL)
      store(p + i, splat(t) * load(p + i) - splat(half) * load(v + i));
    for (int64_t i = j + 1; i < k; ++i) {
      T* ai = a + i * lda;
      const Vec<T> vi = splat(v[i]), wi = splat(p[i]);
      for (int64_t c = c0; c < c0 + width; c += VL)
        store(ai + c, load(ai + c) - vi * load(p + c) - wi * load(v + c));
    }
  }
  if (k >= 2) {
    d[k - 2] = a[(k - 2) * lda + k - 2];
    e[k - 2] = a[(k - 2) * lda + k - 1];
  }
  if (k >= 1) d[k - 1] = a[(k - 1) * lda + k - 1];
}

// x <- Q x for the Q of tridiagonalize.
template <class T>
void transform_back_vector(const T* a, int64_t k, int64_t lda, const T* tau, double* x) {
  for (int64_t j = k - 3; j >= 0; --j) {
    const T* v = a + j * lda;
    double sum = 0;
    for (int64_t i = j + 1; i < k; ++i) sum += double(v[i]) * x[i];
    for (int64_t i = j + 1; i < k; ++i) x[i] -= double(tau[j]) * sum * double(v[i]);
  }
}

// q (k x k, leading dimension lda) = H_0 H_1 ... H_{k-3} from the reflectors in the rows of a.
template <class T>
void form_q(const T* a, int64_t k, int64_t lda, const T* tau, T* q, T* work) {
  constexpr int VL = kLanes<T>;
  T* v = work;
  T* u = work + lda;
  for (int64_t i = 0; i < k; ++i) {
    std::memset(q + i * lda, 0, lda * sizeof(T));
    q[i * lda + i] = 1;
  }
  for (int64_t j = k - 3; j >= 0; --j) {
    if (tau[j] == 0) continue;
    const int64_t c0 = (j + 1) / VL * VL, width = round_up(k, VL) - c0;
    std::memcpy(v + j + 1, a + j * lda + j + 1, (k - j - 1) * sizeof(T));
    row_combination(q + (j + 1) * lda + c0, lda, v + j + 1, k - j - 1, width, u + c0);
    for (int64_t i = j + 1; i < k; ++i) {
      const Vec<T> f = splat(T(tau[j] * v[i]));
      for (int64_t c = c0; c < c0 + width; c += VL)
        store(q + i * lda + c, load(q + i * lda + c) - f * load(u + c));
    }
  }
}

// V vectors of columns of rows first..last of vt take the rotations (c, s)[i] of the planes
// (i, i + 1), i descending. Each is a chain down the rows; V of them hide its latency.
template <class T, int V>
inline void rotate_columns(T* vt, int64_t lda, const double* c, const double* s, int64_t first,
                           int64_t last) {
  constexpr int VL = kLanes<T>;
  Vec<T> below[V];
  for (int v = 0; v < V; ++v) below[v] = load(vt + last * lda + v * VL);
  for (int64_t i = last - 1; i >= first; --i) {
    const Vec<T> ci = splat(T(c[i])), si = splat(T(s[i]));
    T* row = vt + i * lda;
    for (int v = 0; v < V; ++v) {
      const Vec<T> x = load(row + v * VL);
      store(row + lda + v * VL, si * x + ci * below[v]);
      below[v] = ci * x - si * below[v];
    }
  }
  for (int v = 0; v < V; ++v) store(vt + first * lda + v * VL, below[v]);
}

template <class T>
void rotate_rows(T* vt, int64_t lda, int64_t width, const double* c, const double* s, int64_t first,
                 int64_t last) {
  constexpr int VL = kLanes<T>;
  int64_t j = 0;
  for (; j + 4 * VL <= width; j += 4 * VL) rotate_columns<T, 4>(vt + j, lda, c, s, first, last);
  const int64_t rest = (width - j) / VL;
  if (rest == 3) rotate_columns<T, 3>(vt + j, lda, c, s, first, last);
  if (rest == 2) rotate_columns<T, 2>(vt + j, lda, c, s, first, last);
  if (rest == 1) rotate_columns<T, 1>(vt + j, lda, c, s, first, last);
}

// Implicit QL on a tridiagonal matrix, one sweep at a time: its diagonal becomes the eigenvalues,
// unordered. With vt, its rows (on entry the rows of Qᵀ) become the eigenvectors.
//
// A sweep is a chain of dependent square roots and divisions, which leaves most of a core idle; so
// ql() below advances several matrices at once and only the state is kept here.
template <class T>
struct QlState {
  // Diagonal and off-diagonal, then cosine and sine of the current sweep's rotations: k each, side
  // by side, so that one address serves the four.
  double* d;
  int64_t k, lda;
  T* vt;
  double tolerance = 0, g = 0, sine = 1, cosine = 1, shift = 0;
  int64_t l = 0, m = 0, i = 0;  // block [l, m], next rotation in the plane (i, i + 1)
  int iteration = 0;
  bool failed = false;

  double* e() const { return d + k; }

  QlState(double* arrays, int64_t order, T* vectors, int64_t ld)
      : d(arrays), k(order), lda(ld), vt(vectors) {
    double norm = 0;
    for (int64_t j = 0; j < k; ++j)
      norm = std::max(norm, std::abs(d[j]) + (j + 1 < k ? std::abs(e()[j]) : 0));
    // Off-diagonals below this move no eigenvalue by more than a small part of the rounding of T.
    tolerance = norm * double(std::numeric_limits<T>::epsilon()) * (sizeof(T) == 4 ? 0.02 : 0.5);
    if (k > 0) e()[k - 1] = 0;
  }

  // Sets up the next sweep; false when all eigenvalues are found, or one does not converge.
  bool begin_sweep() {
    for (; l < k; ++l, iteration = 0) {
      m = l;
      while (m + 1 < k && std::abs(e()[m]) > tolerance) ++m;
      if (m > l) break;
    }
    if (l >= k) return false;
    if (++iteration > 60) {
      failed = true;
      return false;
    }
    const double q = (d[l + 1] - d[l]) / (2 * e()[l]);
    const double root = std::sqrt(q * q + 1);
    g = d[m] - d[l] + e()[l] / (q + (q >= 0 ? root : -root));
    sine = cosine = 1;
    shift = 0;
    i = m - 1;
    return true;
  }

  void end_sweep() {
    d[l] -= shift;
    e()[l] = g;
    e()[m] = 0;
    if (vt) rotate_rows(vt, lda, round_up(k, kLanes<T>), d + 2 * k, d + 3 * k, l, m);
  }
};

// `count` rotations of each of N sweeps, interleaved; all matrices are of one order.
template <class T, int N>
inline void advance(QlState<T>* const* states, int64_t count) {
  const int64_t k = states[0]->k;
  double g[N], sine[N], cosine[N], shift[N], *at[N];
  for (int n = 0; n < N; ++n) {
    g[n] = states[n]->g;
    sine[n] = states[n]->sine;
    cosine[n] = states[n]->cosine;
    shift[n] = states[n]->shift;
    at[n] = states[n]->d + states[n]->i;
    states[n]->i -= count;
  }
  for (int64_t step = 0; step < count; ++step)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      double* p = at[n]--;
      const double f = sine[n] * p[k], b = cosine[n] * p[k];
      const double square = f * f + g[n] * g[n];
      // square = 0: nothing to annihilate, and any rotation will do. The division does not wait for
      // the square root.
      const bool some = square > 1e-300;
      const double r = std::sqrt(square), inverse = r * (1 / (some ? square : 1));
      p[k + 1] = r;
      sine[n] = f * inverse;
      cosine[n] = some ? g[n] * inverse : 1;
      const double h = p[1] - shift[n];
      const double t = (p[0] - h) * sine[n] + 2 * cosine[n] * b;
      shift[n] = sine[n] * t;
      p[1] = h + shift[n];
      g[n] = cosine[n] * t - b;
      p[2 * k] = cosine[n];
      p[3 * k] = sine[n];
    }
  for (int n = 0; n < N; ++n) {
    states[n]->g = g[n];
    states[n]->sine = sine[n];
    states[n]->cosine = cosine[n];
    states[n]->shift = shift[n];
  }
}

constexpr int kQlGroup = 6;

// Runs up to kQlGroup eigenproblems to their end.
template <class T>
void ql(QlState<T>* states, int count) {
  QlState<T>* active[kQlGroup];
  int n = 0;
  for (int j = 0; j < count; ++j)
    if (states[j].begin_sweep()) active[n++] = &states[j];
  while (n > 0) {
    int64_t steps = active[0]->i - active[0]->l + 1;
    for (int j = 1; j < n; ++j) steps = std::min(steps, active[j]->i - active[j]->l + 1);
    switch (n) {
      case 6: advance<T, 6>(active, steps); break;
      case 5: advance<T, 5>(active, steps); break;
      case 4: advance<T, 4>(active, steps); break;
      case 3: advance<T, 3>(active, steps); break;
      case 2: advance<T, 2>(active, steps); break;
      default: advance<T, 1>(active, steps);
    }
    int kept = 0;
    for (int j = 0; j < n; ++j) {
      QlState<T>* q = active[j];
      if (q->i < q->l) {
        q->end_sweep();
        if (!q->begin_sweep()) continue;
      }
      active[kept++] = q;
    }
    n = kept;
  }
}
