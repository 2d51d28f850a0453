// The von Neumann entropy of a block tridiagonal matrix and its derivative, without eigenvalues
// (poles.h). Included inside an instruction-set namespace after blocks_pivots.h.
//
// For every pole u, with the diagonal blocks D_i, the blocks E_i right of them, and the pivots of
// T + uI from the bottom (eta) and from the top (delta),
//
//     eta_i = D_i + u - E_i eta_{i+1}⁻¹ E_iᵀ
//
//     delta_i = D_i + u - E_{i-1}ᵀ delta_{i-1}⁻¹ E_{i-1}
//
//     X_ii = (eta_i - (D_i + u - delta_i))⁻¹
//
//     X_ij = -eta_i⁻¹ E_{i-1}ᵀ X_{i-1,j},  j < i
//
// Pivots are float64, one pole per vector lane; the products of the last line, all but O(k) of the
// work, float32. k² blocks of flops for each pole, next to the k³ of the reduction.

// One lane more than poles, for kLeastShift.
constexpr int kPoleGroups = kPoles / kLanes<double> + 1;

struct BlockLog {
  const BlockTridiagonal& b;
  const Executor& executor;
  const bool want_log;
  double scale = 0;       // 1 / c
  double trace = 0;       // of T
  Wide *bottom, *top;     // eta_i, and D_i + u - delta_i: lower triangles
  float *ratio, *start;   // -eta_i⁻¹ E_{i-1}ᵀ and w X_ii: block by block, pole by pole
  double* inverse_trace;  // of X_ii
  double* diagonal;       // of F
  double* projection;     // tr D_i F_ii

  BlockLog(const BlockTridiagonal& blocks, bool log, const Executor& parallel, Memory& memory)
      : b(blocks), executor(parallel), want_log(log) {
    const int64_t wide = kPoleGroups * b.blocks * kLowerEntries;
    bottom = memory.take<Wide>(wide);
    top = memory.take<Wide>(wide);
    inverse_trace = memory.take<double>(b.blocks * kPoles);
    if (!want_log) return;
    ratio = memory.take<float>(b.blocks * kPoles * kBlockEntries);
    start = memory.take<float>(b.blocks * kPoles * kBlockEntries);
    diagonal = memory.take<double>(b.order);
    projection = memory.take<double>(b.blocks);
  }

  // H of T, NaN if it is not positive semidefinite up to rounding. f: see log_entries.
  double entropy(float* f) {
    const auto [sum_of_diagonal, norm] = b.bounds();
    trace = sum_of_diagonal;
    // Noise below zero must stay above the smallest pole; how large it is shows when it does not.
    double c = norm;
    for (int tries = 0; tries < kTries; ++tries, c *= 2) {
      scale = 1 / c;
      if (!invert()) continue;
      double sum = 0;
      for (int p = 0; p < kPoles; ++p) {
        double of_pole = 0;
        for (int64_t i = 0; i < b.blocks; ++i) of_pole += inverse_trace[i * kPoles + p];
        sum += kPoleWeight[p] * (double(b.order) - kPoleShift[p] * of_pole);
      }
      if (want_log) log_entries(f);
      return c * sum + (kPoleSlope - std::log(c)) * trace;
    }
    return std::numeric_limits<double>::quiet_NaN();
  }

 private:
  static Wide shifts(int group) {
    constexpr int P = kLanes<double>;
    double u[P];
    for (int m = 0; m < P; ++m)
      u[m] = group * P + m < kPoles ? kPoleShift[group * P + m] : kLeastShift;
    return load(u);
  }

