// Products that are compared with thresholds in the registers that they were added up in: no product
// is written to memory. With AVX2 and AVX-512. Lanes are queries, packed for a part of the bank; the numbers of a row are broadcast to them.
//
// Counted for AVX-512: a panel of 4 registers of queries with 6 rows keeps 24 sums, 4 factors and a
// broadcast in 32 registers, and makes 24 multiply-adds of 10 loads. 64 packed queries of 384
// numbers in int8 are 24 KB, three quarters of a level-1 cache; a bucket of rows is read once by all
// of them. Such a panel ran at 220 of the 224 · 10⁹ multiply-adds a second that the core has at
// 3.5 GHz (oneDNN's product: 209), in float32 at 56 of 56 (oneDNN: 41 to 48).
#pragma once

#include <cmath>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "fmkernels/knn.h"
#include "fmkernels/simd.h"
#include "knn_few.h"
#include "knn_kernel.h"
#include "knn_query.h"

FMKERNELS_NAMESPACE_BEGIN

#if defined(__AVX512F__)
constexpr int most_vectors = 4;
#else
constexpr int most_vectors = 2;
#endif
constexpr int lane_count = floats, panel_rows = 6, bucket_rest = knn_bucket % panel_rows;

#if defined(__AVX2__)
// A bit for each lane whose value is not below its limit, or is no number.
FMKERNELS_INLINE uint64_t reaching(Register values, Register limits) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(
      reinterpret_cast<__m512>(values.native), reinterpret_cast<__m512>(limits.native),
      _CMP_NLT_UQ);
#else
  const auto below = (values < limits).native;
  return ~_mm256_movemask_ps(reinterpret_cast<__m256>(below)) & 0xff;
#endif
}
#endif

// What σ s of a row must not be below to reach the threshold of a query anywhere in a bucket, in
// fewer roundings than a slack allows for; −∞ where float32 cannot tell.
template <bool squared>
float least_value(float threshold, KnnBucket bucket, QueryBounds query) {
  float excess = threshold - query.alpha * bucket.slack - query.lost;
  if (squared) excess += (1 - 0x1p-20f) * (query.gamma * bucket.half) - 0x1p-119f;
  const float least = excess / query.scale, size = __builtin_fabsf(least);
  return size > 0x1p-100f && size < INFINITY ? least - 0x1p-20f * size : -INFINITY;
}

// How a product of type float32 is made. `step` numbers of a query lie beside each other in a lane.
struct FloatProducts {
  using Unit = float;  // of queries, and of a shadow
  using Row = float;   // as it is broadcast
  using Sum = float;
  using Sums = Register;
  static constexpr int step = 1;

  static Sum start(const Unit*, int64_t) { return 0; }
  FMKERNELS_INLINE static void add(Sums& sums, Sums queries, Sums row) { sums += queries * row; }
  FMKERNELS_INLINE static Sums spread(const Row* row) { return Sums(*row); }
  static const Row* staged(const Unit* rows, int64_t, int64_t, Row*) { return rows; }
  FMKERNELS_INLINE static Register value(Sums sums) { return sums; }
};

#if defined(__AVX512BW__)
// The instruction multiplies bytes without a sign with such that have one. So 128 is added to those
// of the rows, and taken from the sum again, 128 times the sum of the query's codes.
struct Int8Products {
  using Unit = int8_t;
  using Row = uint8_t;
  using Sum = int32_t;
  typedef int32_t Sums __attribute__((vector_size(64)));
  static constexpr int step = 4;

  static Sum start(const Unit* unit, int64_t dim) {
    int32_t sum = 0;
    for (int64_t d = 0; d < dim; ++d) sum += unit[d];
    return -128 * sum;
  }
  // By its name: this file is compiled for machines that lack it, too, where nobody asks for it.
  FMKERNELS_INLINE static void add(Sums& sums, Sums queries, Sums row) {
    Sums sum = sums;
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(row), "v"(queries));
    sums = sum;
  }
  FMKERNELS_INLINE static Sums spread(const Row* row) {
    int32_t codes;
    __builtin_memcpy(&codes, row, sizeof codes);
    return Sums{} + codes;
  }
  // In whole steps: of what is beyond a row's end, the queries have zeros.
  static const Row* staged(const Unit* rows, int64_t count, int64_t dim, Row* memory) {
    const int64_t stride = (dim + step - 1) / step * step;
    for (int64_t j = 0; j < count; ++j) {
      for (int64_t d = 0; d < dim; ++d) memory[j * stride + d] = rows[j * dim + d] ^ 0x80;
      for (int64_t d = dim; d < stride; ++d) memory[j * stride + d] = 0;
    }
    return memory;
  }
  FMKERNELS_INLINE static Register value(Sums sums) {
    return __builtin_convertvector(sums, Native<float, lane_count>::Values);
  }
};
#endif

