// From a strided feature matrix of any storage type to packed panels of prepared rows (normalised,
// masked, centred). Included inside an instruction-set namespace after plan.h.
//
// Nothing here copies the batch: a matrix is read where it lies, a few rows or one block of the
// product's depth at a time, into panels that the cache holds.

// One matrix of the batch, storage type S, computed in T.
template <class S, class T>
struct Rows {
  const S* z;
  const bool* mask;
  int64_t n, d, row_stride, column_stride, mask_stride;
  bool normalize, center;

  Rows(const Features& f, int64_t index)
      : z(static_cast<const S*>(f.z)), mask(f.mask), n(f.n), d(f.d), row_stride(f.row_stride),
        column_stride(f.column_stride), mask_stride(f.mask_stride), normalize(f.normalize),
        center(f.center) {
    for (int i = f.batch_dims - 1; i >= 0; --i) {
      const int64_t at = index % f.batch_sizes[i];
      index /= f.batch_sizes[i];
      z += at * f.z_strides[i];
      if (mask) mask += at * f.mask_strides[i];
    }
  }

  bool kept(int64_t row) const { return !mask || mask[row * mask_stride]; }

  bool zero(int64_t row) const {
    for (int64_t j = 0; j < d; ++j)
      if (!(to_compute<T>(z[row * row_stride + j * column_stride]) == 0)) return false;
    return true;
  }

  // Row `row`, columns [c0, c1), as T: in place where possible, else converted into buffer.
  const T* fetch(int64_t row, int64_t c0, int64_t c1, T* buffer) const {
    const S* p = z + row * row_stride + c0 * column_stride;
    if constexpr (std::is_same_v<S, T>)
      if (column_stride == 1) return p;
    if (column_stride == 1) {
      for (int64_t j = 0; j < c1 - c0; ++j) buffer[j] = to_compute<T>(p[j]);
    } else {
      for (int64_t j = 0; j < c1 - c0; ++j) buffer[j] = to_compute<T>(p[j * column_stride]);
    }
    return buffer;
  }
};

// Asks for the next matrix of the batch while this one is worked on, a few cache lines at a time: a
// matrix is read in short pieces of many rows, which the hardware does not foresee.
class Prefetch {
 public:
  // Nothing to ask for.
  Prefetch() = default;

  // `bytes` from `from` on.
  Prefetch(const void* from, int64_t bytes, int64_t calls)
      : at_(static_cast<const char*>(from)), end_(at_ + bytes),
        step_(round_up(ceil_div(bytes, std::max<int64_t>(calls, 1)), 64)) {}

  // The `count` matrices after `index` that are below `end`, if each lies in one piece and they
  // leave room in a second-level cache; some(...) will be called `calls` times.
  Prefetch(const Features& f, int64_t item, int64_t index, int64_t end, int64_t calls,
           int64_t count = 1) {
    count = std::min(count, end - index - 1);
    if (count <= 0 || f.batch_dims != 1 || f.column_stride != 1 || f.row_stride != f.d) return;
    const int64_t bytes = ((count - 1) * f.z_strides[0] + f.n * f.d) * item;
    if (bytes > kMaxBytes) return;
    *this =
        Prefetch(static_cast<const char*>(f.z) + (index + 1) * f.z_strides[0] * item, bytes, calls);
  }

  void some() {
    const char* stop = std::min(end_, at_ + step_);
    for (; at_ < stop; at_ += 64) __builtin_prefetch(at_, 0, 2);
  }

 private:
  static constexpr int64_t kMaxBytes = 768 << 10;
  const char *at_ = nullptr, *end_ = nullptr;
  int64_t step_ = 0;
};

template <class T>
inline double dot(const T* x, const T* y, int64_t n) {
  constexpr int VL = kLanes<T>;
  Vec<T> acc[4] = {};
  int64_t i = 0;
  for (; i + 4 * VL <= n; i += 4 * VL)
    for (int v = 0; v < 4; ++v) acc[v] += load(x + i + v * VL) * load(y + i + v * VL);
  for (; i + VL <= n; i += VL) acc[0] += load(x + i) * load(y + i);
  double sum = reduce_add<T>((acc[0] + acc[1]) + (acc[2] + acc[3]));
  for (; i < n; ++i) sum += double(x[i]) * y[i];
  return sum;
}

