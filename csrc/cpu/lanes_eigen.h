// Eigenvalues and eigenvectors of small symmetric matrices, one per vector lane. Included inside an
// instruction-set namespace after lanes.h.
//
// Householder tridiagonalisation, then implicit QL. All lanes run down the same rows; each has its
// own block [l, m] of the tridiagonal matrix and takes part in a rotation if it lies inside.

// The rows and columns [first, k) of the symmetric a (row stride lda; the lower triangle): A <- H A
// H with H = I - tau v vᵀ. w: k.
template <class T>
void reflect_lanes(Vec<T>* a, int64_t k, int64_t lda, int64_t first, const Vec<T>* v, Vec<T> tau,
                   Vec<T>* w) {
  for (int64_t i = first; i < k; ++i) w[i] = Vec<T>{};
  // w = A v from the lower triangle, two rows at a time.
  int64_t i = first;
  if ((k - i) % 2) {
    w[i] += a[i * lda + i] * v[i];
    ++i;
  }
  for (; i < k; i += 2) {
    const Vec<T>*a0 = a + i * lda, *a1 = a0 + lda;
    const Vec<T> v0 = v[i], v1 = v[i + 1];
    Vec<T> s0 = a0[i] * v0 + a1[i] * v1, s1 = a1[i] * v0 + a1[i + 1] * v1, t0{}, t1{};
    int64_t c = first;
    for (; c + 2 <= i; c += 2) {
      const Vec<T> x0 = a0[c], x1 = a1[c], y0 = a0[c + 1], y1 = a1[c + 1];
      s0 += x0 * v[c];
      s1 += x1 * v[c];
      t0 += y0 * v[c + 1];
      t1 += y1 * v[c + 1];
      w[c] += x0 * v0 + x1 * v1;
      w[c + 1] += y0 * v0 + y1 * v1;
    }
    for (; c < i; ++c) {
      s0 += a0[c] * v[c];
      s1 += a1[c] * v[c];
      w[c] += a0[c] * v0 + a1[c] * v1;
    }
    w[i] += s0 + t0;
    w[i + 1] += s1 + t1;
  }
  Vec<T> dot{};
  for (i = first; i < k; ++i) dot += w[i] * v[i];
  const Vec<T> half = T(0.5) * tau * tau * dot;
  for (i = first; i < k; ++i) w[i] = tau * w[i] - half * v[i];
  // A -= v wᵀ + w vᵀ
  for (i = first; i < k; ++i) {
    Vec<T>* ai = a + i * lda;
    const Vec<T> vi = v[i], wi = w[i];
    for (int64_t c = first; c <= i; ++c) ai[c] -= vi * w[c] + wi * v[c];
  }
}

// a (k x k, row stride lda; the lower triangle is used) becomes tridiagonal: diagonal d (k),
// off-diagonal e (k, last 0). Row j of a keeps reflector j in columns (j, k), tau[j] its factor:
// H_j = I - tau v vᵀ.
template <class T>
void tridiagonalize_lanes(Vec<T>* a, int64_t k, int64_t lda, Vec<T>* d, Vec<T>* e, Vec<T>* tau) {
  Memory memory;
  Vec<T>* w = memory.take<Vec<T>>(k);
  for (int64_t j = 0; j + 2 < k; ++j) {
    Vec<T>* v = a + j * lda;
    Vec<T> norm2{};
    for (int64_t i = j + 2; i < k; ++i) {
      v[i] = a[i * lda + j];
      norm2 += v[i] * v[i];
    }
    const Vec<T> alpha = a[(j + 1) * lda + j];
    const Flags<T> some = norm2 > 0;
    const Vec<T> root = sqrt_lanes<T>(alpha * alpha + norm2);
    const Vec<T> beta = some ? (alpha > 0 ? -root : root) : alpha;
    const Vec<T> t = some ? (beta - alpha) / beta : Vec<T>{};
    const Vec<T> inverse = some ? 1 / (alpha - beta) : Vec<T>{};
    d[j] = v[j];
    e[j] = beta;
    tau[j] = t;
    v[j + 1] = splat(T(1));
    for (int64_t i = j + 2; i < k; ++i) v[i] *= inverse;
    reflect_lanes<T>(a, k, lda, j + 1, v, t, w);
  }
  if (k >= 2) {
    d[k - 2] = a[(k - 2) * lda + k - 2];
    e[k - 2] = a[(k - 1) * lda + k - 2];
  }
  if (k >= 1) {
    d[k - 1] = a[(k - 1) * lda + k - 1];
    e[k - 1] = Vec<T>{};
  }
}

