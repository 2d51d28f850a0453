// alpha = inf: the largest eigenvalue and one vector of it, of tridiagonal and of block tridiagonal
// matrices, whose other eigenvalues nobody needs. Included inside an instruction-set namespace
// after blocks_pivots.h.
//
// M = uI - T is positive definite if u is above the spectrum, which its pivots show. Bisection ends
// with a u above the largest eigenvalue by less than rounding, where M has a factorisation without
// pivoting for inverse iteration: the vector grows by the reciprocal of that distance each time. In
// a cluster any combination of its vectors will do, as for any eigensolver.

// Steps of the bisection at most: more than any bracket takes, but not for ever.
constexpr int kBisections = 64;

constexpr int kInverseIterations = 4;

// Where inverse iteration starts: no eigenvector that occurs in practice is orthogonal to it.
inline double start_entry(int64_t i) { return 1 + double(i * 2654435761u % 1024) / 1024; }

// How far above the largest eigenvalue the bisection may end: below rounding, and for a vector so
// much below that a few iterations tell it from its neighbours.
template <class T>
constexpr double bracket(bool want_vector) {
  return sizeof(T) == 8 ? 5e-16 : want_vector ? 1e-11 : 1e-9;
}

// Of N matrices side by side: diagonal d, off-diagonal e (k rows of N, the last of e unused). The
// value is the lower end of the bracket, so that it does not pass 1; the vector's shift the upper.
template <int N>
struct LargestPair {
  double value[N];
  bool found[N];

  // x: k rows of N for the vectors, of length 1, or null.
  LargestPair(const double* d, const double* e, int64_t k, double within, double* x) {
    Memory memory;
    double* inverse = memory.take<double>(k * N);
    double above[N] = {}, least[N];
    std::fill_n(value, N, -std::numeric_limits<double>::infinity());
    for (int64_t i = 0; i < k; ++i)
      for (int m = 0; m < N; ++m) {
        const double before = i > 0 ? std::abs(e[(i - 1) * N + m]) : 0;
        const double after = i + 1 < k ? std::abs(e[i * N + m]) : 0;
        value[m] = std::max(value[m], d[i * N + m]);
        above[m] = std::max(above[m], d[i * N + m] + before + after);
      }
    // The bound itself may be the eigenvalue.
    for (int m = 0; m < N; ++m) above[m] += 1e-12 * above[m] + 1e-300;
    bool some = true;
    for (int step = 0; some && step < kBisections; ++step) {
      double middle[N];
      bool open[N];
      some = false;
      for (int m = 0; m < N; ++m) {
        middle[m] = 0.5 * (value[m] + above[m]);
        open[m] = above[m] - value[m] > within * above[m];
        some |= open[m];
      }
      pivots(d, e, k, middle, inverse, least);
      for (int m = 0; m < N; ++m)  // lanes do not wait for each other's bits
        if (open[m]) (least[m] > 0 ? above : value)[m] = middle[m];
    }
    pivots(d, e, k, above, inverse, least);
    for (int m = 0; m < N; ++m) found[m] = least[m] > 0;
    if (!x) return;
    for (int64_t i = 0; i < k * N; ++i) x[i] = start_entry(i / N);
    for (int turn = 0; turn < kInverseIterations; ++turn) solve(e, k, inverse, x);
  }

 private:
  // The pivots of uI - T from the bottom, inverted, and the smallest of them.
  static void pivots(const double* d, const double* e, int64_t k, const double* u, double* inverse,
                     double* least) {
    double next[N] = {};
    std::fill_n(least, N, std::numeric_limits<double>::infinity());
    for (int64_t i = (k - 1) * N; i >= 0; i -= N)
      for (int m = 0; m < N; ++m) {
        const double pivot = u[m] - d[i + m] - next[m];
        least[m] = pivot >= least[m] ? least[m] : pivot;
        inverse[i + m] = 1 / pivot;
        const double beside = i > 0 ? e[i - N + m] : 0;
        next[m] = beside * beside * inverse[i + m];
      }
  }

  // x <- (uI - T)⁻¹ x, brought to length 1.
  static void solve(const double* e, int64_t k, const double* inverse, double* x) {
    double square[N] = {};
    for (int64_t i = (k - 2) * N; i >= 0; i -= N)
      for (int m = 0; m < N; ++m) x[i + m] += e[i + m] * inverse[i + N + m] * x[i + N + m];
    for (int64_t i = 0; i < k * N; i += N)
      for (int m = 0; m < N; ++m) {
        const double above = i > 0 ? e[i - N + m] * x[i - N + m] : 0;
        x[i + m] = inverse[i + m] * (x[i + m] + above);
        square[m] += x[i + m] * x[i + m];
      }
    for (int m = 0; m < N; ++m) square[m] = 1 / std::sqrt(square[m]);
    for (int64_t i = 0; i < k * N; i += N)
      for (int m = 0; m < N; ++m) x[i + m] *= square[m];
  }
};

