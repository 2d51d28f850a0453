// The von Neumann entropy of tridiagonal matrices and its derivative without eigenvalues (poles.h),
// one matrix per vector lane. Included inside an instruction-set namespace after lanes_eigen.h.
//
// rho = Q T Qᵀ leaves the inverses X of T + uI, for every pole u, which take O(k²): with the pivots
// from the bottom, eta_i = d_i + u - e_i² / eta_{i+1},
//
//     X_jj = 1 / eta_j + (e_{j-1} / eta_j)² X_{j-1,j-1}
//
//     X_{i+1,j} = -e_i / eta_{i+1} X_ij,  i >= j
//
// No differences but in the pivots, and entries of the same signs for every pole, so they keep
// their relative accuracy; pivots and diagonals are float64, since the smallest pole, 1.6e-7, would
// drown in T's rounding. Then V = Q (.) Qᵀ, in the place of the triangle. All in all 4 k³ flops
// instead of the 9 k³ and more of eigenvectors by QL.

constexpr int kPolesAtOnce = 4;

// The tridiagonal matrices of kLanes lanes in float64, lane after lane for every row, divided by c.
template <class T>
struct LaneLog {
  static constexpr int VL = kLanes<T>;
  const int64_t k;
  double *full, *off, *square;  // diagonal, off-diagonal (the last 0) and its square
  double *inverse, *entry;      // of a pole: 1 / eta_j, w X_jj
  double trace[VL], c[VL];
  bool definite[VL];

  LaneLog(const Vec<T>* d, const Vec<T>* e, int64_t order, Memory& memory) : k(order) {
    for (double** row : {&full, &off, &square, &inverse, &entry})
      *row = memory.take<double>(k * VL);
    double widest[VL] = {}, norm[VL] = {}, before[VL] = {};
    for (int m = 0; m < VL; ++m) trace[m] = 0;
    for (int64_t i = 0; i < k; ++i) {
      T x[VL], y[VL];
      store(x, d[i]);
      store(y, e[i]);
      for (int m = 0; m < VL; ++m) {
        const double diagonal = x[m], beside = i + 1 < k ? y[m] : 0;
        full[i * VL + m] = diagonal;
        off[i * VL + m] = beside;
        trace[m] += diagonal;
        norm[m] += diagonal * diagonal + 2 * beside * beside;
        widest[m] =
            std::max(widest[m], std::abs(diagonal) + std::abs(beside) + std::abs(before[m]));
        before[m] = beside;
      }
    }
    // No eigenvalue is larger than either norm. Noise below zero must stay above the smallest pole,
    // then it does above the others: how large it is shows when it does not.
    double factor[VL];
    for (int m = 0; m < VL; ++m) {
      c[m] = std::min(std::sqrt(norm[m]), widest[m]);
      if (!(c[m] > 0)) c[m] = 1;  // of a lane without rows, or one that failed before
      factor[m] = 1 / c[m];
    }
    for (int tries = 0; tries < kTries; ++tries) {
      for (int64_t i = 0; i < k * VL; i += VL)
        for (int m = 0; m < VL; ++m) {
          full[i + m] *= factor[m];
          off[i + m] *= factor[m];
          square[i + m] = off[i + m] * off[i + m];
        }
      double least[VL];
      pivots(kLeastShift, least);
      bool all = true;
      for (int m = 0; m < VL; ++m) {
        definite[m] = least[m] > 0;
        all &= definite[m];
        factor[m] = definite[m] ? 1 : 0.5;
        if (!definite[m] && tries + 1 < kTries) c[m] *= 2;
      }
      if (all) break;
    }
  }

