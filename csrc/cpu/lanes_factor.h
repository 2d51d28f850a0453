// log det (I + X) and (I + X)⁻¹ of small matrices, one per vector lane. Included inside an
// instruction-set namespace after lanes.h.

// log of a product of many factors: mantissa and exponent apart, one logarithm at the end.
template <class T>
struct LogProduct {
  double mantissa[kLanes<T>];
  int64_t exponent[kLanes<T>] = {};

  LogProduct() { std::fill(mantissa, mantissa + kLanes<T>, 1.0); }

  // Times 1 + x. Factors are positive and at most the square root of the largest double.
  void times_one_plus(Vec<T> x) {
    T y[kLanes<T>];
    store(y, x);
    for (int m = 0; m < kLanes<T>; ++m) {
      const double product = mantissa[m] * (1 + double(y[m]));
      int64_t bits;
      std::memcpy(&bits, &product, 8);
      exponent[m] += (bits >> 52) - 1023;
      bits = (bits & 0xfffffffffffff) | (int64_t(1023) << 52);
      std::memcpy(&mantissa[m], &bits, 8);
    }
  }

  double log(int m) const {
    return std::log(mantissa[m]) + double(exponent[m]) * 0.69314718055994530942;
  }
};

// I + X = L D Lᵀ for X = c · g, with L unit lower triangular, by columns of blocks; then F = L⁻¹ -
// I and (I + X)⁻¹ = (I + F)ᵀ D⁻¹ (I + F). As in factor.h no identity is ever stored: pivots are 1 +
// δ, F holds no 1, and a small X comes back as I - (I + X)⁻¹ with all its digits.
template <class T>
struct LaneFactor {
  static constexpr int VL = kLanes<T>;
  const int64_t order;
  Vec<T>*l, *ft;           // L packed by rows; Fᵀ by rows, row j at ft + j * order
  Vec<T>*delta, *inverse;  // pivots less 1; 1 / pivots
  LogProduct<T> pivots;
  Flags<T> possible;  // no pivot has been swamped by rounding

  LaneFactor(const Vec<T>* g, Vec<T> c, int64_t size, Memory& memory) : order(size) {
    l = memory.take<Vec<T>>(packed_row(order));
    delta = memory.take<Vec<T>>(order);
    inverse = memory.take<Vec<T>>(order);
    possible = ~Flags<T>{};
    Memory inner;
    Vec<T>* y = inner.take<Vec<T>>(LB * order);  // L D of the current block row
    for (int64_t j = 0; j < order; j += LB) {
      const Vec<T>* b[LB];
      for (int r = 0; r < LB; ++r) {
        b[r] = y + r * order;
        const Vec<T>* lr = l + packed_row(j + r);
        for (int64_t p = 0; p < j; ++p) y[r * order + p] = lr[p] * (1 + delta[p]);
      }
      Vec<T> d[LB][LB];
      for (int64_t i = j; i < order; i += LB) {
        const Vec<T>* a[LB];
        Vec<T> s[LB][LB];
        for (int r = 0; r < LB; ++r) {
          a[r] = l + packed_row(i + r);
          for (int q = 0; q < LB; ++q)
            s[r][q] = i == j && q > r ? Vec<T>{} : -c * g[packed_row(i + r) + j + q];
        }
        dots<T>(j, a, b, s);
        for (int r = 0; r < LB; ++r)
          for (int q = 0; q < LB; ++q) s[r][q] = -s[r][q];
        if (i == j) {
          factor_diagonal(s, j);
          for (int r = 0; r < LB; ++r)
            for (int q = 0; q < r; ++q) l[packed_row(j + r) + j + q] = d[r][q] = s[r][q];
          continue;
        }
        for (int q = 0; q < LB; ++q)
          for (int r = 0; r < LB; ++r) {
            for (int p = 0; p < q; ++p) s[r][q] -= s[r][p] * d[q][p];
          }
        for (int r = 0; r < LB; ++r)
          for (int q = 0; q < LB; ++q) l[packed_row(i + r) + j + q] = s[r][q] * inverse[j + q];
      }
    }
  }