// The same of a block tridiagonal matrix; several shifts at once are the lanes.
struct BlockLargest {
  const BlockTridiagonal& b;
  double value = 0, shift = std::numeric_limits<double>::quiet_NaN();

  BlockLargest(const BlockTridiagonal& blocks, bool want_vector) : b(blocks) {
    constexpr int P = kLanes<double>;
    const auto nothing = [](auto&&...) {};
    double above = b.bounds().norm * (1 + 1e-12);
    for (int step = 0; step < kBisections; ++step) {
      if (!(above - value > bracket<float>(want_vector) * above)) break;
      double u[P];
      for (int m = 0; m < P; ++m) u[m] = value + (above - value) * (m + 1) / (P + 1);
      Wide least = splat(std::numeric_limits<double>::infinity());
      pivots_from_bottom(b, -1, load(u), &least, nothing, nothing);
      int first = 0;
      while (first < P && !(least[first] > 0)) ++first;
      if (first == P && std::isnan(least[P - 1])) break;
      if (first < P) above = shift = u[first];
      if (first > 0) value = u[first - 1];
    }
    if (std::isnan(shift)) value = shift;
  }

  // One eigenvector, of length 1, to x (order).
  void vector(double* x) const {
    Memory memory;
    const int64_t n = b.blocks;
    double *l = memory.take<double>(n * kBlockEntries), *inverse = memory.take<double>(b.order),
           *r = memory.take<double>(n * kBlockEntries);  // eta_i⁻¹ M_{i,i-1}
    Wide least = splat(1.0);
    pivots_from_bottom(
        b, -1, splat(shift), &least, [](auto&&...) {},
        [&](int64_t i, const Wide* factor, const Wide* d, Wide* y) {
          if (i > 0) solve_upper_blocks(factor, y);
          for (int64_t e = 0; e < kBlockEntries; ++e) {
            l[i * kBlockEntries + e] = factor[e][0];
            r[i * kBlockEntries + e] = i > 0 ? y[e][0] : 0;
          }
          for (int64_t q = 0; q < kBlock; ++q) inverse[i * kBlock + q] = d[q][0];
        });
    for (int64_t i = 0; i < b.order; ++i) x[i] = i < b.k ? start_entry(i) : 0;
    for (int turn = 0; turn < kInverseIterations; ++turn) {
      for (int64_t i = n - 1; i > 0; --i)
        for (int64_t p = 0; p < kBlock; ++p)
          for (int64_t q = 0; q < kBlock; ++q)
            x[(i - 1) * kBlock + q] -= r[i * kBlockEntries + p * kBlock + q] * x[i * kBlock + p];
      for (int64_t i = 0; i < n; ++i) {
        double* z = x + i * kBlock;
        const double* a = l + i * kBlockEntries;
        for (int64_t p = 0; p < kBlock; ++p)
          for (int64_t q = 0; q < p; ++q) z[p] -= a[p * kBlock + q] * z[q];
        for (int64_t p = 0; p < kBlock; ++p) z[p] *= inverse[i * kBlock + p];
        for (int64_t p = kBlock - 1; p >= 0; --p)
          for (int64_t q = p + 1; q < kBlock; ++q) z[p] -= a[q * kBlock + p] * z[q];
        for (int64_t p = 0; p < kBlock && i > 0; ++p)
          for (int64_t q = 0; q < kBlock; ++q)
            z[p] -= r[i * kBlockEntries + p * kBlock + q] * z[q - kBlock];
      }
      double square = 0;
      for (int64_t i = 0; i < b.order; ++i) square += x[i] * x[i];
      for (int64_t i = 0; i < b.order; ++i) x[i] /= std::sqrt(square);
    }
  }
};

// V = (I - v vᵀ / lambda) / tau for H_inf = -log lambda, lambda the largest eigenvalue of rho = G /
// tau; full, zero past k.
template <class T>
void largest_derivative(const double* x, double lambda, double tau, int64_t k, int64_t ld, T* v,
                        const Executor& executor) {
  executor.run(ld, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t j = 0; j < ld; ++j)
        v[i * ld + j] = i < k && j < k ? T(((i == j ? 1 : 0) - x[i] * x[j] / lambda) / tau) : T(0);
  });
}
