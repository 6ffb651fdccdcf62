// A query's look at products that are in memory: which of them may reach its threshold.
#pragma once

#include <type_traits>

#if defined(__AVX512BW__)
#include <immintrin.h>
#endif

#include "fmkernels/knn.h"
#include "knn_kernel.h"
#include "knn_query.h"

FMKERNELS_NAMESPACE_BEGIN

// The least product that may reach the threshold anywhere in a bucket; 0 if that is no positive one.
template <bool squared, class P>
float least_product(float threshold, KnnBucket bucket, QueryBounds query) {
  float excess = threshold - query.alpha * bucket.slack - query.lost;
  if (squared) excess += (1 - 0x1p-20f) * (query.gamma * bucket.half) - 0x1p-119f;
  const float largest = query.scale * bucket.sigma * (1 + query.rounding);
  const float least = excess / largest * (1 - 0x1p-20f);
  const float above = std::is_same_v<P, int32_t> ? 1 : 0x1p-100f;
  return least > above && least < 0x1p30f ? least : 0;
}

// Products as numbers of the same order, where that is above 0.
FMKERNELS_INLINE float ordered(float product) { return product; }
FMKERNELS_INLINE int16_t ordered(BFloat16 product) { return static_cast<int16_t>(product.bits); }
FMKERNELS_INLINE int32_t ordered(int32_t product) { return product; }
FMKERNELS_INLINE float ordered_least(float least, const float*) { return least; }
FMKERNELS_INLINE int32_t ordered_least(float least, const int32_t*) {
  return static_cast<int32_t>(least);
}
FMKERNELS_INLINE int16_t ordered_least(float least, const BFloat16*) {
  uint32_t bits;
  __builtin_memcpy(&bits, &least, sizeof bits);
  return static_cast<int16_t>(bits >> 16);
}

#if defined(__AVX512BW__)
// A bit for each of so many products that is at least the limit, in one pass: the compiler finds no
// such masks by itself, and to look for the few that are set took a large part of the comparison's time.
constexpr int64_t at_once = 32;
FMKERNELS_INLINE uint32_t reaching(const BFloat16* products, int16_t limit) {
  return _mm512_cmpge_epi16_mask(_mm512_loadu_si512(products), _mm512_set1_epi16(limit));
}
FMKERNELS_INLINE uint32_t reaching(const int32_t* products, int32_t limit) {
  const __m512i limits = _mm512_set1_epi32(limit);
  const uint32_t low = _mm512_cmpge_epi32_mask(_mm512_loadu_si512(products), limits);
  const uint32_t high = _mm512_cmpge_epi32_mask(_mm512_loadu_si512(products + 16), limits);
  return low | high << 16;
}
FMKERNELS_INLINE uint32_t reaching(const float* products, float limit) {
  const __m512 limits = _mm512_set1_ps(limit);
  const uint32_t low = _mm512_cmp_ps_mask(_mm512_loadu_ps(products), limits, _CMP_GE_OQ);
  const uint32_t high = _mm512_cmp_ps_mask(_mm512_loadu_ps(products + 16), limits, _CMP_GE_OQ);
  return low | high << 16;
}
#else
constexpr int64_t at_once = 8;
template <class P, class Limit>
FMKERNELS_INLINE uint32_t reaching(const P* products, Limit limit) {
  uint32_t bits = 0;
  for (int64_t i = 0; i < at_once; ++i) bits |= uint32_t{ordered(products[i]) >= limit} << i;
  return bits;
}
template <class P, class Limit>
FMKERNELS_INLINE bool any_reaching(const P* products, int64_t count, Limit limit) {
  auto largest = ordered(P{});
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < count; ++i) {
    largest = ordered(products[i]) > largest ? ordered(products[i]) : largest;
  }
  return largest >= limit;
}
#endif

// Calls each(i) for the products that are at least `least`, in order, while it returns true.
template <class P, class Each>
FMKERNELS_INLINE bool for_reaching(
    const P* products, int64_t count, float least, const Each& each) {
  const auto limit = ordered_least(least, products);
  int64_t start = 0;
#if !defined(__AVX512BW__)
  if (!any_reaching(products, count, limit)) return true;
#endif
  for (; start + at_once <= count; start += at_once) {
    for (uint32_t bits = reaching(products + start, limit); bits != 0; bits &= bits - 1) {
      if (!each(start + __builtin_ctz(bits))) return false;
    }
  }
  for (; start < count; ++start) {
    if (ordered(products[start]) >= limit && !each(start)) return false;
  }
  return true;
}

// A query's look at its products with a few rows of a part.
template <bool squared, class T, class P>
struct Look {
  const KnnPart<T>& part;
  const P* products;
  int64_t start, count;  // of the rows
  QueryBounds bounds;
  Query<T>& query;
  const Scratch& scratch;

  Interval at(int64_t i) const {
    return interval<squared>(
        products[i], RowBounds{part.sigma, part.slack, part.half}, start + i, bounds);
  }

  // A lower bound of the k-th largest score: that of the lower ends. Where there are rows enough, of
  // every `height` only the best counts; any rows that there are k of give a bound.
  float kth_lower_end() const {
    constexpr int64_t width = 16, tall = 8;
    const int64_t k = part.k, height = count / tall >= 2 * k + width ? tall : 1;
    if (count < k) return -INFINITY;
    float* lower = scratch.values;
    int64_t groups = 0, i = 0;
    for (; i + height * width <= count; i += height * width, groups += width) {
      float best[width];
      for (int64_t lane = 0; lane < width; ++lane) best[lane] = -INFINITY;
      for (int64_t step = 0; step < height; ++step) {
#pragma omp simd
        for (int64_t lane = 0; lane < width; ++lane) {
          const Interval v = at(i + step * width + lane);
          const float low = v.middle - v.reach;
          best[lane] = low > best[lane] ? low : best[lane];  // never a NaN
        }
      }
      __builtin_memcpy(lower + groups, best, sizeof best);
    }
    for (; height == 1 && i < count; ++i, ++groups) {
      const Interval v = at(i);
      const float low = v.middle - v.reach;
      lower[groups] = low == low ? low : -INFINITY;
    }
    return groups < k ? -INFINITY : kth_largest(lower, groups, k);
  }

  // The candidates of a bucket; false if the query was left out. Where there is a least product that
  // may reach the threshold, only what is at least that is looked at.
  bool at_bucket(int64_t first, int64_t width, KnnBucket bucket) {
    const auto add = [&](int64_t i) {
      if (!query.make_room(scratch)) return false;
      query.add(at(first + i), start + first + i);
      return true;
    };
    const float least = least_product<squared, P>(query.threshold(), bucket, bounds);
    if (least > 0) return for_reaching(products + first, width, least, add);
    for (int64_t i = 0; i < width; ++i) {
      if (!add(i)) return false;
    }
    return true;
  }

  void everywhere() {
    if (query.threshold() == -INFINITY && !query.is_full()) query.raise(kth_lower_end());
    const KnnBucket* bucket = part.buckets + start / knn_bucket;
    for (int64_t first = 0; first < count; first += knn_bucket) {
      if (!at_bucket(first, count - first < knn_bucket ? count - first : knn_bucket, *bucket++)) {
        return;
      }
    }
    query.settle(scratch);
  }
};

FMKERNELS_NAMESPACE_END
