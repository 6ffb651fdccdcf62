// The CPU loops of exact nearest neighbours, compiled once per instruction set. A query's products
// are compared with its threshold, many at a time; the rows that reach it wait in a pool, which
// raises the threshold, and what is left of them after a part of the bank is scored in float64.
// docs/kernels/cpu.md counts it.
#include "knn_kernel.h"

#include <cmath>

#include "fmkernels/knn.h"

FMKERNELS_NAMESPACE_BEGIN
namespace {

// A query's score as v of fmkernels/knn.h, and back.
struct Units {
  double factor = 1, addend = 0;

  template <class T>
  Units(const KnnPart<T>& part, double norm) {
    if (part.metric == Metric::inner_product && norm > 0) factor = 1 / norm;
    if (part.metric == Metric::l2) {
      factor = 0.5 / (part.scale * (norm > part.scale ? norm : part.scale));
      addend = factor * norm * norm;
    }
  }

  double score(double value) const { return (value - addend) / factor; }

  // A float32 that the score's v is not below.
  float below(double score) const {
    const double value = score * factor + addend;
    const double lowered = value - 1e-14 * (__builtin_fabs(score * factor) + addend);
    const float rounded = static_cast<float>(lowered);
    return rounded > lowered ? __builtin_nextafterf(rounded, -INFINITY) : rounded;
  }

  // A row whose upper end is below this does not exceed the score, and one that only equals it
  // comes too late.
  float threshold(double score) const {
    if (__builtin_isinf(score)) return -INFINITY;
    return __builtin_nextafterf(below(score), INFINITY);
  }
};

// The working memory of a thread, cut into arrays.
struct Scratch {
  KnnFound found, spare;  // (capacity), (k)
  float* values;          // (k + capacity), or one for each product of a query

  static int64_t bytes(int64_t k, int64_t capacity, int64_t count) {
    return 16 * (capacity + k) + 4 * (k + capacity + count);
  }

  Scratch(int64_t k, int64_t capacity, void* memory) {
    found.scores = static_cast<double*>(memory);
    found.indices = reinterpret_cast<int64_t*>(found.scores + capacity);
    spare.scores = reinterpret_cast<double*>(found.indices + capacity);
    spare.indices = reinterpret_cast<int64_t*>(spare.scores + k);
    values = reinterpret_cast<float*>(spare.indices + k);
  }
};

// One query and its pool.
template <class T>
class Query {
 public:
  Query(const KnnPart<T>& part, int64_t q)
      : part_(part), q_(q), norm_(part.query_norms[q]), units_(part, norm_),
        best_{part.best_scores + q * part.k, part.best_indices + q * part.k},
        pool_(part.pools + q * part.capacity), count_(part.counts[q]),
        threshold_(part.thresholds[q]) {}

  // Whether products tell nothing: all scores are 0, or none is a finite number.
  bool is_null() const { return norm_ == 0 && part_.metric != Metric::l2; }
  bool is_measured() const { return norm_ < INFINITY && !is_null(); }
  bool is_left_out() const { return part_.crowded != nullptr && part_.crowded[q_]; }

  bool is_full() const { return best_.indices[part_.k - 1] >= 0; }
  float threshold() const { return threshold_; }
  void raise(float threshold) {
    if (threshold > threshold_) threshold_ = threshold;
  }

  void begin() {
    count_ = 0;
    threshold_ = -INFINITY;
    raise_to_best();
    if (part_.floor != nullptr) raise(units_.threshold(part_.floor[q_]));
  }

  QueryBounds bounds(bool half_products) const {
    QueryBounds bounds{1, 0, half_products && part_.rescored ? 0x1p-8f : 0};
    if (part_.metric == Metric::l2) {
      const double largest = norm_ > part_.scale ? norm_ : part_.scale;
      bounds.alpha = static_cast<float>(norm_ / largest);
      bounds.gamma = static_cast<float>(part_.scale / largest);
    }
    return bounds;
  }

  // False if there are too many candidates to score: then a better product must follow.
  bool make_room(const Scratch& scratch) {
    if (count_ < part_.capacity) return true;
    tighten(scratch);
    if (4 * count_ <= 3 * part_.capacity) return true;
    if (part_.crowded != nullptr) {
      part_.crowded[q_] = true;
      count_ = 0;
      return false;
    }
    score_pool(scratch);
    return true;
  }

  // Raises the threshold once there are half as many candidates more than it needs.
  void keep_few(const Scratch& scratch) {
    if (count_ > 2 * part_.k + 32) tighten(scratch);
  }

  void add(Interval v, int32_t row) {
    const float upper = v.middle + v.reach;
    pool_[count_] = {v.middle - v.reach, upper, row};
    count_ += !(upper < threshold_);
  }

