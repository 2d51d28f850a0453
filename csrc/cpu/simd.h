// Vectors of one register, in the compiler's own vector types, so that one source serves SSE2,
// AVX2, AVX-512 and NEON. Included inside an instruction-set namespace (see kernels.inl); the
// including file sets MMAE_VECTOR_BYTES and has included the standard headers already.

constexpr int kVectorBytes = MMAE_VECTOR_BYTES;

template <class T>
struct VecOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vec = typename VecOf<T>::type;

template <class T>
constexpr int kLanes = kVectorBytes / int(sizeof(T));

template <class T>
inline Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
inline void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof v);
}

template <class T>
inline Vec<T> splat(T x) {
  return x - Vec<T>{};
}

// Sum of the lanes, by halves.
template <class T, int kBytes = kVectorBytes, class V>
inline T reduce_add(V v) {
  if constexpr (kBytes == int(sizeof(T))) {
    return v[0];
  } else if constexpr (kBytes == 2 * int(sizeof(T))) {
    return v[0] + v[1];
  } else {
    typedef T Part __attribute__((vector_size(kBytes / 2)));
    Part h[2];
    __builtin_memcpy(h, &v, kBytes);
    return reduce_add<T, kBytes / 2>(h[0] + h[1]);
  }
}

// Lanes above number `lane` of v, the others of w.
template <class T>
inline Vec<T> lanes_above(Vec<T> v, Vec<T> w, int lane) {
  using Index = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  Vec<Index> number;
  for (int i = 0; i < kLanes<T>; ++i) number[i] = i;
  return number > (Index(lane) - Vec<Index>{}) ? v : w;
}

// A store past the caches, for results that are larger than these; p is aligned to a vector.
template <class T>
inline void stream(T* p, Vec<T> v) {
#if MMAE_VECTOR_BYTES == 64
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), __m512i(v));
#else
  store(p, v);
#endif
}

// Half-precision storage. The arithmetic is exact where the formats allow it and rounds to nearest
// even; plain integer operations, so that the compiler vectorises them on every target.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

inline float bits_to_float(uint32_t u) {
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
}
inline uint32_t float_to_bits(float f) {
  uint32_t u;
  __builtin_memcpy(&u, &f, 4);
  return u;
}

template <class T>
inline T to_compute(float x) {
  return T(x);
}
template <class T>
inline T to_compute(double x) {
  return T(x);
}
template <class T>
inline T to_compute(BFloat16 x) {
  return T(bits_to_float(uint32_t(x.bits) << 16));
}
template <class T>
inline T to_compute(Half x) {
  // The 15 low bits, read as a float, are the value divided by 2^112, subnormals included; only
  // Inf and NaN (exponent 31) need the float's own exponent 255.
  const uint32_t magnitude = uint32_t(x.bits & 0x7fffu) << 13;
  const uint32_t scaled = float_to_bits(bits_to_float(magnitude) * 0x1p112f);
  const uint32_t value = (x.bits & 0x7c00u) == 0x7c00u ? (magnitude | 0x7f800000u) : scaled;
  return T(bits_to_float(value | (uint32_t(x.bits & 0x8000u) << 16)));
}

template <class S, class T>
inline S to_storage(T x) {
  if constexpr (std::is_same_v<S, BFloat16>) {
    const uint32_t u = float_to_bits(float(x));
    const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    const uint32_t quiet_nan = (u >> 16) | 0x40u;
    return BFloat16{uint16_t((u & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded)};
  } else if constexpr (std::is_same_v<S, Half>) {
    const uint32_t u = float_to_bits(float(x));
    const uint32_t sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
    // Below 2^-14 the sum with 0.5 lets the adder do the rounding of the subnormal.
    const uint32_t subnormal = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
    const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    uint32_t h = magnitude < 0x38800000u ? subnormal : normal;
    h = magnitude >= 0x477ff000u ? 0x7c00u : h;
    h = magnitude > 0x7f800000u ? 0x7e00u : h;
    return Half{uint16_t(h | sign)};
  } else {
    return S(x);
  }
}

// The lower (High = false) or upper halves of a and b, interleaved: a0 b0 a1 b1 ...
template <class T, bool High, size_t... I>
inline Vec<T> interleave(Vec<T> a, Vec<T> b, std::index_sequence<I...>) {
  constexpr int VL = kLanes<T>;
#ifdef __clang__
  return __builtin_shufflevector(a, b, int((I & 1 ? VL : 0) + I / 2 + (High ? VL / 2 : 0))...);
#else
  using Index = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  return __builtin_shuffle(a, b,
                           Vec<Index>{Index((I & 1 ? VL : 0) + I / 2 + (High ? VL / 2 : 0))...});
#endif
}

// Transposes a kLanes x kLanes block in registers. A round interleaves row i with row i + VL/2;
// log2(VL) rounds rotate the row index into the column index.
template <class T>
inline void transpose_block(Vec<T>* x) {
  constexpr int VL = kLanes<T>;
  constexpr auto lanes = std::make_index_sequence<VL>{};
  for (int round = 1; round < VL; round *= 2) {
    Vec<T> y[VL];
    for (int i = 0; i < VL / 2; ++i) {
      y[2 * i] = interleave<T, false>(x[i], x[i + VL / 2], lanes);
      y[2 * i + 1] = interleave<T, true>(x[i], x[i + VL / 2], lanes);
    }
    for (int i = 0; i < VL; ++i) x[i] = y[i];
  }
}
