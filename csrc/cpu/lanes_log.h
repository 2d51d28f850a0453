// The derivative of the von Neumann entropy without eigenvectors, one matrix per vector lane.
// Included inside an instruction-set namespace after lanes_eigen.h.
//
// V = dH / d rho = -log rho - H I needs log rho, of which rho = Q T Qᵀ leaves the logarithm of a
// tridiagonal matrix. As in mmae_fast/backends/rational.py, on the spectrum scaled to [0, 1],
//
//     -log x ≈ b + sum_p w_p / (x + u_p),        |error| <= 1e-8 / x:
//
// below what rounding of rho to float32 does to log x, 6e-8 / x. The inverse of a tridiagonal
// matrix takes O(k²): with the pivots of T + uI from the top (delta) and from the bottom (eta),
//
//     X_jj = 1 / (eta_j - e_{j-1}² / delta_{j-1}),    X_{i+1,j} = -e_i / eta_{i+1} X_ij  for i >=
//     j.
//
// Products only, of the same signs for every pole, so entries keep their relative accuracy; pivots,
// where the rounding would count, are float64. Then V = Q (.) Qᵀ, in the place of the triangle. All
// in all 4 k³ flops instead of the 9 k³ and more of eigenvectors by QL.

// Whether V takes the eigenvectors: the approximation is one for float32.
template <class T>
bool needs_vectors(double alpha, bool want_v) {
  return want_v && !(alpha == 1 && sizeof(T) == 4);
}

// Best approximations by 12 poles (python -m benchmarks.rational).
constexpr int kPoles = 12, kPolesAtOnce = 4;
constexpr double kPoleShift[kPoles] = {
    1.64068667856157e-07, 3.01075375829246e-06, 2.51307886684058e-05, 0.000145487058163255,
    0.000673436845898288, 0.00267153968874276,  0.0094681103045413,   0.0309183809928875,
    0.0960884476443772,   0.299548965309168,    1.06258122853185,     6.88947221034193};
constexpr double kPoleWeight[kPoles] = {
    6.08474229520899e-07, 7.21111034853513e-06, 4.78661338297228e-05, 0.000236982915452072,
    0.000974256858869363, 0.00351578515442211,  0.0115463792520441,   0.0356323185681541,
    0.107951129890304,    0.350150866610075,    1.51128326017592,     18.5455049685664};

// One pole u of weight w, for the matrix of diagonal `full` and squared off-diagonal `square` (k
// rows of kLanes, the last 0): eta, entry = w X_jj, which is added to diagonal too, and `least`
// lowered to the smallest pivot, which is not positive where T + uI is not positive definite.
template <int VL>
void pole_pivots(const double* full, const double* square, int64_t k, double u, double w,
                 double* eta, double* entry, double* diagonal, double* least) {
  double next[VL] = {}, low[VL];
  for (int m = 0; m < VL; ++m) low[m] = least[m];
  for (int64_t i = (k - 1) * VL; i >= 0; i -= VL)
    for (int m = 0; m < VL; ++m) {
      const double pivot = full[i + m] + u - next[m];
      low[m] = std::min(low[m], pivot);
      eta[i + m] = pivot;
      // What row i takes from the pivot of the row before it.
      next[m] = i > 0 ? square[i - VL + m] / pivot : 0;
    }
  double above[VL] = {};
  for (int64_t i = 0; i < k * VL; i += VL)
    for (int m = 0; m < VL; ++m) {
      const double delta = full[i + m] + u - above[m];
      low[m] = std::min(low[m], delta);
      entry[i + m] = w / (eta[i + m] - above[m]);
      diagonal[i + m] += entry[i + m];
      above[m] = square[i + m] / delta;
    }
  for (int m = 0; m < VL; ++m) least[m] = low[m];
}

// Entries far from the diagonal vanish; on the way numbers too small to be normal would cost an
// interruption each.
struct FlushToZero {
#if defined(__x86_64__)
  const unsigned before = _mm_getcsr();
  FlushToZero() { _mm_setcsr(before | 0x8040); }
  ~FlushToZero() { _mm_setcsr(before); }
#endif
};

