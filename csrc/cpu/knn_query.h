// One query of exact nearest neighbours: its threshold, and the pool in which the rows that reach it
// wait until they are scored in float64.
#pragma once

#include <cmath>

#include "fmkernels/knn.h"
#include "fmkernels/simd.h"
#include "knn_kernel.h"

FMKERNELS_NAMESPACE_BEGIN

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

// The k-th largest of n numbers, none of them a NaN: the largest that k reach, bit by bit. A pass
// over a few registers for each bit is 10 times as fast as to part the numbers by branches.
inline float kth_largest(const float* values, int64_t n, int64_t k) {
  // of the same order as the floats that their bits are, except that −0 is below 0
  const auto ordered = [](int32_t bits) { return bits ^ (bits >> 31 & INT32_MAX); };
  const auto reached_by_k = [=](int32_t limit) {
    int32_t count = 0;
#pragma omp simd reduction(+ : count)
    for (int64_t i = 0; i < n; ++i) count += ordered(bits_of(values[i])) >= limit;
    return count >= k;
  };
  int32_t found = reached_by_k(0) ? 0 : INT32_MIN;
  for (int32_t bit = 1 << 30; bit > 0; bit >>= 1) {
    if (reached_by_k(found | bit)) found |= bit;
  }
  return from_bits(ordered(found));
}

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
        pool_(part.pools + q * part.capacity), count_(part.states[q].count),
        kept_(part.states[q].kept), scored_(part.states[q].scored),
        threshold_(part.states[q].threshold) {}

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
    count_ = kept_ = scored_ = 0;
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
    if (count_ > few && may_score(count_)) {
      score(0, part_.row_count);
      merge(scratch);
    }
    kept_ = count_;
    return !is_left_out();
  }

  // Whether so many have come that it pays to raise the threshold.
  static bool is_due(const KnnPart<T>& part, const KnnState& state) {
    return state.count - state.kept > part.k / 2 + 48;
  }
  void settle(const Scratch& scratch) {
    if (!is_due(part_, {threshold_, count_, kept_, scored_})) return;
    keep_few(scratch, 2 * part_.capacity / 3);
  }

  void add(Interval v, int64_t row) {
    KnnState state{threshold_, count_, kept_, scored_};
    add(state, pool_, v, row);
    count_ = state.count;
  }
  static FMKERNELS_INLINE void add(KnnState& state, KnnCandidate* pool, Interval v, int64_t row) {
    KnnCandidate& candidate = pool[state.count];
    candidate.lower = v.middle - v.reach;
    candidate.upper = v.middle + v.reach;
    candidate.row = row;
    state.count += !(candidate.upper < state.threshold);
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
      better += full ? score >= best_.scores[part_.k - 1] : score == score;
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
    part_.states[q_] = {threshold_, count_, kept_, scored_};
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

  void tighten(const Scratch& scratch) {
    if (part_.score_early) return score_likely(scratch);
    raise(kth_value(scratch, [](KnnCandidate row) { return row.lower; }));
    drop();
  }

  // Whether that makes not too many; else the query is left out.
  bool may_score(int64_t count) {
    scored_ += count;
    if (part_.crowded == nullptr || scored_ <= part_.crowd) return true;
    part_.crowded[q_] = true;
    count_ = 0;
    return false;
  }

  // The k-th largest of what is said of the candidates and of the scores already known.
  template <class Value>
  float kth_value(const Scratch& scratch, const Value& value) const {
    int64_t known = 0;
    for (; known < part_.k && best_.indices[known] >= 0; ++known) {
      scratch.values[known] = units_.below(best_.scores[known]);
    }
    for (int64_t i = 0; i < count_; ++i) {
      const float said = value(pool_[i]);
      scratch.values[known + i] = said == said ? said : -INFINITY;
    }
    return known + count_ < part_.k ? -INFINITY : kth_largest(scratch.values, known + count_, part_.k);
  }

  // The scores of those that are probably among the k nearest tell who of the others cannot be.
  void score_likely(const Scratch& scratch) {
    const auto middle = [](KnnCandidate row) { return 0.5f * (row.lower + row.upper); };
    const float least = kth_value(scratch, middle);
    if (least == -INFINITY) return;
    int64_t kept = 0, found = 0;
    for (int64_t i = 0; i < count_; ++i) {
      if (middle(pool_[i]) >= least) {
        scratch.found.indices[found++] = pool_[i].row;
        prefetch(pool_[i].row);
      } else {
        pool_[kept++] = pool_[i];
      }
    }
    count_ = kept;
    if (!may_score(found)) return;
    int64_t better = 0;
    for (int64_t i = 0; i < found; ++i) {
      const double score = exact_score(scratch.found.indices[i]);
      scratch.found.scores[better] = score;
      scratch.found.indices[better] = part_.first_row + scratch.found.indices[i];
      better += score == score;
    }
    part_.candidates[q_] += found;
    merge_found(best_, part_.k, scratch.found, better, scratch.spare);
    // others, of a lower number, may equal it
    if (is_full()) raise(units_.below(best_.scores[part_.k - 1]));
    drop();
  }

  void drop() {
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
  int64_t count_, kept_, scored_;
  float threshold_;
};

FMKERNELS_NAMESPACE_END
