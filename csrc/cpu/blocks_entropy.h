// The entropies of alpha = 1 and inf of one large float32 matrix, by way of its block tridiagonal
// form. Included inside an instruction-set namespace after largest.h.

// Room that V needs while it is made.
inline int64_t blocks_entries(int64_t k) {
  const int64_t order = round_up(k, kBlock);
  return order * BlockTridiagonal::stride_of(order);
}

// H_1 or H_inf of rho = g / tau (full) and, if wanted, V = dH / dg in v (full, whole vectors, with
// room for blocks_entries). NaN where g is not finite or, for H_1, indefinite by more than
// rounding.
inline double entropy_by_blocks(const float* g, int64_t k, int64_t ld, double tau, double alpha,
                                float* v, const Executor& executor) {
  Memory memory;
  BlockTridiagonal b(k, memory);
  reduce_to_blocks(g, ld, tau, b, executor);
  if (alpha != 1) {
    const BlockLargest largest(b, v != nullptr);
    if (!v || std::isnan(largest.value)) return -std::log(largest.value);
    double* x = memory.take<double>(b.order);
    largest.vector(x);
    transform_back_vector(b, x);
    largest_derivative(x, largest.value, tau, k, ld, v, executor);
    return -std::log(largest.value);
  }
  double h;
  {
    Memory inner;
    h = BlockLog(b, v != nullptr, executor, inner).entropy(v);
  }
  if (!v || std::isnan(h)) return h;
  transform_back(b, v, executor);
  // Rows move to lower addresses, one after the other.
  const float inverse = float(1 / tau);
  for (int64_t i = 0; i < ld; ++i)
    for (int64_t j = 0; j < ld; ++j)
      v[i * ld + j] = i < k && j < k ? inverse * v[i * b.lda + j] : 0.f;
  return h;
}