// The lower triangle of a (row stride lda) = F - tr(T F) / tr(T) I, F = sum_p w_p (T / c + u_p)⁻¹:
// the multiples of I in log T, the slope b and H with the error of the approximation cancel.
// Returns the lanes where all of these matrices are positive definite.
template <class T>
Flags<T> minus_log_tridiagonal(const Vec<T>* d, const Vec<T>* e, const double* inverse_c, int64_t k,
                               Vec<T>* a, int64_t lda) {
  constexpr int VL = kLanes<T>, P = kPolesAtOnce, C = 4;
  Memory memory;
  [[maybe_unused]] const FlushToZero flush;
  double *full = memory.take<double>(k * VL), *square = memory.take<double>(k * VL),
         *off = memory.take<double>(k * VL), *eta = memory.take<double>(k * VL),
         *entry = memory.take<double>(k * VL), *diagonal = memory.take<double>(k * VL);
  const auto wide = [&](const Vec<T>* x, double* to) {
    for (int64_t i = 0; i < k; ++i) {
      T lanes[VL];
      store(lanes, x[i]);
      for (int m = 0; m < VL; ++m) to[i * VL + m] = double(lanes[m]) * inverse_c[m];
    }
  };
  wide(d, full);
  wide(e, off);
  for (int64_t i = 0; i < k * VL; ++i) square[i] = off[i] * off[i], diagonal[i] = 0;
  Vec<T>*start[P], *ratio[P];
  for (int p = 0; p < P; ++p) start[p] = memory.take<Vec<T>>(k), ratio[p] = memory.take<Vec<T>>(k);
  double least[VL];
  std::fill_n(least, VL, 1.0);
  for (int first = 0; first < kPoles; first += P) {
    for (int p = 0; p < P; ++p) {
      pole_pivots<VL>(full, square, k, kPoleShift[first + p], kPoleWeight[first + p], eta, entry,
                      diagonal, least);
      T* to = reinterpret_cast<T*>(start[p]);
      for (int64_t i = 0; i < k * VL; ++i) to[i] = T(entry[i]);
      to = reinterpret_cast<T*>(ratio[p]);
      for (int64_t i = VL; i < k * VL; ++i) to[i] = T(-off[i - VL] / eta[i]);
      ratio[p][0] = Vec<T>{};
    }
    // C columns at a time; column j0 + c begins below the diagonal.
    for (int64_t j0 = 0; j0 < k; j0 += C) {
      Vec<T> x[P][C] = {};
      for (int64_t i = j0; i < k; ++i) {
        Vec<T>* to = a + i * lda + j0;
        Vec<T> sum[C] = {};
        for (int p = 0; p < P; ++p)
          for (int c = 0; c < C; ++c) {
            x[p][c] *= ratio[p][i];
            sum[c] += x[p][c];
          }
        const int64_t width = std::min<int64_t>(C, i - j0);
        for (int c = 0; c < width; ++c) to[c] = first ? to[c] + sum[c] : sum[c];
        if (i < j0 + C)
          for (int p = 0; p < P; ++p) x[p][i - j0] = start[p][i];
      }
    }
  }
  double trace[VL] = {}, sum[VL] = {};
  for (int64_t i = 0; i < k; ++i) {
    T beside[VL] = {};
    if (i + 1 < k) store(beside, a[(i + 1) * lda + i]);
    for (int m = 0; m < VL; ++m) {
      trace[m] += full[i * VL + m];
      sum[m] += full[i * VL + m] * diagonal[i * VL + m] + 2 * off[i * VL + m] * double(beside[m]);
    }
  }
  for (int m = 0; m < VL; ++m) sum[m] = trace[m] > 0 ? sum[m] / trace[m] : 0;
  for (int64_t i = 0; i < k; ++i) {
    T lanes[VL];
    for (int m = 0; m < VL; ++m) lanes[m] = T(diagonal[i * VL + m] - sum[m]);
    a[i * lda + i] = load(lanes);
  }
  Flags<T> definite;
  for (int m = 0; m < VL; ++m) definite[m] = least[m] > 0 ? -1 : 0;
  return definite;
}

// a = Q a Qᵀ for the Q of tridiagonalize_lanes: the lower triangle of a, whose rows keep the
// reflectors above the diagonal.
template <class T>
void transform_back_lanes(Vec<T>* a, int64_t k, int64_t lda, const Vec<T>* tau) {
  constexpr int C = 8;
  Memory memory;
  Vec<T>* w = memory.take<Vec<T>>(k);
  for (int64_t j = k - 3; j >= 0; --j) {
    const Vec<T>* v = a + j * lda;
    reflect_lanes<T>(a, k, lda, j + 1, v, tau[j], w);
    // The rows of the reflector in the columns before it, some columns at a time.
    const auto columns = [&](int64_t c, auto width) {
      constexpr int W = decltype(width)::value;
      Vec<T> s[W] = {};
      for (int64_t i = j + 1; i < k; ++i)
        for (int x = 0; x < W; ++x) s[x] += v[i] * a[i * lda + c + x];
      for (int x = 0; x < W; ++x) s[x] *= tau[j];
      for (int64_t i = j + 1; i < k; ++i)
        for (int x = 0; x < W; ++x) a[i * lda + c + x] -= v[i] * s[x];
    };
    int64_t c = 0;
    for (; c + C <= j + 1; c += C) columns(c, std::integral_constant<int, C>{});
    for (; c + 2 <= j + 1; c += 2) columns(c, std::integral_constant<int, 2>{});
    for (; c <= j; ++c) columns(c, std::integral_constant<int, 1>{});
  }
}
