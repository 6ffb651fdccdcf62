// What soft_sort and soft_sort_cross_entropy share: settings, cached plans, the parallel loop.
#pragma once

#include <string>

#include "cpu_isa.h"
#include "scratch.h"
#include "soft_sort_kernel.h"
#include "tensors.h"

namespace fmkernels {

// Longer rows go to the reference op: the working memory of a thread grows with the comparators.
constexpr int64_t max_kernel_size = 1024;
inline bool exceeds_kernel(const Tensor& scores) {
  STD_TORCH_CHECK(
      scores.dim() > 0 && scores.size(-1) > 0, "soft_sort: scores: expected shape (..., n >= 1)");
  return scores.size(-1) > max_kernel_size;
}

// The plan of a network, built once per process. Throws for an unknown name.
const SortingPlan& sorting_plan(const std::string& network, int64_t n);

Distribution parse_distribution(const std::string& name);

template <class T>
const SoftSortKernels<T>& soft_sort_kernels();
template <>
inline const SoftSortKernels<float>& soft_sort_kernels<float>() {
  return FMKERNELS_FOR_CPU_ISA(soft_sort_f32);
}
template <>
inline const SoftSortKernels<double>& soft_sort_kernels<double>() {
  return FMKERNELS_FOR_CPU_ISA(soft_sort_f64);
}

template <class T>
SoftSortArgs<T> soft_sort_args(
    const Tensor& scores, double steepness, const std::string& network,
    const std::string& distribution, double art_lambda) {
  const int64_t n = scores.size(-1);
  return {
      sorting_plan(network, n),    parse_distribution(distribution),
      static_cast<T>(steepness),   static_cast<T>(art_lambda),
      scores.numel() / n,          data_of<const T>(scores)};
}

// The public functions check this in words; here it guards the memory of whoever calls the op itself.
inline void check_count(const char* argument, const Tensor& tensor, int64_t expected) {
  STD_TORCH_CHECK(
      tensor.numel() == expected, "soft_sort: ", argument, ": expected ", expected,
      " elements, got ", tensor.numel());
}

// Runs one of the kernels over all groups of queries.
template <class T, class Args>
void for_query_groups(
    void (*SoftSortKernels<T>::*kernel)(const Args&, int64_t, int64_t, void*), const Args& args,
    const SoftSortArgs<T>& sort) {
  const SoftSortKernels<T>& kernels = soft_sort_kernels<T>();
  const int64_t groups = (sort.queries + kernels.lanes - 1) / kernels.lanes;
  if (groups == 0) return;
  const size_t bytes = kernels.scratch_bytes(sort.plan);
  const auto run = [&](int64_t first, int64_t last) {
    (kernels.*kernel)(args, first, last, ThreadScratch(bytes).memory());
  };
  if (groups == 1) return run(0, 1);
  // a group of small n takes less time than waking a thread does: about 10 ns per comparator and
  // pair of rows, against some 20 µs
  const int64_t work = int64_t{sort.plan.comparator_count} * sort.plan.size / 2 + 1;
  torch::stable::parallel_for(0, groups, 1 + 4000 / work, run);
}

}  // namespace fmkernels
