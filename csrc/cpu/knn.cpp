// What fmkernels/ops/knn/cpp.py is made of: norms, shadows, and the search of a part of the bank.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "cpu_isa.h"
#include "knn_kernel.h"
#include "scratch.h"
#include "tensors.h"

namespace fmkernels {

namespace {

bool is_before(double a, int64_t index_a, double b, int64_t index_b) {
  return a != b ? a > b : index_a < index_b;
}

// A few new ones are cheaper put where they belong, one by one.
void insert_found(KnnFound best, int64_t k, int64_t kept, KnnFound found, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const double score = found.scores[i];
    const auto above = [](double value, double kept_score) { return value > kept_score; };
    int64_t at = std::upper_bound(best.scores, best.scores + kept, score, above) - best.scores;
    while (at > 0 && is_before(score, found.indices[i], best.scores[at - 1], best.indices[at - 1])) {
      --at;
    }
    if (at == k) continue;
    kept = std::min(k, kept + 1);
    std::memmove(best.scores + at + 1, best.scores + at, (kept - at - 1) * sizeof(double));
    std::memmove(best.indices + at + 1, best.indices + at, (kept - at - 1) * sizeof(int64_t));
    best.scores[at] = score;
    best.indices[at] = found.indices[i];
  }
}

}  // namespace

void merge_found(KnnFound best, int64_t k, KnnFound found, int64_t count, KnnFound spare) {
  int64_t kept = 0;
  while (kept < k && best.indices[kept] >= 0) ++kept;
  if (count <= 16) return insert_found(best, k, kept, found, count);

  std::vector<std::pair<double, int64_t>> ordered(count);
  for (int64_t i = 0; i < count; ++i) ordered[i] = {found.scores[i], found.indices[i]};
  const auto before = [](const auto& a, const auto& b) {
    return is_before(a.first, a.second, b.first, b.second);
  };
  const int64_t useful = std::min(k, count);
  if (useful < count) {
    std::nth_element(ordered.begin(), ordered.begin() + useful, ordered.end(), before);
  }
  std::sort(ordered.begin(), ordered.begin() + useful, before);
  int64_t old = 0, fresh = 0, merged = 0;
  for (; merged < k && (old < kept || fresh < useful); ++merged) {
    const bool take_old =
        fresh == useful || (old < kept && before(std::pair(best.scores[old], best.indices[old]),
                                                 ordered[fresh]));
    spare.scores[merged] = take_old ? best.scores[old] : ordered[fresh].first;
    spare.indices[merged] = take_old ? best.indices[old] : ordered[fresh].second;
    ++(take_old ? old : fresh);
  }
  std::copy_n(spare.scores, merged, best.scores);
  std::copy_n(spare.indices, merged, best.indices);
}

namespace {

template <class T>
const KnnKernels<T>& knn_kernels();
template <>
inline const KnnKernels<float>& knn_kernels<float>() {
  return FMKERNELS_FOR_CPU_ISA(knn_f32);
}
template <>
inline const KnnKernels<double>& knn_kernels<double>() {
  return FMKERNELS_FOR_CPU_ISA(knn_f64);
}

// body(zero) with a zero of the rows' type.
template <class Body>
auto for_type(const Tensor& rows, const Body& body) {
  STD_TORCH_CHECK(
      rows.is_contiguous() && rows.dim() == 2, "knn: rows: expected a dense matrix");
  if (rows.scalar_type() == ScalarType::Double) return body(0.0);
  STD_TORCH_CHECK(rows.scalar_type() == ScalarType::Float, "knn: rows: expected float32 or float64");
  return body(0.0f);
}

Low low_type(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_contiguous(), "knn: products, shadow: expected a dense tensor");
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Low::float32;
    case ScalarType::BFloat16:
      return Low::bfloat16;
    case ScalarType::Char:
    case ScalarType::Int:
      return Low::int8;
    default:
      STD_TORCH_CHECK(false, "knn: products, shadow: expected float32, bfloat16 or int8");
  }
  return Low::float32;
}

constexpr int64_t rows_per_task = 64;

