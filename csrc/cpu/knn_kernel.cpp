// The CPU loops of exact nearest neighbours, compiled once per instruction set. A query's products
// are compared with its threshold, many at a time; the rows that reach it wait in a pool, which
// raises the threshold, and what is left of them after a part of the bank is scored in float64.
// docs/kernels/cpu.md counts it.
#include "knn_kernel.h"

#include <cmath>
#include <type_traits>

#if defined(__AVX512BW__)
#include <immintrin.h>
#endif

#include "fmkernels/knn.h"
#include "fmkernels/simd.h"

FMKERNELS_NAMESPACE_BEGIN
namespace {

constexpr int64_t block_bytes = int64_t{1} << 19;  // of rows that many queries share

// run(zero) with a zero of the type of a shadow, or of products.
template <class Run>
void for_shadow(Low type, const Run& run) {
  if (type == Low::bfloat16) return run(BFloat16{});
  if (type == Low::int8) return run(int8_t{});
  run(0.0f);
}
template <class Run>
void for_product(Low type, const Run& run) {
  if (type == Low::bfloat16) return run(BFloat16{});
  if (type == Low::int8) return run(int32_t{});
  run(0.0f);
}

// A query's score as v of fmkernels/knn.h, and back.
struct Units {
  double factor = 1, addend = 0, rounding;

  template <class T>
  Units(const KnnPart<T>& part, double norm) : rounding((part.dim + 8) * 0x1p-50) {
    if (part.metric == Metric::inner_product && norm > 0) factor = 1 / norm;
    if (part.metric == Metric::l2) {
      factor = 0.5 / (part.scale * (norm > part.scale ? norm : part.scale));
      addend = factor * norm * norm;
    }
  }

  // No squared distance is negative.
  double score(double value) const {
    const double score = (value - addend) / factor;
    return addend > 0 && score > 0 ? 0 : score;
  }

