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

// Rows first..last of vt take the rotations (c, s)[i] of the planes (i, i + 1), i descending.
template <class T>
void rotate_rows(T* vt, int64_t lda, int64_t width, const T* c, const T* s, int64_t first,
                 int64_t last) {
  constexpr int VL = kLanes<T>, S = 2;
  for (int64_t j = 0; j < width; j += S * VL) {
    const int n = int(std::min<int64_t>(S, (width - j) / VL));
    if (n == S) {
      Vec<T> below[S];
      for (int v = 0; v < S; ++v) below[v] = load(vt + last * lda + j + v * VL);
      for (int64_t i = last - 1; i >= first; --i) {
        const Vec<T> ci = splat(c[i]), si = splat(s[i]);
        for (int v = 0; v < S; ++v) {
          const Vec<T> x = load(vt + i * lda + j + v * VL);
          store(vt + (i + 1) * lda + j + v * VL, si * x + ci * below[v]);
          below[v] = ci * x - si * below[v];
        }
      }
      for (int v = 0; v < S; ++v) store(vt + first * lda + j + v * VL, below[v]);
    } else {
      Vec<T> below = load(vt + last * lda + j);
      for (int64_t i = last - 1; i >= first; --i) {
        const Vec<T> ci = splat(c[i]), si = splat(s[i]), x = load(vt + i * lda + j);
        store(vt + (i + 1) * lda + j, si * x + ci * below);
        below = ci * x - si * below;
      }
      store(vt + first * lda + j, below);
    }
  }
}

// Implicit QL on the tridiagonal (d, e): d becomes the eigenvalues, unordered. With vt, its rows
// (on entry the rows of Qᵀ) become the eigenvectors. c, s: k each. False without convergence.
template <class T>
bool tridiagonal_ql(double* d, double* e, int64_t k, T* vt, int64_t lda, T* c, T* s) {
  if (k == 0) return true;
  double norm = 0;
  for (int64_t i = 0; i < k; ++i)
    norm = std::max(norm, std::abs(d[i]) + (i + 1 < k ? std::abs(e[i]) : 0));
  // Off-diagonals below this move no eigenvalue by more than a small part of the rounding of T.
  const double tolerance =
      norm * double(std::numeric_limits<T>::epsilon()) * (sizeof(T) == 4 ? 0.02 : 0.5);
  e[k - 1] = 0;
  for (int64_t l = 0; l < k; ++l) {
    for (int iteration = 0;; ++iteration) {
      int64_t m = l;
      while (m + 1 < k && std::abs(e[m]) > tolerance) ++m;
      if (m == l) break;
      if (iteration == 60) return false;
      double g = (d[l + 1] - d[l]) / (2 * e[l]);
      const double root = std::sqrt(g * g + 1);
      g = d[m] - d[l] + e[l] / (g + (g >= 0 ? root : -root));
      double sine = 1, cosine = 1, shift = 0;
      int64_t i = m - 1;
      for (; i >= l; --i) {
        const double f = sine * e[i], b = cosine * e[i];
        const double r = std::sqrt(f * f + g * g);
        e[i + 1] = r;
        if (r == 0) {  // the matrix has split here
          d[i + 1] -= shift;
          e[m] = 0;
          break;
        }
        const double inverse = 1 / r;
        sine = f * inverse;
        cosine = g * inverse;
        g = d[i + 1] - shift;
        const double t = (d[i] - g) * sine + 2 * cosine * b;
        shift = sine * t;
        d[i + 1] = g + shift;
        g = cosine * t - b;
        c[i] = T(cosine);
        s[i] = T(sine);
      }
      const bool split = i >= l;
      if (vt && i + 1 <= m - 1) rotate_rows(vt, lda, round_up(k, kLanes<T>), c, s, i + 1, m);
      if (split) continue;
      d[l] -= shift;
      e[l] = g;
      e[m] = 0;
    }
  }
  return true;
}
