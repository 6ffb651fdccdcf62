// What turns products with rows into intervals; fmkernels/ops/knn/reference.py derives it.
#pragma once

#include <cmath>

#include "fmkernels/config.h"
#include "knn_kernel.h"

FMKERNELS_NAMESPACE_BEGIN

// The norms between which no float32 that depends on them leaves its range.
constexpr double smallest_norm = 0x1p-100, largest_norm_measured = 0x1p120;

// S, for l2.
inline double largest_norm(KnnRows rows, int64_t count) {
  double largest = smallest_norm;
  for (int64_t j = 0; j < count; ++j) {
    const double norm = rows.norms[j];
    largest = norm <= largest_norm_measured && norm > largest ? norm : largest;
  }
  return largest;
}

template <Metric metric>
struct MetricIs {
  static constexpr Metric value = metric;
};

template <Metric metric, bool unit>
KnnBucket bounds_of(
    KnnRows rows, KnnErrors errors, double scale, int64_t start, int64_t stop, KnnRowBounds bounds,
    double* least_weight) {
  // the points of the derivation, by what they multiply
  const double grown = 1 + errors.query_residual, summed = errors.dim * 0x1p-22;
  const double flushed = errors.dim * 0x1p-125, rounded = summed + 3 * errors.factor_rounding;
  const double of_lost = grown * (1 + rounded);
  const double of_norm = errors.query_residual + grown * rounded + flushed + 0x1p-20;
  const double highest =
      metric == Metric::cosine && unit ? __DBL_MAX__ : largest_norm_measured;
  double weight = INFINITY;
  KnnBucket bucket{0, 0, INFINITY};
#pragma omp simd reduction(min : weight)
  for (int64_t j = start; j < stop; ++j) {
    const double norm = rows.norms[j], shadow_norm = unit ? 1 : norm;
    const double lost = unit ? rows.residuals[j] : 0;
    double factor = (unit ? norm : 1) / scale;
    if (metric == Metric::cosine) factor = norm > 0 ? 1 / shadow_norm : 0;
    const bool measured =
        (norm <= highest) & (lost <= largest_norm_measured) & (factor <= 1 / smallest_norm);
    const double bound = factor * (of_norm * shadow_norm + of_lost * lost + flushed);
    const double reached = measured ? factor * shadow_norm : INFINITY;
    weight = reached < weight ? reached : weight;
    bounds.sigma[j] = measured ? static_cast<float>(factor) : 0;
    const float slack = errors.rescored ? static_cast<float>(1.000001 * bound + 0x1p-125) : 0;
    bounds.slack[j] = measured ? slack : INFINITY;
    const double square = 0.5 * (norm / scale) * (norm / scale);
    bounds.half[j] = metric == Metric::l2 && measured ? static_cast<float>(square) : 0;
  }
  if (rows.scales != nullptr) {
    for (int64_t j = start; j < stop; ++j) bounds.sigma[j] *= rows.scales[j];
  }
  for (int64_t j = start; j < stop; ++j) {
    bucket.sigma = bounds.sigma[j] > bucket.sigma ? bounds.sigma[j] : bucket.sigma;
    bucket.slack = bounds.slack[j] > bucket.slack ? bounds.slack[j] : bucket.slack;
    bucket.half = bounds.half[j] < bucket.half ? bounds.half[j] : bucket.half;
  }
  *least_weight = weight;
  return bucket;
}

// Of rows [start, stop), which make a bucket; and the least that a slack falls by for each unit that
// a query's residual is less than the largest.
inline KnnBucket row_bounds(
    KnnRows rows, KnnErrors errors, double scale, int64_t start, int64_t stop, KnnRowBounds bounds,
    double* least_weight) {
  const auto run = [&](auto metric) {
    constexpr Metric known = decltype(metric)::value;
    return rows.residuals != nullptr
               ? bounds_of<known, true>(rows, errors, scale, start, stop, bounds, least_weight)
               : bounds_of<known, false>(rows, errors, scale, start, stop, bounds, least_weight);
  };
  if (errors.metric == Metric::cosine) return run(MetricIs<Metric::cosine>{});
  if (errors.metric == Metric::l2) return run(MetricIs<Metric::l2>{});
  return run(MetricIs<Metric::inner_product>{});
}

FMKERNELS_NAMESPACE_END