// Some queries' search of a part of the bank, by one thread.
template <bool squared, class T, class F>
class Fused {
  using Unit = typename F::Unit;
  using Row = typename F::Row;
  using Sum = typename F::Sum;
  using Sums = typename F::Sums;

 public:
  // In bytes. The queries come in groups of so many registers.
  static int64_t memory(int64_t dim, int64_t queries, int vectors) {
    const int64_t padded = queries + vectors * lane_count, steps = steps_of(dim);
    return 64 * 5 + padded * (steps * F::step * int64_t{sizeof(Unit)} + int64_t{sizeof(Sum)} + 4 +
                              int64_t{sizeof(QueryBounds)} + 1) +
           (F::step > 1 ? knn_bucket * steps * F::step * int64_t{sizeof(Row)} : 0);
  }

  Fused(
      const KnnPart<T>& part, const Unit* units, int64_t first, int64_t last, int vectors,
      const Scratch& scratch, void* memory)
      : part_(part), first_(first), last_(last), width_(vectors * lane_count),
        steps_(steps_of(part.dim)), scratch_(scratch) {
    const int64_t padded = (last - first + width_ - 1) / width_ * width_;
    packed_ = static_cast<Unit*>(memory);
    starts_ = take<Sum>(packed_ + padded * steps_ * F::step);
    limits_ = take<float>(starts_ + padded);
    bounds_ = take<QueryBounds>(limits_ + padded);
    searches_ = take<bool>(bounds_ + padded);
    staged_ = take<Row>(searches_ + padded);
    for (int64_t lane = 0; lane < padded; ++lane) {
      searches_[lane] = false;
      limits_[lane] = INFINITY;
      starts_[lane] = 0;
    }
    for (int64_t q = first; q < last; ++q) {
      const Query<T> query(part, q);
      searches_[q - first] = query.is_measured() && !query.is_left_out();
      bounds_[q - first] = query.bounds(low_);
      starts_[q - first] = F::start(units + q * part.dim, part.dim);
    }
    for (int64_t start = first; start < last; start += width_) pack(units, start);
  }

  // From a row on that begins a bucket.
  void search(const Unit* shadow, int64_t start) {
    for (; start < part_.row_count; start += knn_bucket) {
      const int64_t left = part_.row_count - start, count = left < knn_bucket ? left : knn_bucket;
      const Row* rows = F::staged(shadow + start * part_.dim, count, part_.dim, staged_);
      const KnnBucket bucket = part_.buckets[start / knn_bucket];
      for (int64_t first = first_; first < last_; first += width_) {
        set_limits(first, bucket);
        const Unit* end = shadow + part_.row_count * part_.dim;
        ahead_ = first == first_ ? shadow + (start + count) * part_.dim : end;
        ahead_end_ = end;
        at_group(first, rows, start, count);
        settle(first);
      }
    }
  }

 private:
  static constexpr int64_t line = 64 / sizeof(Unit);
  static constexpr Low low_ = F::step > 1 ? Low::int8 : Low::float32;

  static int64_t steps_of(int64_t dim) { return (dim + F::step - 1) / F::step; }
  template <class To, class From>
  static To* take(From* end) {
    return reinterpret_cast<To*>((reinterpret_cast<uintptr_t>(end) + 63) / 64 * 64);
  }
  int64_t end_of(int64_t first) const { return first + width_ < last_ ? first + width_ : last_; }
  int vectors_of(int64_t first) const {
    return static_cast<int>((end_of(first) - first + lane_count - 1) / lane_count);
  }
  Unit* packed(int64_t first) const { return packed_ + (first - first_) * steps_ * F::step; }

  // (steps, lanes, step), zero where there is no query and no number.
  void pack(const Unit* units, int64_t first) {
    const int64_t lanes = vectors_of(first) * lane_count;
    Unit* group = packed(first);
    __builtin_memset(group, 0, steps_ * lanes * F::step * sizeof(Unit));
    for (int64_t q = first; q < end_of(first); ++q) {
      for (int64_t d = 0; d < part_.dim; ++d) {
        group[(d / F::step * lanes + q - first) * F::step + d % F::step] = units[q * part_.dim + d];
      }
    }
  }

  void set_limits(int64_t first, KnnBucket bucket) {
    for (int64_t q = first; q < end_of(first); ++q) {
      if (!searches_[q - first_]) continue;
      limits_[q - first_] =
          least_value<squared>(part_.states[q].threshold, bucket, bounds_[q - first_]);
    }
  }

