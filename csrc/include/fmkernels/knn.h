// The arithmetic of exact nearest neighbours: sums in float64, and which scores of a product in low
// precision reach a threshold. fmkernels/ops/knn/reference.py derives the bound.
//
// Plain loops: `lanes` partial sums fit the registers of every instruction set, and are added up in
// one order, so that a sum depends neither on the instruction set nor on the tile.
#pragma once

#include <cmath>
#include <cstdint>

#include "fmkernels/bfloat16.h"
#include "fmkernels/config.h"

FMKERNELS_NAMESPACE_BEGIN

// Partial sums, in parts of which the compiler makes a register of float64 each.
constexpr int part = 8, lanes = 4 * part;

// Σ term(d) over d < n.
template <class Term>
FMKERNELS_INLINE double sum_in_lanes(int64_t n, const Term& term) {
  double sums[lanes] = {};
  int64_t d = 0;
  for (; d + lanes <= n; d += lanes) {
    for (int start = 0; start < lanes; start += part) {
#pragma omp simd
      for (int lane = start; lane < start + part; ++lane) sums[lane] += term(d + lane);
    }
  }
  for (int lane = 0; d + lane < n; ++lane) sums[lane] += term(d + lane);
  for (int half = lanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  }
  return sums[0];
}

template <class A, class B>
FMKERNELS_INLINE double dot(const A* a, const B* b, int64_t n) {
  return sum_in_lanes(n, [=](int64_t d) { return double(a[d]) * double(b[d]); });
}

template <class T>
FMKERNELS_INLINE double squared_distance(const double* a, const T* b, int64_t n) {
  return sum_in_lanes(n, [=](int64_t d) {
    const double difference = double(a[d]) - double(b[d]);
    return difference * difference;
  });
}

// A power of two that takes a number of this size near 1, as far as there is one.
FMKERNELS_INLINE double towards_one(double size) {
  if (!(size > 0) || __builtin_isinf(size)) return 1;
  int exponent;
  __builtin_frexp(size, &exponent);
  return __builtin_ldexp(1.0, exponent > 1000 ? -1000 : exponent < -1000 ? 1000 : -exponent);
}

FMKERNELS_INLINE double norm(const float* row, int64_t n) {
  return __builtin_sqrt(dot(row, row, n));
}

// Squares of float64 leave its range.
FMKERNELS_INLINE double norm(const double* row, int64_t n) {
  double largest = 0;
  for (int64_t d = 0; d < n; ++d) {
    const double size = __builtin_fabs(row[d]);
    if (size != size) return size;
    if (size > largest) largest = size;
  }
  const double scale = towards_one(largest);
  const double sum = sum_in_lanes(n, [=](int64_t d) { return (row[d] * scale) * (row[d] * scale); });
  return __builtin_sqrt(sum) / scale;
}

FMKERNELS_INLINE double cosine(
    const double* a, const float* b, int64_t n, double norm_a, double norm_b) {
  return dot(a, b, n) / norm_a / norm_b;
}

// Products of float64 leave its range, too.
FMKERNELS_INLINE double cosine(
    const double* a, const double* b, int64_t n, double norm_a, double norm_b) {
  const double scale_a = towards_one(norm_a), scale_b = towards_one(norm_b);
  const double product =
      sum_in_lanes(n, [=](int64_t d) { return (a[d] * scale_a) * (b[d] * scale_b); });
  return product / (norm_a * scale_a) / (norm_b * scale_b);
}

FMKERNELS_INLINE float widen(int8_t value) { return static_cast<float>(value); }
FMKERNELS_INLINE float widen(int32_t value) { return static_cast<float>(value); }
FMKERNELS_INLINE void narrow(float value, int8_t& narrowed) {
  const float least = value > -127 ? value : -127;  // also of a NaN, which has no integer
  narrowed = static_cast<int8_t>(__builtin_rintf(least < 127 ? least : 127));
}

// What a row of norm 1 is divided by to be written as integers from −127 to 127.
template <class T>
FMKERNELS_INLINE float scale_of_codes(const T* row, double norm, int64_t n) {
  T largest = 0;
#pragma omp simd reduction(max : largest)
  for (int64_t d = 0; d < n; ++d) {
    const T size = row[d] < 0 ? -row[d] : row[d];
    largest = size > largest ? size : largest;
  }
  const bool usable = largest > 0 && largest < INFINITY && norm < INFINITY;
  return usable ? static_cast<float>(double(largest) / norm / 127) * (1 + 0x1p-20f) : 1;
}

// Writes a row, scaled to norm 1, in low precision, in units of `scale`; returns the norm of what that lacks.
template <class T, class P>
FMKERNELS_INLINE double cast_unit(const T* row, double norm, float scale, int64_t n, P* shadow) {
  const double near = towards_one(norm), factor = norm > 0 ? 1 / (norm * near) / scale : 1;
  // what is rounded need not be exact, but what is lost
  const float quick = static_cast<float>(near * factor);
  const bool quickly = sizeof(T) == sizeof(float) && quick > 0x1p-100f && quick < 0x1p100f;
  if (quickly) {
#pragma omp simd
    for (int64_t d = 0; d < n; ++d) narrow(static_cast<float>(row[d]) * quick, shadow[d]);
  } else {
    for (int64_t d = 0; d < n; ++d) {
      narrow(static_cast<float>(double(row[d]) * near * factor), shadow[d]);
    }
  }
  return scale * __builtin_sqrt(sum_in_lanes(n, [=](int64_t d) {
    const double lost = double(row[d]) * near * factor - double(widen(shadow[d]));
    return lost * lost;
  }));
}

// The interval that a row's score is in: with a product s of the shadows,
//   v = scale sigma s − gamma half,   |exact − v| <= alpha slack + rounding |scale sigma s| + …
// gamma and half are there for squared distances only, and so is what a product may lose that is too
// small for a float32.
struct RowBounds {
  const float *sigma, *slack, *half;  // (rows)
};
struct QueryBounds {
  float alpha, scale, gamma, rounding, lost;
};
struct Interval {
  float middle, reach;
};
template <bool squared, class P>
FMKERNELS_INLINE Interval interval(P product, RowBounds row, int64_t j, QueryBounds query) {
  const float main = query.scale * (widen(product) * row.sigma[j]);
  const float reach =
      query.alpha * row.slack[j] + query.rounding * __builtin_fabsf(main) + query.lost;
  if (!squared) return {main, reach};
  const float half = query.gamma * row.half[j];
  return {main - half, reach + 0x1p-21f * half};
}

FMKERNELS_NAMESPACE_END