Tensor norms(const Tensor& rows) {
  return for_type(rows, [&](auto zero) {
    using T = decltype(zero);
    Tensor result = empty<double>({rows.size(0)});
    torch::stable::parallel_for(0, rows.size(0), rows_per_task, [&](int64_t first, int64_t last) {
      knn_kernels<T>().norms(
          data_of<const T>(rows), first, last, rows.size(1), data_of<double>(result));
    });
    return result;
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> shadow(const Tensor& rows, const Tensor& like) {
  const Low type = low_type(like);
  return for_type(rows, [&](auto zero) {
    using T = decltype(zero);
    const int64_t count = rows.size(0), dim = rows.size(1);
    Tensor cast = torch::stable::new_empty(like, {count, dim});
    Tensor norms = empty<double>({count}), residuals = empty<float>({count});
    Tensor scales = empty<float>({type == Low::int8 ? count : 0});
    torch::stable::parallel_for(0, count, rows_per_task, [&](int64_t first, int64_t last) {
      knn_kernels<T>().shadow(
          data_of<const T>(rows), type, first, last, dim, cast.data_ptr(), data_of<double>(norms),
          data_of<float>(residuals), data_of<float>(scales));
    });
    return std::tuple{cast, norms, residuals, scales};
  });
}

// What turns the products with a part's rows into intervals.
struct PartBounds {
  std::vector<float> sigma, slack, half;
  std::vector<KnnBucket> buckets;
  double scale = 1, least_weight = std::numeric_limits<double>::infinity();

  template <class T>
  PartBounds(const KnnKernels<T>& kernels, KnnRows rows, int64_t count, KnnErrors errors)
      : sigma(count), slack(count), half(count), buckets((count + knn_bucket - 1) / knn_bucket) {
    if (errors.metric == Metric::l2) scale = kernels.largest_norm(rows, count);
    const KnnRowBounds bounds{sigma.data(), slack.data(), half.data()};
    std::vector<double> weights(buckets.size());
    torch::stable::parallel_for(0, buckets.size(), 16, [&](int64_t first, int64_t last) {
      for (int64_t bucket = first; bucket < last; ++bucket) {
        const int64_t start = bucket * knn_bucket, stop = std::min(count, start + knn_bucket);
        buckets[bucket] =
            kernels.row_bounds(rows, errors, scale, start, stop, bounds, &weights[bucket]);
      }
    });
    for (double weight : weights) least_weight = std::min(least_weight, weight);
    if (std::isinf(least_weight)) least_weight = 0;
  }
};

double largest_finite(const Tensor& residuals) {
  const float* values = data_of<const float>(residuals);
  float largest = 0;
  for (int64_t i = 0; i < residuals.numel(); ++i) {
    if (std::isfinite(values[i])) largest = std::max(largest, values[i]);
  }
  return largest;
}

Metric parse_metric(const std::string& name) {
  if (name == "cosine") return Metric::cosine;
  if (name == "inner_product") return Metric::inner_product;
  STD_TORCH_CHECK(name == "l2", "knn: metric: unknown ", name);
  return Metric::l2;
}

template <class T>
T* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? data_of<T>(*tensor) : nullptr;
}

// Rows of a dense matrix, as a view.
Tensor rows_of(const Tensor& matrix, int64_t start, int64_t count) {
  return torch::stable::narrow(const_cast<Tensor&>(matrix), 0, start, count);
}

// out = a bᵀ
void multiply(const Tensor& a, const Tensor& b, const Tensor& out) {
  using torch::stable::detail::from;
  StableIValue stack[] = {from(a), from(torch::stable::transpose(b, 0, 1)), from(out)};
  const char* name = low_type(a) == Low::int8 ? "aten::_int_mm" : "aten::mm";
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "out", stack, TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // owns what the call returned
}

bool can_fuse(Low type) {
#ifndef FMKERNELS_ONLY_BASELINE
  if (type == Low::int8 && !__builtin_cpu_supports("avx512vnni")) return false;
#endif
  return knn_kernels<float>().fuses(type);
}

// For so many queries a matrix product takes longer to prepare than to compute; and for so many our own
// one is faster even where it is compared as it is made, but by one thread.
constexpr int64_t few_queries = 16, fewest_queries = 4;

// Searches a part of the bank: multiplies the queries' units with its shadow and updates what was
// found. Products are compared as they are made, if there are `vectors`, but those with the first
// rows, which tell the queries' first thresholds; the others are made `tile_rows` at a time in
// `products`. The arguments are documented at KnnPart.
void search_part(
    const Tensor& units, std::optional<Tensor> unit_scales, const Tensor& queries,
    const Tensor& query_norms, const Tensor& query_residuals, const Tensor& shadow,
    std::optional<Tensor> shadow_scales, const Tensor& rows, const Tensor& row_norms,
    std::optional<Tensor> row_residuals, int64_t first_row, std::string metric, bool rescored,
    double factor_rounding, std::optional<Tensor> floor, Tensor scores, Tensor indices,
    Tensor candidates, std::optional<Tensor> crowded, int64_t crowd, int64_t tile_rows,
    int64_t capacity, int64_t vectors, Tensor products) {
  const int64_t row_count = rows.size(0), dim = rows.size(1), query_count = queries.size(0);
  const int64_t k = scores.size(1);
  const Low type = low_type(products), shadow_type = low_type(shadow);
  const int64_t few_at_most = vectors == 0 ? few_queries : fewest_queries;
  const bool few =
      type == Low::float32 && (shadow_type != Low::float32 || query_count <= few_at_most);
  STD_TORCH_CHECK(
      low_type(units) == type && (few || shadow_type == type) &&
          (shadow_type == Low::int8) == shadow_scales.has_value() &&
          (type == Low::int8) == unit_scales.has_value() &&
          units.numel() == queries.numel() && shadow.numel() == rows.numel() &&
          row_norms.numel() == row_count && queries.size(1) == dim &&
          products.numel() >= query_count * tile_rows && tile_rows % knn_bucket == 0 &&
          capacity >= k + 64,
      "knn: products: expected room for every query and row of a tile of whole buckets");
  STD_TORCH_CHECK(
      vectors == 0 || few || can_fuse(type),
      "knn: no products of this type are compared as they are made on this machine");
  if (query_count == 0 || row_count == 0) return;
  const Metric parsed = parse_metric(metric);
  const double largest_residual = largest_finite(query_residuals);
  const KnnRows known{
      data_of<const double>(row_norms), data_or_null<const float>(row_residuals),
      data_or_null<const float>(shadow_scales)};
  const KnnErrors errors{
      parsed, rescored, static_cast<double>(dim), largest_residual, factor_rounding};
  const std::unique_ptr<KnnCandidate[]> pools(new KnnCandidate[query_count * capacity]);
  std::vector<KnnState> states(query_count);
  const Tensor wide = torch::stable::to(queries, ScalarType::Double);
  for_type(rows, [&](auto zero) {
    using T = decltype(zero);
    const KnnKernels<T>& kernels = knn_kernels<T>();
    const PartBounds bounds(kernels, known, row_count, errors);
    const KnnPart<T> part{
        parsed, rescored, rescored && shadow_type == Low::int8, dim, k, row_count, first_row,
        data_of<const T>(rows), data_of<const double>(row_norms), bounds.sigma.data(), bounds.slack.data(),
        bounds.half.data(), bounds.buckets.data(), bounds.scale, data_of<const double>(wide),
        data_of<const double>(query_norms), data_of<const float>(query_residuals), largest_residual,
        bounds.least_weight, data_or_null<const float>(unit_scales),
        data_or_null<const double>(floor),
        data_of<double>(scores), data_of<int64_t>(indices), data_of<int64_t>(candidates),
        data_or_null<bool>(crowded), crowd, capacity, pools.get(), states.data()};
    const size_t bytes = static_cast<size_t>(kernels.scratch_bytes(k, capacity, tile_rows));
    const auto for_queries = [&](const auto& run) {
      torch::stable::parallel_for(0, query_count, 4, [&](int64_t first, int64_t last) {
        run(first, last, ThreadScratch(bytes).memory());
      });
    };
    kernels.begin(part, 0, query_count);
    const auto is_open = [](const KnnState& state) { return state.threshold == -INFINITY; };
    const bool open = std::any_of(states.begin(), states.end(), is_open);
    const int64_t fused_from = few || vectors == 0 ? row_count : open ? tile_rows : 0;
    for (int64_t start = 0; start < std::min(row_count, fused_from); start += tile_rows) {
      const int64_t count = std::min(tile_rows, row_count - start);
      const Tensor out = torch::stable::view(
          torch::stable::narrow(products, 0, 0, query_count * count), {query_count, count});
      if (few) {
        torch::stable::parallel_for(0, count, rows_per_task, [&](int64_t first, int64_t last) {
          kernels.multiply_few(
              data_of<const float>(units), query_count, rows_of(shadow, start, count).data_ptr(),
              shadow_type, first, last, dim, count, data_of<float>(out));
        });
      } else {
        multiply(units, rows_of(shadow, start, count), out);
      }
      const KnnProducts tile{out.data_ptr(), type, start, count};
      for_queries([&](int64_t first, int64_t last, void* scratch) {
        kernels.collect(part, tile, first, last, scratch);
      });
    }
    if (fused_from < row_count) {
      const int most = static_cast<int>(std::min<int64_t>(vectors, kernels.most_vectors));
      const int64_t width = most * kernels.lanes;
      const int64_t groups = (query_count + width - 1) / width;
      torch::stable::parallel_for(0, groups, 1, [&](int64_t first, int64_t last) {
        first *= width;
        last = std::min(last * width, query_count);
        const int64_t needed = kernels.fused_bytes(part, type, last - first, most);
        const ThreadScratch scratch(static_cast<size_t>(needed));
        kernels.search_fused(
            part, units.data_ptr(), shadow.data_ptr(), type, fused_from, most, first, last,
            scratch.memory());
      });
    }
    for_queries([&](int64_t first, int64_t last, void* scratch) {
      kernels.finish(part, first, last, scratch);
    });
    return 0;
  });
}

}  // namespace
}  // namespace fmkernels

STABLE_TORCH_LIBRARY_IMPL(fmkernels, CPU, m) {
  m.impl("knn_norms", TORCH_BOX(&fmkernels::norms));
  m.impl("knn_shadow", TORCH_BOX(&fmkernels::shadow));
  m.impl("knn_search_part", TORCH_BOX(&fmkernels::search_part));
}