  void finish(const Scratch& scratch) {
    if (is_measured()) {
      if (count_ > part_.k) tighten(scratch);
      return score_pool(scratch);
    }
    if (norm_ != norm_) return;  // and so are its scores
    for (int64_t row = 0; row < part_.row_count;) {
      if (is_null() && is_full() && best_.scores[part_.k - 1] >= 0) return;
      for (count_ = 0; count_ < part_.capacity && row < part_.row_count; ++row) {
        pool_[count_++] = {-INFINITY, INFINITY, static_cast<int32_t>(row)};
      }
      score_pool(scratch);
    }
  }

  void store() const {
    part_.counts[q_] = count_;
    part_.thresholds[q_] = threshold_;
  }

 private:
  void raise_to_best() {
    if (is_full()) raise(units_.threshold(best_.scores[part_.k - 1]));
  }

  // The k-th largest of the lower ends and of the scores already known is exceeded by k rows.
  void tighten(const Scratch& scratch) {
    int64_t known = 0;
    for (; known < part_.k && best_.indices[known] >= 0; ++known) {
      scratch.values[known] = units_.below(best_.scores[known]);
    }
    for (int64_t i = 0; i < count_; ++i) {
      const float lower = pool_[i].lower;
      scratch.values[known + i] = lower == lower ? lower : -INFINITY;
    }
    if (known + count_ >= part_.k) raise(kth_largest(scratch.values, known + count_, part_.k));
    int64_t kept = 0;
    for (int64_t i = 0; i < count_; ++i) {
      pool_[kept] = pool_[i];
      kept += !(pool_[i].upper < threshold_);
    }
    count_ = kept;
  }

  void score_pool(const Scratch& scratch) {
    const bool full = is_full();
    int64_t better = 0;
    for (int64_t i = 0; i < count_; ++i) {
      const int64_t row = pool_[i].row;
      if (i + 1 < count_) prefetch(pool_[i + 1].row);
      const double score = part_.rescored ? exact_score(row) : units_.score(pool_[i].upper);
      scratch.found.scores[better] = score;
      scratch.found.indices[better] = part_.first_row + row;
      better += full ? score > best_.scores[part_.k - 1] : score == score;
    }
    if (part_.rescored) part_.candidates[q_] += count_;
    count_ = 0;
    if (better == 0) return;
    merge_found(best_, part_.k, scratch.found, better, scratch.spare);
    raise_to_best();
  }

  double exact_score(int64_t j) const {
    const T *query = part_.queries + q_ * part_.dim, *row = part_.rows + j * part_.dim;
    if (part_.metric == Metric::l2) return -squared_distance(query, row, part_.dim);
    if (part_.metric == Metric::inner_product) return dot(query, row, part_.dim);
    const double row_norm = part_.row_norms[j];
    if (norm_ > 0 && row_norm > 0) return cosine(query, row, part_.dim, norm_, row_norm);
    return norm_ < INFINITY && row_norm < INFINITY ? 0 : NAN;
  }

  void prefetch(int64_t j) const {
    const char* row = reinterpret_cast<const char*>(part_.rows + j * part_.dim);
    for (int64_t at = 0; at < part_.dim * int64_t{sizeof(T)}; at += 64) __builtin_prefetch(row + at);
  }

  const KnnPart<T>& part_;
  const int64_t q_;
  const double norm_;
  const Units units_;
  const KnnFound best_;
  KnnCandidate* const pool_;
  int64_t count_;
  float threshold_;
};

// The least product that may reach the threshold anywhere in a bucket; 0 if that is no positive one.
template <bool squared>
float least_product(float threshold, KnnBucket bucket, QueryBounds query) {
  float excess = threshold - query.alpha * bucket.slack;
  if (squared) excess += (1 - 0x1p-20f) * (query.gamma * bucket.half) - 0x1p-119f;
  const float largest = query.alpha * bucket.sigma * (1 + query.rounding);
  const float least = excess / largest * (1 - 0x1p-20f);
  return least > 0x1p-100f && least < 0x1p100f ? least : 0;
}

// Products as numbers of the same order, where that is above 0.
FMKERNELS_INLINE float ordered(float product) { return product; }
FMKERNELS_INLINE int16_t ordered(BFloat16 product) { return static_cast<int16_t>(product.bits); }
FMKERNELS_INLINE float ordered_least(float least, const float*) { return least; }
FMKERNELS_INLINE int16_t ordered_least(float least, const BFloat16*) {
  uint32_t bits;
  __builtin_memcpy(&bits, &least, sizeof bits);
  return static_cast<int16_t>(bits >> 16);
}

// Calls each(i) for every flag that is set, in order; few are.
constexpr int64_t flags_at_once = 8;
template <class Each>
FMKERNELS_INLINE bool for_flags(const uint8_t* flags, int64_t count, const Each& each) {
  for (int64_t start = 0; start < count; start += flags_at_once) {
    uint64_t some;
    __builtin_memcpy(&some, flags + start, sizeof some);
    if (some == 0) continue;
    for (int64_t i = start; i < start + flags_at_once; ++i) {
      if (flags[i] && !each(i)) return false;
    }
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

  // The candidates of a bucket; false if the query was left out. First its largest product, then
  // what is at least the least that may reach the threshold, if there is such a bound, is looked at.
  bool at_bucket(int64_t first, int64_t width, KnnBucket bucket) {
    const float threshold = query.threshold();
    const float least = least_product<squared>(threshold, bucket, bounds);
    alignas(64) uint8_t flags[knn_bucket];
    const int64_t padded = (width + flags_at_once - 1) / flags_at_once * flags_at_once;
    __builtin_memset(flags + padded - flags_at_once, 0, flags_at_once);
    if (least > 0) {
      const auto limit = ordered_least(least, products);
      auto largest = ordered(P{});
#pragma omp simd reduction(max : largest)
      for (int64_t i = 0; i < width; ++i) {
        const auto product = ordered(products[first + i]);
        largest = product > largest ? product : largest;
      }
      if (largest < limit) return true;
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) flags[i] = ordered(products[first + i]) >= limit;
    } else {
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) {
        const Interval v = at(first + i);
        flags[i] = !(v.middle + v.reach < threshold);
      }
    }
    return for_flags(flags, width, [&](int64_t i) {
      if (!query.make_room(scratch)) return false;
      query.add(at(first + i), static_cast<int32_t>(start + first + i));
      return true;
    });
  }

