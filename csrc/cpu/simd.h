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

// Lane i of the result is lane pattern(i) of a or, from the number of lanes on, of b.
template <class T, class F, size_t... I>
inline Vec<T> shuffle(Vec<T> a, Vec<T> b, F pattern, std::index_sequence<I...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, pattern(int(I))...);
#else
  using Index = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  return __builtin_shuffle(a, b, Vec<Index>{Index(pattern(int(I)))...});
#endif
}

// Within every 16 bytes, the lower or upper half of a and b by turns, in units of U lanes.
template <class T, int U, bool kUpper>
struct Unpack {
  constexpr int operator()(int i) const {
    constexpr int Q = 16 / int(sizeof(T));
    const int unit = i % Q / U;
    return i / Q * Q + (kUpper ? Q / 2 : 0) + unit / 2 * U + i % U + (unit % 2 ? kLanes<T> : 0);
  }
};

// Every other 16 bytes of a, then of b.
template <class T, bool kOdd>
struct Quads {
  constexpr int operator()(int i) const {
    constexpr int Q = 16 / int(sizeof(T)), half = kLanes<T> / 2;
    return (i % half / Q * 2 + kOdd) * Q + i % Q + (i >= half ? kLanes<T> : 0);
  }
};

// Transposes a kLanes x kLanes block in registers: blocks of 16 bytes each way first, then these
// among each other. Both are single instructions without an index operand. Inlined, since the block
// would go through memory otherwise.
template <class T>
__attribute__((always_inline)) inline void transpose_block(Vec<T>* x) {
  constexpr int VL = kLanes<T>, Q = 16 / int(sizeof(T)), blocks = VL / Q;
  constexpr auto lanes = std::make_index_sequence<VL>{};
  for (int i = 0; i < VL; i += Q) {
    Vec<T> y[Q];
    for (int j = 0; j < Q; j += 2) {
      y[j] = shuffle<T>(x[i + j], x[i + j + 1], Unpack<T, 1, false>{}, lanes);
      y[j + 1] = shuffle<T>(x[i + j], x[i + j + 1], Unpack<T, 1, true>{}, lanes);
    }
    if constexpr (Q == 2) {
      x[i] = y[0];
      x[i + 1] = y[1];
    } else {
      for (int j = 0; j < 2; ++j) {
        x[i + 2 * j] = shuffle<T>(y[j], y[j + 2], Unpack<T, 2, false>{}, lanes);
        x[i + 2 * j + 1] = shuffle<T>(y[j], y[j + 2], Unpack<T, 2, true>{}, lanes);
      }
    }
  }
  for (int round = 1; round < blocks; round *= 2) {
    Vec<T> y[VL];
    for (int r = 0; r < blocks / 2; ++r)
      for (int c = 0; c < Q; ++c) {
        const Vec<T> a = x[2 * r * Q + c], b = x[(2 * r + 1) * Q + c];
        y[r * Q + c] = shuffle<T>(a, b, Quads<T, false>{}, lanes);
        y[(r + blocks / 2) * Q + c] = shuffle<T>(a, b, Quads<T, true>{}, lanes);
      }
    for (int i = 0; i < VL; ++i) x[i] = y[i];
  }
}