  void at_group(int64_t first, const Row* rows, int64_t start, int64_t count) {
    switch (vectors_of(first)) {
      case 1: return at_rows<1>(first, rows, start, count);
      case 2: return at_rows<2>(first, rows, start, count);
#if defined(__AVX512F__)
      case 3: return at_rows<3>(first, rows, start, count);
      case 4: return at_rows<4>(first, rows, start, count);
#endif
    }
  }

  template <int vectors>
  void at_rows(int64_t first, const Row* rows, int64_t start, int64_t count) {
    int64_t j = 0;
    for (; j + panel_rows <= count; j += panel_rows) {
      at_panel<vectors, panel_rows>(first, rows + j * steps_ * F::step, start + j);
    }
    if (j + bucket_rest <= count) {
      at_panel<vectors, bucket_rest>(first, rows + j * steps_ * F::step, start + j);
      j += bucket_rest;
    }
    for (; j < count; ++j) at_panel<vectors, 1>(first, rows + j * steps_ * F::step, start + j);
  }

  template <int vectors, int height>
  void at_panel(int64_t first, const Row* rows, int64_t start) {
    const int64_t stride = steps_ * F::step;
    const Unit* queries = packed(first);
    const Sum* starts = starts_ + first - first_;
    const float* limits = limits_ + first - first_;
    Sums sums[height][vectors];
    for (int j = 0; j < height; ++j) {
      for (int v = 0; v < vectors; ++v) sums[j][v] = read<Sums>(starts + v * lane_count);
    }
    for (int64_t step = 0; step < steps_; ++step) {
      Sums factors[vectors];
      for (int v = 0; v < vectors; ++v) {
        factors[v] = read<Sums>(queries + (step * vectors + v) * lane_count * F::step);
      }
      for (int j = 0; j < height; ++j) {
        const Sums row = F::spread(rows + j * stride + step * F::step);
        for (int v = 0; v < vectors; ++v) F::add(sums[j][v], factors[v], row);
      }
    }
    prefetch(height * part_.dim);
    uint64_t reached[height], any = 0;
    for (int j = 0; j < height; ++j) {
      reached[j] = 0;
      for (int v = 0; v < vectors; ++v) {
        const auto value = F::value(sums[j][v]) * Register(part_.sigma[start + j]);
        reached[j] |= reaching(value, load<Register>(limits + v * lane_count)) << (v * lane_count);
      }
      any |= reached[j];
    }
    if (any == 0) return;
    alignas(64) Sum products[height][vectors * lane_count];
    for (int j = 0; j < height; ++j) {
      for (int v = 0; v < vectors; ++v) {
        __builtin_memcpy(&products[j][v * lane_count], &sums[j][v], sizeof(Sums));
      }
      for (uint64_t bits = reached[j]; bits != 0; bits &= bits - 1) {
        const int lane = __builtin_ctzll(bits);
        add(first + lane, start + j, products[j][lane]);
      }
    }
  }

  void prefetch(int64_t count) {
    const Unit* end = ahead_end_ - ahead_ < count ? ahead_end_ : ahead_ + count;
    for (; ahead_ < end; ahead_ += end - ahead_ < line ? end - ahead_ : line) {
      __builtin_prefetch(ahead_, 0, 2);
    }
  }

  template <class Value>
  static FMKERNELS_INLINE Value read(const void* memory) {
    Value value;
    __builtin_memcpy(&value, memory, sizeof value);
    return value;
  }

  // A candidate, unless the query has left.
  void add(int64_t q, int64_t row, Sum product) {
    if (!searches_[q - first_]) return;
    KnnState& state = part_.states[q];
    if (state.count == part_.capacity && !make_room(q)) return leave(q);
    const RowBounds bounds{part_.sigma, part_.slack, part_.half};
    Query<T>::add(
        state, part_.pools + q * part_.capacity,
        interval<squared>(product, bounds, row, bounds_[q - first_]), row);
  }

  bool make_room(int64_t q) {
    Query<T> query(part_, q);
    const bool found = query.make_room(scratch_);
    query.store();
    return found;
  }

  void settle(int64_t first) {
    for (int64_t q = first; q < end_of(first); ++q) {
      if (!Query<T>::is_due(part_, part_.states[q])) continue;
      Query<T> query(part_, q);
      query.settle(scratch_);
      query.store();
      if (query.is_left_out()) leave(q);
    }
  }

  void leave(int64_t q) {
    searches_[q - first_] = false;
    limits_[q - first_] = INFINITY;
  }

  const KnnPart<T>& part_;
  const int64_t first_, last_, width_, steps_;
  const Scratch& scratch_;
  Unit* packed_;
  Sum* starts_;
  float* limits_;
  QueryBounds* bounds_;
  bool* searches_;  // whether there is a query that products tell something
  Row* staged_;
  const Unit *ahead_, *ahead_end_;  // what comes to the cache beside the products of the first group
};

FMKERNELS_NAMESPACE_END
