// What is computed, in plain loops in double precision, and how a result is held against it.
#pragma once
#include <cmath>
#include <cstdio>
#include <functional>
#include <string>

#include "inputs.h"

namespace {

int failures = 0, checks = 0;
std::string context;

void check(bool good, const char* what, double error = 0, double allowed = 0) {
  ++checks;
  if (good) return;
  if (++failures <= 20)
    std::printf("FAILED %s: %s (error %.3g, allowed %.3g)\n", context.c_str(), what, error,
                allowed);
}

Numbers prepared(const Input& in, const Numbers& z, int64_t b) {
  const int64_t n = in.f.n, d = in.f.d;
  Numbers x(z.begin() + b * n * d, z.begin() + (b + 1) * n * d);
  Numbers mean(static_cast<size_t>(d));
  int64_t kept = 0;
  for (int64_t i = 0; i < n; ++i) {
    double* row = x.data() + i * d;
    double square = 0;
    for (int64_t j = 0; j < d; ++j) square += row[j] * row[j];
    double factor = in.f.normalize && square > 0 ? 1 / std::sqrt(square) : 1;
    if (!in.kept(b, i)) factor = 0;
    kept += in.kept(b, i);
    for (int64_t j = 0; j < d; ++j) mean[size_t(j)] += row[j] *= factor;
  }
  if (in.f.center)
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < d; ++j)
        if (in.kept(b, i)) x[size_t(i * d + j)] -= mean[size_t(j)] / double(kept);
  return x;
}

Numbers gram_of(const Input& in, const Numbers& z, int64_t b, bool samples) {
  const int64_t n = in.f.n, d = in.f.d, k = samples ? n : d, depth = samples ? d : n;
  const Numbers x = prepared(in, z, b);
  Numbers g(size_t(k * k));
  for (int64_t i = 0; i < k; ++i)
    for (int64_t j = 0; j < k; ++j)
      for (int64_t l = 0; l < depth; ++l)
        g[size_t(i * k + j)] += samples ? x[size_t(i * d + l)] * x[size_t(j * d + l)]
                                        : x[size_t(l * d + i)] * x[size_t(l * d + j)];
  return g;
}

double log_det(Numbers a, int64_t k, double c) {  // of I + c a, by Cholesky factorisation
  double sum = 0;
  for (double& v : a) v *= c;
  for (int64_t i = 0; i < k; ++i) a[size_t(i * k + i)] += 1;
  for (int64_t j = 0; j < k; ++j)
    for (int64_t i = j; i < k; ++i) {
      double s = a[size_t(i * k + j)];
      for (int64_t l = 0; l < j; ++l) s -= a[size_t(i * k + l)] * a[size_t(j * k + l)];
      a[size_t(i * k + j)] = i == j ? std::sqrt(s) : s / a[size_t(j * k + j)];
      if (i == j) sum += std::log(s);
    }
  return sum;
}

double renyi2(const Numbers& g, int64_t k) {
  double trace = 0, square = 0;
  for (int64_t i = 0; i < k; ++i) trace += g[size_t(i * k + i)];
  for (double v : g) square += v * v;
  return trace > 0 ? 2 * std::log(trace) - std::log(square) : 0;
}

using Truth = std::function<double(const Numbers& z, int64_t b)>;

// The gradient of matrix b along a random direction against a central difference of the truth.
void check_slope(const Input& in, const Numbers& grad, int64_t b, double cotangent,
                 const Truth& truth) {
  const int64_t size = in.f.n * in.f.d;
  const Numbers direction = gaussian(size, unsigned(b) + 7);
  const double step = 1e-5;
  Numbers ahead = in.z, behind = in.z;
  double along = 0, grad2 = 0, direction2 = 0;
  for (int64_t i = 0; i < size; ++i) {
    const double g = grad[size_t(b * size + i)], v = direction[size_t(i)];
    ahead[size_t(b * size + i)] += step * v;
    behind[size_t(b * size + i)] -= step * v;
    along += g * v, grad2 += g * g, direction2 += v * v;
  }
  const double slope = (truth(ahead, b) - truth(behind, b)) / (2 * step) * cotangent;
  const double room = in.type.grad_tolerance * std::sqrt(grad2 * direction2) + 1e-8;
  check(std::abs(along - slope) <= room, "gradient", std::abs(along - slope), room);
}

}  // namespace