  // H of T. With a, whose row stride is lda, its lower triangle becomes F - tr(T F) / tr(T) I.
  void entropy(double* h, Vec<T>* a, int64_t lda) {
    constexpr int P = kPolesAtOnce, C = 4;
    Memory memory;
    [[maybe_unused]] const FlushToZero flush;
    double sum[VL] = {};
    double* diagonal = a ? memory.take<double>(k * VL) : nullptr;
    if (a) std::fill_n(diagonal, k * VL, 0.0);
    Vec<T>*start[P], *ratio[P];
    for (int p = 0; p < P && a; ++p)
      start[p] = memory.take<Vec<T>>(k), ratio[p] = memory.take<Vec<T>>(k);
    for (int first = 0; first < kPoles; first += P) {
      for (int p = 0; p < P; ++p) {
        inverses(kPoleShift[first + p], kPoleWeight[first + p], sum);
        if (!a) continue;
        T* to = reinterpret_cast<T*>(start[p]);
        for (int64_t i = 0; i < k * VL; ++i) to[i] = T(entry[i]), diagonal[i] += entry[i];
        to = reinterpret_cast<T*>(ratio[p]);
        for (int64_t i = VL; i < k * VL; ++i) to[i] = T(-off[i - VL] * inverse[i]);
        ratio[p][0] = Vec<T>{};
      }
      // C columns at a time; column j0 + c begins below the diagonal.
      for (int64_t j0 = 0; a && j0 < k; j0 += C) {
        Vec<T> x[P][C] = {};
        for (int64_t i = j0; i < k; ++i) {
          Vec<T>* to = a + i * lda + j0;
          Vec<T> added[C] = {};
          for (int p = 0; p < P; ++p)
            for (int q = 0; q < C; ++q) {
              x[p][q] *= ratio[p][i];
              added[q] += x[p][q];
            }
          const int64_t width = std::min<int64_t>(C, i - j0);
          for (int q = 0; q < width; ++q) to[q] = first ? to[q] + added[q] : added[q];
          if (i < j0 + C)
            for (int p = 0; p < P; ++p) x[p][i - j0] = start[p][i];
        }
      }
    }
    for (int m = 0; m < VL; ++m) h[m] = c[m] * sum[m] + (kPoleSlope - std::log(c[m])) * trace[m];
    if (a) subtract_projection(diagonal, a, lda);
  }

 private:
  // 1 / eta_j; *least: the smallest pivot, which is not positive (or NaN) where T + uI is not
  // positive definite.
  void pivots(double u, double* least) {
    double next[VL] = {};
    for (int m = 0; m < VL; ++m) least[m] = 1;
    for (int64_t i = (k - 1) * VL; i >= 0; i -= VL)
      for (int m = 0; m < VL; ++m) {
        const double pivot = full[i + m] + u - next[m];
        least[m] = pivot >= least[m] ? least[m] : pivot;
        inverse[i + m] = 1 / pivot;
        // What row i takes from the pivot of the row before it.
        next[m] = i > 0 ? square[i - VL + m] * inverse[i + m] : 0;
      }
  }

  // w X_jj, and sum += w (k - u tr X).
  void inverses(double u, double w, double* sum) {
    double least[VL], x[VL] = {}, total[VL] = {};
    pivots(u, least);
    for (int64_t i = 0; i < k * VL; i += VL)
      for (int m = 0; m < VL; ++m) {
        const double r = inverse[i + m];
        x[m] = w * r + (i > 0 ? square[i - VL + m] * r * r * x[m] : 0);
        entry[i + m] = x[m];
        total[m] += x[m];
      }
    for (int m = 0; m < VL; ++m) sum[m] += w * double(k) - u * total[m];
  }

  void subtract_projection(const double* diagonal, Vec<T>* a, int64_t lda) const {
    double product[VL] = {}, scaled_trace[VL] = {};
    for (int64_t i = 0; i < k; ++i) {
      T beside[VL] = {};
      if (i + 1 < k) store(beside, a[(i + 1) * lda + i]);
      for (int m = 0; m < VL; ++m) {
        scaled_trace[m] += full[i * VL + m];
        product[m] +=
            full[i * VL + m] * diagonal[i * VL + m] + 2 * off[i * VL + m] * double(beside[m]);
      }
    }
    for (int m = 0; m < VL; ++m)
      product[m] = scaled_trace[m] > 0 ? product[m] / scaled_trace[m] : 0;
    for (int64_t i = 0; i < k; ++i) {
      T lanes[VL];
      for (int m = 0; m < VL; ++m) lanes[m] = T(diagonal[i * VL + m] - product[m]);
      a[i * lda + i] = load(lanes);
    }
  }
};

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
