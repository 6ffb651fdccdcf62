// The CPU loops of exact nearest neighbours, compiled once per instruction set. A query's products
// are compared with its threshold, in registers (knn_fused.h) or in memory (knn_look.h); the rows that
// reach it wait in a pool (knn_query.h), which raises the threshold, and what is left of them after a
// part of the bank is scored in float64. docs/kernels/cpu.md counts it.
#include "knn_kernel.h"

#include <cmath>

#include "fmkernels/knn.h"
#include "knn_bounds.h"
#include "knn_few.h"
#include "knn_fused.h"
#include "knn_look.h"
#include "knn_query.h"

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

// body(products), for the types that there are any of that are compared as they are made.
template <class Body>
void for_fused(Low type, const Body& body) {
#if defined(__AVX2__)
  if (type == Low::float32) body(FloatProducts{});
#endif
#if defined(__AVX512BW__)
  if (type == Low::int8) body(Int8Products{});
#endif
}

bool fuses(Low type) {
  bool found = false;
  for_fused(type, [&](auto) { found = true; });
  return found;
}

template <class T>
int64_t fused_bytes(const KnnPart<T>& part, Low type, int64_t queries, int vectors) {
  int64_t bytes = 0;
  for_fused(type, [&](auto products) {
    bytes = Fused<false, T, decltype(products)>::memory(part.dim, queries, vectors);
  });
  return bytes + Scratch::bytes(part.k, part.capacity, 0) + 64;
}

template <class T>
void search_fused(
    const KnnPart<T>& part, const void* units, const void* shadow, Low type, int64_t start,
    int vectors, int64_t first, int64_t last, void* memory) {
  const Scratch scratch(part.k, part.capacity, memory);
  void* rest = static_cast<char*>(memory) + (Scratch::bytes(part.k, part.capacity, 0) + 63) / 64 * 64;
  for_fused(type, [&](auto products) {
    using F = decltype(products);
    const auto* rows = static_cast<const typename F::Unit*>(shadow);
    const auto* queries = static_cast<const typename F::Unit*>(units);
    const auto run = [&](auto fused) { fused.search(rows, start); };
    part.metric == Metric::l2
        ? run(Fused<true, T, F>(part, queries, first, last, vectors, scratch, rest))
        : run(Fused<false, T, F>(part, queries, first, last, vectors, scratch, rest));
  });
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
constexpr KnnKernels<T> knn_kernels{
    norms<T>, shadow<T>, multiply_few, largest_norm, row_bounds, Scratch::bytes, begin<T>,
    collect<T>, fuses, lane_count, most_vectors, fused_bytes<T>, search_fused<T>, finish<T>};

}  // namespace

extern const KnnKernels<float> knn_f32 = knn_kernels<float>;
extern const KnnKernels<double> knn_f64 = knn_kernels<double>;

FMKERNELS_NAMESPACE_END
