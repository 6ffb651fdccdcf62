// The CPU loops of exact nearest neighbours, compiled once per instruction set: a query's row of
// products is compared with its threshold, many at a time, and only what reaches it is looked at again,
// in float64. docs/kernels/cpu.md counts it.
#include "knn_kernel.h"

#include <cmath>

#include "fmkernels/knn.h"

FMKERNELS_NAMESPACE_BEGIN
namespace {

// A row of the tile that may be among the nearest, and how high its score may be.
struct Reached {
  float upper;
  int32_t row;
};

// The working memory of one query, cut into arrays.
struct Scratch {
  Found found, spare;
  float* lower;      // (row_count)
  Reached* reached;  // (row_count)

  static int64_t bytes(int64_t row_count, int64_t k) { return 28 * row_count + 16 * k; }

  Scratch(int64_t row_count, int64_t k, void* memory) {
    found.scores = static_cast<double*>(memory);
    found.indices = reinterpret_cast<int64_t*>(found.scores + row_count);
    spare.scores = reinterpret_cast<double*>(found.indices + row_count);
    spare.indices = reinterpret_cast<int64_t*>(spare.scores + k);
    lower = reinterpret_cast<float*>(spare.indices + k);
    reached = reinterpret_cast<Reached*>(lower + row_count);
  }
};

// A query's score as v of fmkernels/knn.h, and back.
struct Units {
  double factor, addend;

  template <class T>
  Units(const KnnTile<T>& tile, double norm, double largest) : factor(1), addend(0) {
    if (tile.metric == Metric::inner_product && norm > 0) factor = 1 / norm;
    if (tile.metric == Metric::l2) {
      factor = 0.5 / (tile.scale * largest);
      addend = factor * norm * norm;
    }
  }

  // The smallest float32 above the score's v: a row whose upper end is below that does not exceed the
  // score, and one that only equals it comes too late.
  float threshold(double score) const {
    const double value = score * factor + addend;
    const double lowered = value - 1e-14 * (__builtin_fabs(score * factor) + addend);
    const float rounded = static_cast<float>(lowered);
    return rounded > lowered ? rounded : __builtin_nextafterf(rounded, INFINITY);
  }

  double score(double value) const { return (value - addend) / factor; }
};

// A lower bound of the k-th largest score of the tile: that of the lower ends. Where there are rows
// enough, of every `few` only the best counts; any rows that there are k of give a bound.
template <bool squared, class P>
float kth_lower_end(
    const P* products, RowBounds rows, QueryBounds query, int64_t count, int64_t k, float* lower) {
  constexpr int64_t width = 16, few = 16;
  if (count < k) return -INFINITY;
  const int64_t height = count / few >= 2 * k + width ? few : 1;
  int64_t groups = 0, start = 0;
  for (; start + height * width <= count; start += height * width, groups += width) {
    float best[width];
    for (int64_t lane = 0; lane < width; ++lane) best[lane] = -INFINITY;
    for (int64_t step = 0; step < height; ++step) {
#pragma omp simd
      for (int64_t lane = 0; lane < width; ++lane) {
        const int64_t j = start + step * width + lane;
        const Interval v = interval<squared>(products[j], rows, j, query);
        const float low = v.middle - v.reach;
        best[lane] = low > best[lane] ? low : best[lane];  // never a NaN
      }
    }
    __builtin_memcpy(lower + groups, best, sizeof best);
  }
  for (; height == 1 && start < count; ++start, ++groups) {
    const Interval v = interval<squared>(products[start], rows, start, query);
    const float low = v.middle - v.reach;
    lower[groups] = low == low ? low : -INFINITY;
  }
  return kth_largest(lower, groups, k);
}

// The least product that may reach the threshold anywhere in a bucket; 0 if that is no positive one.
template <bool squared>
float least_product(float threshold, KnnBucket bucket, QueryBounds query) {
  float excess = threshold - query.alpha * bucket.slack;
  if (squared) excess += (1 - 0x1p-20f) * (query.gamma * bucket.half) - 0x1p-119f;
  const float largest = query.alpha * bucket.sigma * (1 + query.rounding);
  const float least = excess / largest * (1 - 0x1p-20f);
  return least > 0x1p-100f && least < 0x1p100f ? least : 0;
}

// Whether any of the products is at least this, which is positive.
bool any_at_least(const BFloat16* products, int64_t count, float least) {
  // the bits of positive ones are ordered like their values, and those of negative ones are negative
  uint32_t wide;
  __builtin_memcpy(&wide, &least, sizeof wide);
  const int16_t least_bits = static_cast<int16_t>(wide >> 16);
  const int16_t* bits = reinterpret_cast<const int16_t*>(products);
  int16_t largest = INT16_MIN;
#pragma omp simd reduction(max : largest)
  for (int64_t lane = 0; lane < count; ++lane) {
    largest = bits[lane] > largest ? bits[lane] : largest;
  }
  return largest >= least_bits;
}
bool any_at_least(const float* products, int64_t count, float least) {
  float largest = 0;
#pragma omp simd reduction(max : largest)
  for (int64_t lane = 0; lane < count; ++lane) {
    largest = products[lane] > largest ? products[lane] : largest;
  }
  return largest >= least;
}

// A query's look at the products: collects the rows whose upper end reaches the threshold, and those
// that have none.
template <bool squared, class P>
struct Look {
  static constexpr int64_t few = 64;
  const P* products;
  RowBounds rows;
  QueryBounds query;
  float threshold;
  Reached* reached;
  int64_t found;