// 1 / ||x||; 0 for a zero row; NaN for a row with NaN or Inf.
template <class T>
inline T inverse_norm(const T* x, int64_t n) {
  double sum = dot(x, x, n);
  if (sum > kSquareLow<T> && sum < kSquareHigh<T>) return T(1 / std::sqrt(sum));
  // Otherwise scale by the largest entry.
  double largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (!std::isfinite(x[i])) return std::numeric_limits<T>::quiet_NaN();
    largest = std::max(largest, std::abs(double(x[i])));
  }
  if (largest == 0) return 0;
  sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += (x[i] / largest) * (x[i] / largest);
  return T(1 / std::sqrt(sum) / largest);
}

// A prepared row is scale[i] · z_i - mean, and zero where the row is dropped. Fills scale (n: the
// inverse norm, or common_scale without normalisation; 0 for dropped rows) and mean
// (round_up(d, NR); zeros unless centred). Returns the number of rows kept.
template <class S, class T>
int64_t prepare(const Rows<S, T>& rows, T common_scale, T* scale, T* mean,
                const Executor& executor) {
  std::memset(mean, 0, round_up(rows.d, NR<T>) * sizeof(T));
  executor.run(rows.n, 64, [&](int64_t begin, int64_t end) {
    Memory memory;
    T* buffer = memory.take<T>(rows.d);
    for (int64_t i = begin; i < end; ++i) {
      scale[i] = 0;
      if (!rows.kept(i)) continue;
      scale[i] =
          rows.normalize ? inverse_norm(rows.fetch(i, 0, rows.d, buffer), rows.d) : common_scale;
    }
  });
  int64_t kept = 0;
  for (int64_t i = 0; i < rows.n; ++i) kept += rows.kept(i);
  if (!rows.center || kept == 0) return kept;
  // Shared by columns, so that the order of summation does not depend on the number of threads.
  // Short runs in T, added up in float64: a long sum of nearly equal rows would round one way.
  constexpr int64_t kColumns = 256, kRun = 8;
  executor.run(ceil_div(rows.d, kColumns), 1, [&](int64_t begin, int64_t end) {
    Memory memory;
    T* buffer = memory.take<T>(rows.d);
    const int64_t c0 = begin * kColumns, c1 = std::min(end * kColumns, rows.d);
    double* total = memory.take<double>(c1 - c0);
    std::fill(total, total + (c1 - c0), 0.0);
    int64_t run = 0;
    for (int64_t i = 0; i < rows.n; ++i) {
      if (!rows.kept(i)) continue;
      const T* x = rows.fetch(i, c0, c1, buffer);
      for (int64_t j = c0; j < c1; ++j) mean[j] += scale[i] * x[j - c0];
      if (++run % kRun != 0 && run != kept) continue;
      for (int64_t j = c0; j < c1; ++j) total[j - c0] += mean[j];
      std::memset(mean + c0, 0, size_t(c1 - c0) * sizeof(T));
    }
    for (int64_t j = c0; j < c1; ++j) mean[j] = T(total[j - c0] / double(kept));
  });
  return kept;
}

// The largest power of two that brings the entries to at most 1: entropies do not see a common
// factor, so rows that are not normalised are scaled by it before their squares can overflow.
template <class S, class T>
T power_of_two_scale(const Rows<S, T>& rows) {
  Memory memory;
  T* buffer = memory.take<T>(rows.d);
  double largest = 0;
  for (int64_t i = 0; i < rows.n; ++i) {
    if (!rows.kept(i)) continue;
    const T* x = rows.fetch(i, 0, rows.d, buffer);
    T m = 0;
    for (int64_t j = 0; j < rows.d; ++j) m = std::max(m, std::abs(x[j]));
    largest = std::max(largest, double(m));
  }
  if (largest == 0 || !std::isfinite(largest)) return 1;
  return T(std::ldexp(1.0, std::clamp(-std::ilogb(largest), sizeof(T) == 4 ? -120 : -1000,
                                      sizeof(T) == 4 ? 60 : 500)));
}