  // Overwrites L (packed) with I - (I + X)⁻¹ in the lanes `offset`, with -(I + X)⁻¹ in the others.
  Vec<T>* invert(Flags<T> offset, Memory& memory) {
    ft = memory.take<Vec<T>>(order * order);
    for (int64_t j = 0; j < order; j += LB) invert_column(j);
    Memory inner;
    Vec<T>* h = inner.take<Vec<T>>(LB * order);  // Fᵀ D⁻¹ of the current block row
    for (int64_t i = 0; i < order; i += LB) {
      const Vec<T>* a[LB];
      const int64_t after = i + LB;
      Vec<T> own[LB][LB] = {};
      for (int r = 0; r < LB; ++r) {
        const Vec<T>* row = ft + (i + r) * order;
        for (int64_t p = i + r + 1; p < order; ++p) h[r * order + p] = row[p] * inverse[p];
        for (int q = r + 1; q < LB; ++q) own[r][q] = h[r * order + i + q];
        a[r] = h + r * order + after;
      }
      for (int64_t j = 0; j <= i; j += LB) {
        const Vec<T>* b[LB];
        for (int q = 0; q < LB; ++q) b[q] = ft + (j + q) * order + after;
        Vec<T> s[LB][LB] = {};
        dots<T>(order - after, a, b, s);
        for (int r = 0; r < LB; ++r)
          for (int q = 0; q < LB; ++q) {
            if (i == j && q > r) continue;
            const Vec<T>* column = ft + (j + q) * order + i;  // F(i.., j + q)
            Vec<T> sum = s[r][q];
            for (int p = r + 1; p < LB; ++p) sum += own[r][p] * column[p];
            if (i == j && q == r)
              sum = offset ? sum - delta[i + r] * inverse[i + r] : sum + inverse[i + r];
            else
              sum += inverse[i + r] * column[r];
            l[packed_row(i + r) + j + q] = -sum;
          }
      }
    }
    return l;
  }

 private:
  // L D Lᵀ of a block, in place: below the diagonal L.
  void factor_diagonal(Vec<T> (&s)[LB][LB], int64_t j) {
    for (int q = 0; q < LB; ++q) {
      const Vec<T> x = s[q][q], pivot = 1 + x;
      delta[j + q] = x;
      inverse[j + q] = 1 / pivot;
      // Pivots of I + X are at least 1: one much below tells that rounding of X swamped it.
      possible &= (pivot > T(sizeof(T) == 4 ? 0.999 : 0)) & (pivot < T(kSquareHigh<T>));
      pivots.times_one_plus(x);
      Vec<T> column[LB];
      for (int r = q + 1; r < LB; ++r) {
        column[r] = s[r][q];
        s[r][q] *= inverse[j + q];
      }
      for (int r = q + 1; r < LB; ++r)
        for (int p = q + 1; p <= r; ++p) s[r][p] -= s[r][q] * column[p];
    }
  }

  // F(i, j) = -(L(i, j) + sum over j < p < i of L(i, p) F(p, j)) for a column of blocks.
  void invert_column(int64_t j) {
    const Vec<T>* b[LB];
    for (int q = 0; q < LB; ++q) b[q] = ft + (j + q) * order + j + LB;
    for (int64_t i = j; i < order; i += LB) {
      const Vec<T>* a[LB];
      Vec<T> s[LB][LB];
      for (int r = 0; r < LB; ++r) {
        const Vec<T>* row = l + packed_row(i + r);
        a[r] = row + j + LB;
        for (int q = 0; q < LB; ++q) s[r][q] = i == j && q >= r ? Vec<T>{} : row[j + q];
      }
      if (i > j) {
        dots<T>(i - j - LB, a, b, s);
        for (int r = 0; r < LB; ++r)
          for (int q = 0; q < LB; ++q)
            for (int p = q + 1; p < LB; ++p)
              s[r][q] += l[packed_row(i + r) + j + p] * ft[(j + q) * order + j + p];
      }
      for (int r = 0; r < LB; ++r)
        for (int q = 0; q < (i == j ? r : LB); ++q) {
          Vec<T> sum = s[r][q];
          for (int p = i == j ? q + 1 : 0; p < r; ++p)
            sum -= l[packed_row(i + r) + i + p] * s[p][q];
          // s keeps -F, which is what the next rows subtract.
          s[r][q] = sum;
          ft[(j + q) * order + i + r] = -sum;
        }
    }
  }
};