// x <- Q x for the Q = H_0 H_1 ... H_{k-3} of tridiagonalize_lanes.
template <class T>
void transform_back_vector_lanes(const Vec<T>* a, int64_t k, int64_t lda, const Vec<T>* tau,
                                 Vec<T>* x) {
  for (int64_t j = k - 3; j >= 0; --j) {
    const Vec<T>* v = a + j * lda;
    Vec<T> sum{};
    for (int64_t i = j + 1; i < k; ++i) sum += v[i] * x[i];
    sum *= tau[j];
    for (int64_t i = j + 1; i < k; ++i) x[i] -= sum * v[i];
  }
}

// q (k x k, row stride ldq) = Q.
template <class T>
void form_q_lanes(const Vec<T>* a, int64_t k, int64_t lda, const Vec<T>* tau, Vec<T>* q,
                  int64_t ldq) {
  for (int64_t i = 0; i < k; ++i)
    for (int64_t j = 0; j < k; ++j) q[i * ldq + j] = splat(T(i == j));
  for (int64_t j = k - 3; j >= 0; --j) {
    const Vec<T>* v = a + j * lda;
    // Four columns at a time: u = vᵀ Q, then Q -= tau v uᵀ.
    int64_t c = j + 1;
    for (; c + 4 <= k; c += 4) {
      Vec<T> s[4] = {};
      for (int64_t i = j + 1; i < k; ++i)
        for (int x = 0; x < 4; ++x) s[x] += v[i] * q[i * ldq + c + x];
      for (int x = 0; x < 4; ++x) s[x] *= tau[j];
      for (int64_t i = j + 1; i < k; ++i)
        for (int x = 0; x < 4; ++x) q[i * ldq + c + x] -= v[i] * s[x];
    }
    for (; c < k; ++c) {
      Vec<T> s{};
      for (int64_t i = j + 1; i < k; ++i) s += v[i] * q[i * ldq + c];
      s *= tau[j];
      for (int64_t i = j + 1; i < k; ++i) q[i * ldq + c] -= v[i] * s;
    }
  }
}

// R rows of q take the rotations (cosine, sine)[i] of the columns (i, i + 1), i = last - 1 ...
// first.
template <class T, int R>
inline void rotate_lanes(Vec<T>* q, int64_t ldq, const Vec<T>* cosine, const Vec<T>* sine,
                         int64_t first, int64_t last) {
  Vec<T> right[R];
  for (int r = 0; r < R; ++r) right[r] = q[r * ldq + last];
  for (int64_t i = last - 1; i >= first; --i) {
    const Vec<T> c = cosine[i], s = sine[i];
    for (int r = 0; r < R; ++r) {
      const Vec<T> x = q[r * ldq + i];
      q[r * ldq + i + 1] = s * x + c * right[r];
      right[r] = c * x - s * right[r];
    }
  }
  for (int r = 0; r < R; ++r) q[r * ldq + first] = right[r];
}