  // at every product of a few
  void closely(int64_t start, int64_t width) {
    float upper[few];
    int hits = 0;
#pragma omp simd reduction(| : hits)
    for (int64_t lane = 0; lane < width; ++lane) {
      const Interval v = interval<squared>(products[start + lane], rows, start + lane, query);
      upper[lane] = v.middle + v.reach;
      hits |= !(upper[lane] < threshold);
    }
    if (!hits) return;
    for (int64_t lane = 0; lane < width; ++lane) {
      reached[found] = {upper[lane], static_cast<int32_t>(start + lane)};
      found += !(upper[lane] < threshold);
    }
  }

  // at the largest of a bucket, then of a few
  void at_bucket(int64_t start, int64_t width, KnnBucket bucket) {
    const float least = least_product<squared>(threshold, bucket, query);
    if (least > 0 && !any_at_least(products + start, width, least)) return;
    for (int64_t done = 0; done < width; done += few) {
      const int64_t part = width - done < few ? width - done : few;
      if (least > 0 && !any_at_least(products + start + done, part, least)) continue;
      closely(start + done, part);
    }
  }
};

template <bool squared, class P>
int64_t reach(
    const P* products, RowBounds rows, QueryBounds query, const KnnBucket* buckets,
    float threshold, int64_t count, Reached* reached) {
  Look<squared, P> look{products, rows, query, threshold, reached, 0};
  for (int64_t start = 0; start < count; start += knn_bucket) {
    const int64_t width = count - start < knn_bucket ? count - start : knn_bucket;
    look.at_bucket(start, width, *buckets++);
  }
  return look.found;
}

template <class T>
double exact_score(const KnnTile<T>& tile, const T* query, double norm, int64_t j) {
  const T* row = tile.rows + j * tile.dim;
  if (tile.metric == Metric::l2) return -squared_distance(query, row, tile.dim);
  if (tile.metric == Metric::inner_product) return dot(query, row, tile.dim);
  const double row_norm = tile.row_norms[j];
  if (norm > 0 && row_norm > 0) return cosine(query, row, tile.dim, norm, row_norm);
  return norm == norm && row_norm == row_norm && !__builtin_isinf(norm + row_norm) ? 0 : NAN;
}

template <bool squared, class T, class P>
void select_query(const KnnTile<T>& tile, const P* products, int64_t q, const Scratch& scratch) {
  const double norm = tile.query_norms[q];
  if (norm != norm) return;  // and so are its scores
  const int64_t k = tile.k, count = tile.row_count;
  const Found best{tile.best_scores + q * k, tile.best_indices + q * k};
  const bool full = best.indices[k - 1] >= 0;
  const bool null = norm == 0 && !squared;  // all of its scores are 0
  if (null && full && best.scores[k - 1] >= 0) return;

  const double largest = norm > tile.scale ? norm : tile.scale;
  const Units units(tile, norm, largest);
  const RowBounds rows{tile.sigma, tile.slack, tile.half};
  QueryBounds query{1, 0, tile.half_products ? 0x1p-8f : 0};
  if (squared) {
    query.alpha = static_cast<float>(norm / largest);
    query.gamma = static_cast<float>(tile.scale / largest);
  }
  if (!tile.rescored) query.rounding = 0;

  double least = full ? best.scores[k - 1] : -INFINITY;
  if (tile.floor != nullptr && tile.floor[q] > least) least = tile.floor[q];
  int64_t found;
  if (null || __builtin_isinf(norm)) {
    found = count;
    for (int64_t j = 0; j < count; ++j) scratch.reached[j] = {INFINITY, static_cast<int32_t>(j)};
  } else {
    float threshold = __builtin_isinf(least) ? -INFINITY : units.threshold(least);
    if (!full) {
      const float here =
          kth_lower_end<squared>(products, rows, query, count, k, scratch.lower);
      if (here > threshold) threshold = here;
    }
    found = reach<squared>(
        products, rows, query, tile.buckets, threshold, count, scratch.reached);
    if (tile.crowded != nullptr && found > tile.crowd) {
      tile.crowded[q] = true;
      return;
    }
  }
  int64_t better = 0;
  for (int64_t position = 0; position < found; ++position) {
    const int64_t j = scratch.reached[position].row;
    if (position + 1 < found) {
      const char* next =
          reinterpret_cast<const char*>(tile.rows + scratch.reached[position + 1].row * tile.dim);
      for (int64_t at = 0; at < tile.dim * int64_t{sizeof(T)}; at += 64) {
        __builtin_prefetch(next + at);
      }
    }
    const double score =
        tile.rescored
            ? exact_score(tile, tile.queries + q * tile.dim, norm, j)
            : units.score(interval<squared>(products[j], rows, j, query).middle);
    scratch.found.scores[better] = score;
    scratch.found.indices[better] = tile.first_row + j;
    better += full ? score > best.scores[k - 1] : score == score;
  }
  tile.candidates[q] += tile.rescored ? found : 0;
  if (better > 0) merge_found(best, k, scratch.found, better, scratch.spare);
}

template <class T, class P>
void select_products(const KnnTile<T>& tile, int64_t first, int64_t last, const Scratch& scratch) {
  for (int64_t i = first; i < last; ++i) {
    const P* products = static_cast<const P*>(tile.products) + i * tile.row_count;
    const int64_t q = tile.order == nullptr ? i : tile.order[i];
    if (tile.metric == Metric::l2) {
      select_query<true>(tile, products, q, scratch);
    } else {
      select_query<false>(tile, products, q, scratch);
    }
  }
}

template <class T>
void select(const KnnTile<T>& tile, int64_t first, int64_t last, void* memory) {
  const Scratch scratch(tile.row_count, tile.k, memory);
  if (tile.half_products) {
    select_products<T, BFloat16>(tile, first, last, scratch);
  } else {
    select_products<T, float>(tile, first, last, scratch);
  }
}

template <class T>
void norms(const T* rows, int64_t first, int64_t last, int64_t dim, double* norms) {
  for (int64_t j = first; j < last; ++j) norms[j] = norm(rows + j * dim, dim);
}

template <class T, class P>
void cast_rows(
    const T* rows, int64_t first, int64_t last, int64_t dim, P* shadow, double* norms,
    float* residuals) {
  for (int64_t j = first; j < last; ++j) {
    const T* row = rows + j * dim;
    norms[j] = norm(row, dim);
    const double lost = cast_unit(row, norms[j], dim, shadow + j * dim);
    residuals[j] = __builtin_nextafterf(static_cast<float>(lost * (1 + 1e-6) + 1e-15), INFINITY);
  }
}

template <class T>
void shadow(
    const T* rows, bool half, int64_t first, int64_t last, int64_t dim, void* shadow,
    double* norms, float* residuals) {
  if (half) {
    cast_rows(rows, first, last, dim, static_cast<BFloat16*>(shadow), norms, residuals);
  } else {
    cast_rows(rows, first, last, dim, static_cast<float*>(shadow), norms, residuals);
  }
}

template <class T>
constexpr KnnKernels<T> knn_kernels{norms<T>, shadow<T>, Scratch::bytes, select<T>};

}  // namespace

extern const KnnKernels<float> knn_f32 = knn_kernels<float>;
extern const KnnKernels<double> knn_f64 = knn_kernels<double>;

FMKERNELS_NAMESPACE_END