  void everywhere() {
    if (query.threshold() == -INFINITY && !query.is_full()) query.raise(kth_lower_end());
    const KnnBucket* bucket = part.buckets + start / knn_bucket;
    for (int64_t first = 0; first < count; first += knn_bucket) {
      if (!at_bucket(first, count - first < knn_bucket ? count - first : knn_bucket, *bucket++)) {
        return;
      }
    }
    query.keep_few(scratch);
  }
};

template <bool squared, class T, class P>
void collect_products(
    const KnnPart<T>& part, const KnnProducts& products, int64_t first, int64_t last,
    const Scratch& scratch) {
  for (int64_t q = first; q < last; ++q) {
    Query<T> query(part, q);
    if (query.is_left_out() || !query.is_measured()) continue;
    const P* values = static_cast<const P*>(products.values) + q * products.count;
    const QueryBounds bounds = query.bounds(products.half);
    Look<squared, T, P>{part, values, products.start, products.count, bounds, query, scratch}
        .everywhere();
    query.store();
  }
}

template <class T>
void begin(const KnnPart<T>& part, int64_t first, int64_t last) {
  for (int64_t q = first; q < last; ++q) {
    Query<T> query(part, q);
    query.begin();
    query.store();
  }
}

template <class T>
void collect(
    const KnnPart<T>& part, const KnnProducts& products, int64_t first, int64_t last,
    void* memory) {
  const Scratch scratch(part.k, part.capacity, memory);
  if (part.metric == Metric::l2) {
    products.half ? collect_products<true, T, BFloat16>(part, products, first, last, scratch)
                  : collect_products<true, T, float>(part, products, first, last, scratch);
  } else {
    products.half ? collect_products<false, T, BFloat16>(part, products, first, last, scratch)
                  : collect_products<false, T, float>(part, products, first, last, scratch);
  }
}

template <class T>
void finish(const KnnPart<T>& part, int64_t first, int64_t last, void* memory) {
  const Scratch scratch(part.k, part.capacity, memory);
  for (int64_t q = first; q < last; ++q) {
    Query<T> query(part, q);
    if (!query.is_left_out()) query.finish(scratch);
  }
}

template <class T>
void norms(const T* rows, int64_t first, int64_t last, int64_t dim, double* norms) {
  for (int64_t j = first; j < last; ++j) norms[j] = norm(rows + j * dim, dim);
}

// The products of a few queries with rows [first, last), without a matrix product's preparations.
template <class P>
void multiply_rows(
    const float* units, int64_t queries, const P* shadow, int64_t first, int64_t last, int64_t dim,
    int64_t stride, float* products) {
  for (int64_t j = first; j < last; ++j) {
    for (int64_t q = 0; q < queries; ++q) {
      products[q * stride + j] = low_dot(units + q * dim, shadow + j * dim, dim);
    }
  }
}

void multiply_few(
    const float* units, int64_t queries, const void* shadow, bool half, int64_t first, int64_t last,
    int64_t dim, int64_t stride, float* products) {
  if (half) {
    multiply_rows(
        units, queries, static_cast<const BFloat16*>(shadow), first, last, dim, stride, products);
  } else {
    multiply_rows(
        units, queries, static_cast<const float*>(shadow), first, last, dim, stride, products);
  }
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
constexpr KnnKernels<T> knn_kernels{norms<T>, shadow<T>,  multiply_few, Scratch::bytes,
                                    begin<T>, collect<T>, finish<T>};

}  // namespace

extern const KnnKernels<float> knn_f32 = knn_kernels<float>;
extern const KnnKernels<double> knn_f64 = knn_kernels<double>;

FMKERNELS_NAMESPACE_END
