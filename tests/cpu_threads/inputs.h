// Feature matrices of every storage type and layout, in memory of exactly their size. Nothing of
// PyTorch, so that the kernels run alone; see main.cpp.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "cpu/api.h"

namespace {

using mmae::DType;
using mmae::Features;
using Numbers = std::vector<double>;

// Storage types: rounding by truncation is enough to make inputs that the type holds exactly.

struct Type {
  const char* name;
  DType dtype;
  int64_t bytes, result_bytes;
  double value_tolerance, grad_tolerance;  // a few roundings of the results; of the stored gradient
};
const Type kTypes[] = {{"float32", DType::kFloat32, 4, 4, 1e-6, 1e-4},
                       {"float64", DType::kFloat64, 8, 8, 1e-13, 1e-6},
                       {"bfloat16", DType::kBFloat16, 2, 4, 1e-6, 4e-3},
                       {"float16", DType::kFloat16, 2, 4, 1e-6, 6e-4}};

void encode(double x, DType dtype, char* to) {
  const float f = float(x);
  uint32_t u;
  std::memcpy(&u, &f, 4);
  uint16_t h = uint16_t(u >> 16);
  if (dtype == DType::kFloat16) {
    const int exponent = int(u >> 23 & 255) - 127 + 15;
    const uint32_t magnitude = std::isnan(x)   ? 0x7e00u
                               : exponent <= 0 ? 0u
                                               : uint32_t(exponent) << 10 | (u >> 13 & 0x3ffu);
    h = uint16_t((u >> 16 & 0x8000u) | magnitude);
  }
  if (dtype == DType::kFloat64)
    std::memcpy(to, &x, 8);
  else if (dtype == DType::kFloat32)
    std::memcpy(to, &f, 4);
  else
    std::memcpy(to, &h, 2);
}

double decode(const char* from, DType dtype) {
  double x;
  float f;
  uint16_t h;
  if (dtype == DType::kFloat64) return std::memcpy(&x, from, 8), x;
  if (dtype == DType::kFloat32) return std::memcpy(&f, from, 4), f;
  std::memcpy(&h, from, 2);
  if (dtype == DType::kFloat16) {
    const int exponent = h >> 10 & 31;
    const double mantissa = h & 0x3ff;
    if (exponent == 31) return NAN;
    x = exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24);
    return h & 0x8000 ? -x : x;
  }
  const uint32_t u = uint32_t(h) << 16;
  return std::memcpy(&f, &u, 4), f;
}

// Memory of exactly this many elements, so that AddressSanitizer sees the first one too many.
struct Buffer {
  int64_t count, item;
  std::unique_ptr<char[]> bytes;
  Buffer(int64_t n, int64_t element, int fill)
      : count(n), item(element), bytes(new char[size_t(n * element)]) {
    std::memset(bytes.get(), fill, size_t(n * element));
  }
  Numbers numbers(DType dtype) const {
    Numbers x(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i) x[size_t(i)] = decode(bytes.get() + i * item, dtype);
    return x;
  }
  bool operator==(const Buffer& other) const {
    return std::memcmp(bytes.get(), other.bytes.get(), size_t(count * item)) == 0;
  }
};

// --------------------------------------------------------------------------------------------------
// Inputs

enum class Layout { kContiguous, kTransposed, kSpaced };

struct Input {
  const Type& type;
  Numbers z;  // (batch, n, d), what the storage holds
  std::unique_ptr<bool[]> mask;
  Buffer storage;
  Features f{};

  Input(const Type& t, const Numbers& values, int64_t batch, int64_t n, int64_t d, bool normalize,
        bool center, bool masked, Layout layout)
      : type(t), z(values),
        storage(batch * n * d * (layout == Layout::kSpaced ? 6 : 1), t.bytes, -1) {
    f.dtype = t.dtype, f.batch = batch, f.n = n, f.d = d;
    f.normalize = normalize, f.center = center;
    const bool transposed = layout == Layout::kTransposed, spaced = layout == Layout::kSpaced;
    f.row_stride = transposed ? 1 : spaced ? 2 * 3 * d : d;
    f.column_stride = transposed ? n : spaced ? 3 : 1;
    f.batch_dims = 1;
    f.batch_sizes[0] = batch;
    f.z_strides[0] = n * d * (spaced ? 6 : 1);
    f.z = storage.bytes.get();
    for (int64_t at = 0; at < batch * n * d; ++at) {
      const int64_t b = at / (n * d), i = at / d % n, j = at % d;
      char* to = storage.bytes.get() +
                 (b * f.z_strides[0] + i * f.row_stride + j * f.column_stride) * t.bytes;
      encode(values[size_t(at)], t.dtype, to);
      z[size_t(at)] = decode(to, t.dtype);
    }
    if (!masked) return;
    mask.reset(new bool[size_t(batch * n)]);
    for (int64_t i = 0; i < batch * n; ++i)  // the last of several matrices loses all its rows
      mask[size_t(i)] = i % 4 != 1 && (batch == 1 || i / n < batch - 1);
    f.mask = mask.get();
    f.mask_stride = 1;
    f.mask_strides[0] = n;
  }
  bool kept(int64_t b, int64_t i) const { return !mask || mask[size_t(b * f.n + i)]; }
};

Numbers gaussian(int64_t count, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<double> normal;
  Numbers x(static_cast<size_t>(count));
  for (double& v : x) v = normal(generator);
  return x;
}

}  // namespace