  // All X_ii; false where T / c + u is not positive definite.
  bool invert() {
    Memory memory;
    const int64_t n = b.blocks;
    Wide* least = memory.take<Wide>(2 * kPoleGroups + n);
    executor.run(2 * kPoleGroups, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        least[task] = splat(1.0);
        if (task % 2)
          from_top(int(task / 2), least + task);
        else
          from_bottom(int(task / 2), least + task);
      }
    });
    const auto positive = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        for (int m = 0; m < kLanes<double>; ++m)
          if (!(least[i][m] > 0)) return false;
      return true;
    };
    if (!positive(0, 2 * kPoleGroups)) return false;
    executor.run(n, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        least[2 * kPoleGroups + i] = splat(1.0);
        invert_block(i, least + 2 * kPoleGroups + i);
      }
    });
    return positive(2 * kPoleGroups, 2 * kPoleGroups + n);
  }

  void from_bottom(int group, Wide* least) const {
    pivots_from_bottom(
        b, scale, shifts(group), least,
        [&](int64_t i, const Wide* a) {
          Wide* keep = bottom + (group * b.blocks + i) * kLowerEntries;
          for (int64_t r = 0; r < kBlock; ++r)
            for (int64_t c = 0; c <= r; ++c) *keep++ = a[r * kBlock + c];
        },
        [&](int64_t i, const Wide* l, const Wide*, Wide* y) {
          if (i == 0 || !want_log) return;
          solve_upper_blocks(l, y);
          narrow(group, i, y, -1, ratio);
        });
  }

  void from_top(int group, Wide* least) const {
    Wide a[kBlockEntries], inverse[kBlock], y[kBlockEntries], next[kBlockEntries] = {};
    const Wide u = shifts(group);
    for (int64_t i = 0; i < b.blocks; ++i) {
      Wide* keep = top + (group * b.blocks + i) * kLowerEntries;
      shifted_block(b, i, scale, u, a);
      for (int64_t r = 0; r < kBlock; ++r)
        for (int64_t c = 0; c <= r; ++c) {
          *keep++ = next[r * kBlock + c];
          a[r * kBlock + c] -= next[r * kBlock + c];
        }
      factor_blocks(a, inverse, least);
      if (i + 1 == b.blocks) return;
      const float* off = b.right + i * kBlockEntries;
      for (int64_t e = 0; e < kBlockEntries; ++e) y[e] = splat(scale * double(off[e]));
      const bool lower = i + 2 < b.blocks;  // all but the last are an L of reflect_block
      solve_lower_blocks(a, y, lower);
      square_blocks(y, inverse, lower, next);
    }
  }

  void invert_block(int64_t i, Wide* least) const {
    Wide a[kBlockEntries], inverse[kBlock], y[kBlockEntries], x[kBlockEntries];
    double sum[kBlockEntries] = {};
    for (int group = 0; group < kPoleGroups; ++group) {
      int64_t at = (group * b.blocks + i) * kLowerEntries;
      for (int64_t r = 0; r < kBlock; ++r) {
        for (int64_t c = 0; c < kBlock; ++c) y[r * kBlock + c] = splat(r == c ? 1.0 : 0.0);
        for (int64_t c = 0; c <= r; ++c, ++at) a[r * kBlock + c] = bottom[at] - top[at];
        std::fill_n(a + r * (kBlock + 1) + 1, kBlock - 1 - r, Wide{});
      }
      factor_blocks(a, inverse, least);
      solve_lower_blocks(a, y, true);
      square_blocks(y, inverse, true, x);
      Wide of_pole{};
      for (int64_t r = 0; r < kBlock; ++r) of_pole += x[r * kBlock + r];
      const int64_t poles = std::min<int64_t>(kLanes<double>, kPoles - group * kLanes<double>);
      for (int64_t m = 0; m < poles; ++m)
        inverse_trace[i * kPoles + group * kLanes<double> + m] = of_pole[m];
      if (!want_log) continue;
      double w[kLanes<double>] = {};
      std::copy_n(kPoleWeight + group * kLanes<double>, poles, w);
      for (int64_t r = 0; r < kBlock; ++r)
        for (int64_t c = 0; c <= r; ++c) {
          const Wide entry = x[r * kBlock + c] * load(w);
          x[r * kBlock + c] = x[c * kBlock + r] = entry;
          sum[r * kBlock + c] += reduce_add<double>(entry);
        }
      narrow(group, i, x, 1, start);
    }
    if (!want_log) return;
    double product = 0;
    const float* d = b.diagonal(i);
    for (int64_t r = 0; r < kBlock; ++r) {
      diagonal[i * kBlock + r] = sum[r * kBlock + r];
      for (int64_t c = 0; c <= r; ++c)
        product += (r == c ? 1 : 2) * double(d[r * b.lda + c]) * sum[r * kBlock + c];
    }
    projection[i] = product;
  }

  // The lanes of sign · y to float32 blocks, one per pole.
  void narrow(int group, int64_t i, const Wide* y, double sign, float* out) const {
    constexpr int P = kLanes<double>;
    const int64_t poles = std::min<int64_t>(P, kPoles - group * P);
    float* to = out + (i * kPoles + group * P) * kBlockEntries;
    for (int64_t e = 0; e < kBlockEntries; e += P) {
      Wide x[P];
      for (int q = 0; q < P; ++q) x[q] = sign * y[e + q];
      transpose_block<double>(x);
      for (int64_t m = 0; m < poles; ++m)
        for (int q = 0; q < P; ++q) to[m * kBlockEntries + e + q] = float(x[m][q]);
    }
  }

  // F - tr(T F) / tr(T) I, F = sum_p w_p (T / c + u_p)⁻¹: the lower triangle, blocks on the
  // diagonal whole, of f (order rows of lda).
  void log_entries(float* f) const {
    constexpr int64_t N = NR<float>;
    const int64_t panels = ceil_div(b.order, N);
    const auto columns = [&](int64_t j0) {
      Memory memory;
      float *x = memory.take<float>(kPoles * kBlock * N), *y = memory.take<float>(kBlock * N),
            *sum = memory.take<float>(kBlock * N);
      std::fill_n(x, kPoles * kBlock * N, 0.f);
      const int64_t width = std::min(N, b.order - j0);
      for (int64_t i = j0 / kBlock; i < b.blocks; ++i) {
        const int64_t c0 = std::max(j0, i * kBlock), c1 = std::min(j0 + N, (i + 1) * kBlock);
        std::fill_n(sum, kBlock * N, 0.f);
        for (int p = 0; p < kPoles; ++p) {
          float* of_pole = x + p * kBlock * N;
          const int64_t block = (i * kPoles + p) * kBlockEntries;
          if (i * kBlock > j0) {
            for (int64_t r = 0; r < kBlock; r += MR)
              tile<float, NV, false, Write::kSet>(kBlock, ratio + block + r * kBlock, kBlock,
                                                  of_pole, N, y + r * N, N);
            std::memcpy(of_pole, y, size_t(kBlock * N) * sizeof(float));
          }
          for (int64_t r = 0; r < kBlock && c0 < c1; ++r)
            std::memcpy(of_pole + r * N + c0 - j0, start + block + r * kBlock + c0 - i * kBlock,
                        size_t(c1 - c0) * sizeof(float));
          for (int64_t e = 0; e < kBlock * N; e += kLanes<float>)
            store(sum + e, load(sum + e) + load(of_pole + e));
        }
        for (int64_t r = 0; r < kBlock; ++r)
          std::memcpy(f + (i * kBlock + r) * b.lda + j0, sum + r * N,
                      size_t(width) * sizeof(float));
      }
    };
    executor.run(ceil_div(panels, 2), 1, [&](int64_t begin, int64_t end) {
      [[maybe_unused]] const FlushToZero flush;
      for (int64_t p = begin; p < end; ++p) {
        columns(p * N);
        if (panels - 1 - p != p) columns((panels - 1 - p) * N);
      }
    });
    double product = 0;
    for (int64_t i = 0; i < b.blocks; ++i) {
      product += projection[i];
      const float* off = b.right + i * kBlockEntries;
      const float* below = f + (i + 1) * kBlock * b.lda + i * kBlock;
      for (int64_t r = 0; r < kBlock && i + 1 < b.blocks; ++r)
        for (int64_t c = 0; c < kBlock; ++c)
          product += 2 * double(off[r * kBlock + c]) * double(below[c * b.lda + r]);
    }
    for (int64_t i = 0; i < b.order; ++i) f[i * (b.lda + 1)] = float(diagonal[i] - product / trace);
  }
};