// The eigenvalues of the tridiagonal (d, e) replace d, unordered; with q (rows: any number `rows`)
// its columns are rotated along: the rows of Q become those of the eigenvector matrix. Returns the
// lanes that have converged.
template <class T>
Flags<T> ql_lanes(Vec<T>* d, Vec<T>* e, int64_t k, Vec<T>* q, int64_t ldq, int64_t rows) {
  Memory memory;
  Vec<T>*cosine = memory.take<Vec<T>>(k), *sine = memory.take<Vec<T>>(k);
  Vec<T> norm{};
  for (int64_t i = 0; i < k; ++i) {
    const Vec<T> x = abs_lanes<T>(d[i]) + abs_lanes<T>(e[i]);
    norm = x > norm ? x : norm;
  }
  // As in eigen.h: off-diagonals below this move no eigenvalue by more than a part of the rounding.
  const Vec<T> tolerance =
      norm * T(double(std::numeric_limits<T>::epsilon()) * (sizeof(T) == 4 ? 0.02 : 0.5));
  const Flags<T> zero{};
  const Index<T> order = Index<T>(k);
  Flags<T> at = zero;  // eigenvalues before this one are found
  for (int64_t sweep = 0; sweep < 12 * k + 60; ++sweep) {
    // The first block [l, m] at or after `at`, and what its shift needs; l = m = k: none is left.
    Flags<T> l = order - zero, m = l, next = l;
    Vec<T> dl{}, dl1{}, el = splat(T(1)), dm{}, below{}, dnext{};
    for (int64_t i = k - 1; i >= 0; --i) {
      const Flags<T> small = abs_lanes<T>(e[i]) <= tolerance;
      const Flags<T> here = ~small & (at <= Index<T>(i));
      next = small ? Index<T>(i) - zero : next;
      dnext = small ? d[i] : dnext;
      l = here ? Index<T>(i) - zero : l;
      m = here ? next : m;
      dl = here ? d[i] : dl;
      dl1 = here ? below : dl1;
      el = here ? e[i] : el;
      dm = here ? dnext : dm;
      below = d[i];
    }
    const Flags<T> left = l < order;
    if (!any<T>(left)) return ~zero;
    at = l;
    int64_t first = k, last = 0;
    for (int i = 0; i < kLanes<T>; ++i)
      if (left[i]) first = std::min<int64_t>(first, l[i]), last = std::max<int64_t>(last, m[i]);

    const Vec<T> half = (dl1 - dl) / (2 * el), root = sqrt_lanes<T>(half * half + 1);
    Vec<T> g = dm - dl + el / (half + (half >= 0 ? root : -root));
    Vec<T> s = splat(T(1)), c = s, shift{};
    for (int64_t i = last - 1; i >= first; --i) {
      const Index<T> row = Index<T>(i);
      const Flags<T> inside = (l <= row) & (row < m), start = m == row + 1, stop = l == row;
      const Vec<T> f = s * e[i], b = c * e[i], square = f * f + g * g;
      // Nothing to annihilate: any rotation will do.
      const Flags<T> some = square > T(1e-36);
      const Vec<T> r = sqrt_lanes<T>(square), inverse = 1 / r;
      const Vec<T> s1 = some ? f * inverse : Vec<T>{}, c1 = some ? g * inverse : splat(T(1));
      const Vec<T> h = d[i + 1] - shift, t = (d[i] - h) * s1 + 2 * c1 * b;
      const Vec<T> p1 = s1 * t, g1 = c1 * t - b;
      e[i + 1] = inside ? (start ? Vec<T>{} : r) : e[i + 1];
      d[i + 1] = inside ? h + p1 : d[i + 1];
      d[i] = inside & stop ? d[i] - p1 : d[i];
      e[i] = inside & stop ? g1 : e[i];
      s = inside ? s1 : s;
      c = inside ? c1 : c;
      g = inside ? g1 : g;
      shift = inside ? p1 : shift;
      sine[i] = inside ? s1 : Vec<T>{};
      cosine[i] = inside ? c1 : splat(T(1));
    }
    if (!q) continue;
    int64_t i = 0;
    for (; i + 4 <= rows; i += 4) rotate_lanes<T, 4>(q + i * ldq, ldq, cosine, sine, first, last);
    for (; i < rows; ++i) rotate_lanes<T, 1>(q + i * ldq, ldq, cosine, sine, first, last);
  }
  return ~(at < order);
}

// Eigenvalues alone. Those that should be zero are noise, of which a von Neumann entropy sees the
// sum: the rotations of large float32 matrices are float64, at O(k²) of O(k³), not to add to it.
template <class T>
Flags<T> eigenvalues_lanes(Vec<T>* d, Vec<T>* e, int64_t k) {
  if constexpr (sizeof(T) == 4) {
    if (k > kNarrowValues) {
      constexpr int half = kLanes<double>;
      Memory memory;
      Vec<double>*wide_d = memory.take<Vec<double>>(k), *wide_e = memory.take<Vec<double>>(k);
      Flags<T> converged{};
      for (int first = 0; first < kLanes<T>; first += half) {
        for (int64_t i = 0; i < k; ++i)
          for (int m = 0; m < half; ++m)
            wide_d[i][m] = d[i][first + m], wide_e[i][m] = e[i][first + m];
        const Flags<double> found =
            ql_lanes<double>(wide_d, wide_e, k, static_cast<Vec<double>*>(nullptr), 0, 0);
        for (int m = 0; m < half; ++m) converged[first + m] = found[m] ? -1 : 0;
        for (int64_t i = 0; i < k; ++i)
          for (int m = 0; m < half; ++m) d[i][first + m] = T(wide_d[i][m]);
      }
      return converged;
    }
  }
  return ql_lanes<T>(d, e, k, static_cast<Vec<T>*>(nullptr), 0, 0);
}

// v (packed) = sum_r f_r q_r q_rᵀ, q_r the columns of q (rows to whole blocks of LB exist).
template <class T>
void spectral_lanes(const Vec<T>* q, const Vec<T>* f, int64_t k, int64_t ldq, Vec<T>* v) {
  Memory memory;
  Vec<T>* h = memory.take<Vec<T>>(LB * k);
  for (int64_t i = 0; i < k; i += LB) {
    const Vec<T>* a[LB];
    for (int r = 0; r < LB; ++r) {
      for (int64_t p = 0; p < k; ++p) h[r * k + p] = q[(i + r) * ldq + p] * f[p];
      a[r] = h + r * k;
    }
    for (int64_t j = 0; j <= i; j += LB) {
      const Vec<T>* b[LB];
      for (int r = 0; r < LB; ++r) b[r] = q + (j + r) * ldq;
      Vec<T> s[LB][LB] = {};
      dots<T>(k, a, b, s);
      for (int r = 0; r < LB; ++r)
        for (int c = 0; c < (i == j ? r + 1 : LB); ++c) v[packed_row(i + r) + j + c] = s[r][c];
    }
  }
}