  // A float32 that the score's v is not below.
  float below(double score) const {
    const double value = score * factor + addend;
    const double lowered = value - rounding * (__builtin_fabs(score * factor) + addend);
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
        scored_(part.scored[q]), threshold_(part.thresholds[q]) {}

  // Whether products tell nothing: all scores are 0, or none is a finite number.
  bool is_null() const { return norm_ == 0 && part_.metric != Metric::l2; }
  bool is_measured() const { return norm_ < INFINITY && !is_null(); }
  bool is_left_out() const { return part_.crowded != nullptr && part_.crowded[q_]; }

  bool is_full() const { return best_.indices[part_.k - 1] >= 0; }
  int64_t waiting() const { return count_; }
  void restart() { scored_ = 0; }
  float threshold() const { return threshold_; }
  void raise(float threshold) {
    if (threshold > threshold_) threshold_ = threshold;
  }

  void begin() {
    count_ = scored_ = 0;
    threshold_ = -INFINITY;
    forget_this_part();
    raise_to_best();
    if (part_.floor != nullptr) raise(units_.threshold(part_.floor[q_]));
  }

  QueryBounds bounds(Low type) const {
    QueryBounds bounds{1, 1, 0, type == Low::bfloat16 && part_.rescored ? 0x1p-8f : 0, 0};
    if (part_.metric == Metric::l2) {
      const double largest = norm_ > part_.scale ? norm_ : part_.scale;
      bounds.alpha = static_cast<float>(norm_ / largest);
      bounds.gamma = static_cast<float>(part_.scale / largest);
      // float64 rounds the sum of squares of which the score is made, too
      const double squares = norm_ * norm_ + part_.scale * part_.scale;
      bounds.lost = static_cast<float>(units_.rounding * units_.factor * squares) + 0x1p-120f;
    }
    if (part_.rescored) {
      const double spared = part_.largest_residual - part_.query_residuals[q_];
      bounds.lost -= bounds.alpha * static_cast<float>(spared * part_.least_weight);
    }
    bounds.scale = bounds.alpha * (type == Low::int8 ? part_.query_scales[q_] : 1);
    return bounds;
  }

  // False if there are too many candidates to score: then a better product must follow.
  bool make_room(const Scratch& scratch) {
    return count_ < part_.capacity || keep_few(scratch, 3 * part_.capacity / 4);
  }

  // Raises the threshold by what is in the pool; where the ends tell too little, by the scores.
  bool keep_few(const Scratch& scratch, int64_t few) {
    tighten(scratch);
    if (count_ <= few) return true;
    scored_ += count_;
    if (part_.crowded != nullptr && scored_ > part_.crowd) {
      part_.crowded[q_] = true;
      count_ = 0;
      return false;
    }
    score(0, part_.row_count);
    merge(scratch);
    return true;
  }

  void add(Interval v, int64_t row) {
    pool_[count_].lower = v.middle - v.reach;
    pool_[count_].upper = v.middle + v.reach;
    pool_[count_].row = row;
    count_ += !(pool_[count_].upper < threshold_);
  }

  void drop_few(const Scratch& scratch) {
    if (count_ > part_.k) tighten(scratch);
  }

  // Scores the candidates from number `next` on whose row is below `end`; the number after them.
  int64_t score(int64_t next, int64_t end) const {
    for (; next < count_ && pool_[next].row < end; ++next) {
      if (next + 2 < count_) prefetch(pool_[next + 2].row);
      const double middle = 0.5 * (double(pool_[next].lower) + double(pool_[next].upper));
      const bool exactly = part_.rescored || !(__builtin_fabs(middle) < INFINITY);
      pool_[next].score = exactly ? exact_score(pool_[next].row) : units_.score(middle);
    }
    return next;
  }

  void score_on(int64_t end) { scored_ = score(scored_, end); }

  // Empties the pool, all of which is scored, into what was found.
  void merge(const Scratch& scratch) {
    if (part_.rescored) part_.candidates[q_] += count_;
    const bool full = is_full();
    int64_t better = 0;
    for (int64_t i = 0; i < count_; ++i) {
      const double score = pool_[i].score;
      scratch.found.scores[better] = score;
      scratch.found.indices[better] = part_.first_row + pool_[i].row;
      better += full ? score > best_.scores[part_.k - 1] : score == score;
    }
    count_ = 0;
    if (better == 0) return;
    merge_found(best_, part_.k, scratch.found, better, scratch.spare);
    raise_to_best();
  }

  // Where products tell nothing, every row is a candidate.
  void score_all(const Scratch& scratch) {
    if (norm_ != norm_) return;  // and so are the scores
    for (int64_t row = 0; row < part_.row_count;) {
      if (is_null() && is_full() && best_.scores[part_.k - 1] >= 0) return;
      for (; count_ < part_.capacity && row < part_.row_count; ++row, ++count_) {
        pool_[count_].row = row;
        pool_[count_].score = exact_score(row);
      }
      merge(scratch);
    }
  }

  void store() const {
    part_.counts[q_] = count_;
    part_.scored[q_] = scored_;
    part_.thresholds[q_] = threshold_;
  }

 private:
  // What a product that left too many candidates has found already is found again.
  void forget_this_part() {
    int64_t kept = 0;
    for (int64_t i = 0; i < part_.k && best_.indices[i] >= 0; ++i) {
      if (best_.indices[i] >= part_.first_row) continue;
      best_.scores[kept] = best_.scores[i];
      best_.indices[kept++] = best_.indices[i];
    }
    for (; kept < part_.k && best_.indices[kept] >= 0; ++kept) {
      best_.scores[kept] = -INFINITY;
      best_.indices[kept] = -1;
    }
  }

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

  double exact_score(int64_t j) const {
    const double* query = part_.wide_queries + q_ * part_.dim;
    const T* row = part_.rows + j * part_.dim;
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
  int64_t count_, scored_;
  float threshold_;
};

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
    const int64_t k = part.k;
    if (query.waiting() > 2 * part.capacity / 3) query.keep_few(scratch, k + k / 2 + 16);
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
    const QueryBounds bounds = query.bounds(products.type);
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
  const auto run = [&](auto zero) {
    using P = decltype(zero);
    part.metric == Metric::l2 ? collect_products<true, T, P>(part, products, first, last, scratch)
                              : collect_products<false, T, P>(part, products, first, last, scratch);
  };
  for_product(products.type, run);
}

// Scores what is left in the pools: a block of rows at a time, so that queries that share candidates
// find them in the cache.
template <class T>
void finish(const KnnPart<T>& part, int64_t first, int64_t last, void* memory) {
  const Scratch scratch(part.k, part.capacity, memory);
  const auto for_queries = [&](const auto& run) {
    for (int64_t q = first; q < last; ++q) {
      Query<T> query(part, q);
      if (query.is_left_out()) continue;
      run(query);
      query.store();
    }
  };
  int64_t waiting = 0;
  for_queries([&](Query<T>& query) {
    query.is_measured() ? query.drop_few(scratch) : query.score_all(scratch);
    query.restart();
    waiting += query.waiting();
  });
  const bool shared = waiting > 2 * part.row_count;
  const int64_t bytes = part.dim * int64_t{sizeof(T)};
  const int64_t block = shared ? 1 + block_bytes / bytes : part.row_count;
  for (int64_t end = block; end < part.row_count + block; end += block) {
    for_queries([&](Query<T>& query) { query.score_on(end); });
  }
  for_queries([&](Query<T>& query) { query.merge(scratch); });
}

template <class T>
void norms(const T* rows, int64_t first, int64_t last, int64_t dim, double* norms) {
  for (int64_t j = first; j < last; ++j) norms[j] = norm(rows + j * dim, dim);
}

#if defined(__AVX512F__)
constexpr int floats = 16;
#elif defined(__AVX2__)
constexpr int floats = 8;
#else
constexpr int floats = 4;
#endif
using Register = Vec<float, floats>;

FMKERNELS_INLINE Register load_wide(const float* memory) { return load<Register>(memory); }
FMKERNELS_INLINE Register load_wide(const int8_t* memory) {
  typedef int8_t Codes __attribute__((vector_size(floats)));
  Codes codes;
  __builtin_memcpy(&codes, memory, sizeof codes);
  return __builtin_convertvector(codes, Native<float, floats>::Values);
}
FMKERNELS_INLINE Register load_wide(const BFloat16* memory) {
  typedef uint16_t Halves __attribute__((vector_size(floats * sizeof(uint16_t))));
  Halves halves;
  __builtin_memcpy(&halves, memory, sizeof halves);
  const auto wide = __builtin_convertvector(halves, Native<float, floats>::Ints) << 16;
  return from_bits(IntVec<float, floats>{wide});
}

// The products of a unit with as many rows as a register has lanes, whose sums are then added up
// together.
template <class P>
FMKERNELS_INLINE void multiply_block(
    const float* unit, const P* rows, int64_t dim, float* products) {
  constexpr int parts = 4;
  const int64_t whole = dim / floats * floats;
  Register sums[floats];
  for (int row = 0; row < floats; ++row) {
    const P* numbers = rows + row * dim;
    Register sum[parts] = {Register(0.0f), Register(0.0f), Register(0.0f), Register(0.0f)};
    int64_t d = 0;
    for (; d + parts * floats <= whole; d += parts * floats) {
      for (int part = 0; part < parts; ++part) {
        const int64_t at = d + part * floats;
        sum[part] += load<Register>(unit + at) * load_wide(numbers + at);
      }
    }
    for (; d < whole; d += floats) sum[0] += load<Register>(unit + d) * load_wide(numbers + d);
    sums[row] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  }
  transpose(sums);
  for (int half = floats / 2; half > 0; half /= 2) {
    for (int row = 0; row < half; ++row) sums[row] += sums[row + half];
  }
  store(sums[0], products);
  for (int64_t d = whole; d < dim; ++d) {
    for (int row = 0; row < floats; ++row) products[row] += unit[d] * widen(rows[row * dim + d]);
  }
}

// The products of a few queries with rows [first, last), without a matrix product's preparations.
template <class P>
void multiply_rows(
    const float* units, int64_t queries, const P* shadow, int64_t first, int64_t last, int64_t dim,
    int64_t stride, float* products) {
  int64_t j = first;
  for (; j + floats <= last; j += floats) {
    for (int64_t q = 0; q < queries; ++q) {
      multiply_block(units + q * dim, shadow + j * dim, dim, products + q * stride + j);
    }
  }
  for (; j < last; ++j) {
    for (int64_t q = 0; q < queries; ++q) {
      float sum = 0;
      for (int64_t d = 0; d < dim; ++d) sum += units[q * dim + d] * widen(shadow[j * dim + d]);
      products[q * stride + j] = sum;
    }
  }
}

void multiply_few(
    const float* units, int64_t queries, const void* shadow, Low type, int64_t first, int64_t last,
    int64_t dim, int64_t stride, float* products) {
  for_shadow(type, [&](auto zero) {
    const auto* rows = static_cast<const decltype(zero)*>(shadow);
    multiply_rows(units, queries, rows, first, last, dim, stride, products);
  });
}

template <class T, class P>
void cast_rows(
    const T* rows, int64_t first, int64_t last, int64_t dim, P* shadow, double* norms,
    float* residuals, float* scales) {
  for (int64_t j = first; j < last; ++j) {
    const T* row = rows + j * dim;
    norms[j] = norm(row, dim);
    const float scale = sizeof(P) == 1 ? scale_of_codes(row, norms[j], dim) : 1;
    if (sizeof(P) == 1) scales[j] = scale;
    const double lost = cast_unit(row, norms[j], scale, dim, shadow + j * dim);
    residuals[j] = __builtin_nextafterf(static_cast<float>(lost * (1 + 1e-6) + 1e-15), INFINITY);
  }
}

template <class T>
void shadow(
    const T* rows, Low type, int64_t first, int64_t last, int64_t dim, void* shadow,
    double* norms, float* residuals, float* scales) {
  for_shadow(type, [&](auto zero) {
    cast_rows(
        rows, first, last, dim, static_cast<decltype(zero)*>(shadow), norms, residuals, scales);
  });
}

template <class T>
constexpr KnnKernels<T> knn_kernels{norms<T>, shadow<T>,  multiply_few, Scratch::bytes,
                                    begin<T>, collect<T>, finish<T>};

}  // namespace

extern const KnnKernels<float> knn_f32 = knn_kernels<float>;
extern const KnnKernels<double> knn_f64 = knn_kernels<double>;

FMKERNELS_NAMESPACE_END