// Panel [j0, j0 + NR) of Zᵀ-as-right-operand on the samples side: rows j0.. of z become columns,
// depth runs over features [c0, c1). dst: (c1 - c0) x NR. buffer: kLanes x (c1 - c0) rounded up.
// With `squares` (n, to whole vectors) rows stay raw, dropped ones still become zero, and the sums
// of their squares go there, or are added to what is there.
template <class S, class T>
void pack_samples(const Rows<S, T>& rows, const T* scale, const T* mean, T* squares, bool add,
                  int64_t j0, int64_t c0, int64_t c1, T* dst, T* buffer) {
  constexpr int VL = kLanes<T>;
  const int64_t depth = c1 - c0, stride = round_up(depth, VL);
  for (int g = 0; g < NV; ++g) {
    const int64_t first = j0 + g * VL;
    if (first >= rows.n) break;  // no tile reads vectors past the last row
    const T *source[VL], *zeros = nullptr;
    bool used[VL];
    for (int i = 0; i < VL; ++i) {
      T* own = buffer + i * stride;
      used[i] = first + i < rows.n && rows.kept(first + i);
      if (used[i]) {
        source[i] = rows.fetch(first + i, c0, c1, own);
        continue;
      }
      // A dropped row may hold NaN or Inf: it is set to zero, not multiplied by it.
      if (!zeros) std::fill_n(own, depth, T(0)), zeros = own;
      source[i] = zeros;
    }
    constexpr int kSums = std::min(VL, 4);  // short sums, and not one long one
    Vec<T> sums[kSums] = {};
    int64_t k = 0;
    if (squares)  // the common case, without a question in the loop
      for (; k + VL <= depth; k += VL) {
        Vec<T> x[VL];
        for (int i = 0; i < VL; ++i) x[i] = load(source[i] + k);
        transpose_block<T>(x);
        for (int q = 0; q < VL; ++q) {
          store(dst + (k + q) * NR<T> + g * VL, x[q]);
          sums[q % kSums] += x[q] * x[q];
        }
      }
    for (; k < depth; k += VL) {
      Vec<T> x[VL];
      const int64_t valid = std::min<int64_t>(VL, depth - k);
      for (int i = 0; i < VL; ++i) {
        if (valid == VL) {
          x[i] = load(source[i] + k);
        } else {
          T tail[VL] = {};
          std::memcpy(tail, source[i] + k, valid * sizeof(T));
          x[i] = load(tail);
        }
        if (used[i] && !squares) x[i] = x[i] * splat(scale[first + i]) - load(mean + c0 + k);
      }
      transpose_block<T>(x);
      for (int64_t q = 0; q < valid; ++q) {
        store(dst + (k + q) * NR<T> + g * VL, x[q]);
        sums[q % kSums] += x[q] * x[q];
      }
    }
    if (squares) {
      Vec<T> sum = add ? load(squares + first) : Vec<T>{};
      for (int i = 1; i < kSums; ++i) sums[0] += sums[i];
      store(squares + first, sum + sums[0]);
    }
  }
}

// Rows [r0, r1) on the features side: depth runs over rows, dst holds all panels of the d columns,
// panel after panel, (r1 - r0) x NR each; panels [p0, p1) are written. `prepared` false packs raw
// values (dropped rows still as zeros). buffer: d.
template <class S, class T>
void pack_features(const Rows<S, T>& rows, const T* scale, const T* mean, bool prepared, int64_t r0,
                   int64_t r1, int64_t p0, int64_t p1, T* dst, T* buffer) {
  constexpr int VL = kLanes<T>;
  const int64_t depth = r1 - r0;
  const int64_t c0 = p0 * NR<T>, c1 = std::min(rows.d, p1 * NR<T>);
  for (int64_t r = r0; r < r1; ++r) {
    T* out = dst + p0 * NR<T> * depth + (r - r0) * NR<T>;
    const bool kept = rows.kept(r);
    const T* x = kept ? rows.fetch(r, c0, c1, buffer) : nullptr;
    const Vec<T> factor = splat(prepared ? scale[r] : T(1));
    for (int64_t p = p0; p < p1; ++p, out += depth * NR<T>) {
      for (int v = 0; v < NV; ++v) {
        const int64_t c = p * NR<T> + v * VL;
        if (c >= c1) break;  // no tile reads vectors past the last column
        Vec<T> y{};
        if (kept && c + VL <= c1) {
          y = load(x + (c - c0));
        } else if (kept) {
          T tail[VL] = {};
          std::memcpy(tail, x + (c - c0), (c1 - c) * sizeof(T));
          y = load(tail);
        }
        if (kept && prepared) y = y * factor - load(mean + c);
        store(out + v * VL, y);
      }
    }
  }
}
