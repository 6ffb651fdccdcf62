// What the instruction-set builds of soft_sort_kernel.cpp offer. Plain data and functions of raw
// pointers: nothing in here may be inline, because all builds share it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "fmkernels/sorting_plan.h"

namespace fmkernels {

template <class T>
struct SoftSortArgs {
  SortingPlan plan;
  Distribution distribution;
  T steepness, art_lambda;
  int64_t queries;
  const T* scores;  // (queries, n)
};

template <class T>
struct SoftSortForward {
  SoftSortArgs<T> sort;
  T* values;       // (queries, n)
  T* permutation;  // (queries, n, n)
};

template <class T>
struct SoftSortBackward {
  SoftSortArgs<T> sort;
  const T* grad_values;       // (queries, n) or null
  const T* grad_permutation;  // (queries, n, n) or null
  T* grad_scores;             // (queries, n)
};

template <class T>
struct CrossEntropyForward {
  SoftSortArgs<T> sort;  // of the student
  const T* teacher;      // (queries, n)
  T teacher_steepness;
  const T* mask;         // (queries) or null: factor of the query's loss and gradient
  T scale;               // another one, the same for all
  T* losses;             // (queries)
  T* grad_student;       // (queries, n) or null
};

// Each kernel works on groups [first, last) of `lanes` queries; the scratch has scratch_bytes(plan),
// aligned to 64.
template <class T>
struct SoftSortKernels {
  int lanes;
  size_t (*scratch_bytes)(const SortingPlan&);
  void (*forward)(const SoftSortForward<T>&, int64_t first, int64_t last, void* scratch);
  void (*backward)(const SoftSortBackward<T>&, int64_t first, int64_t last, void* scratch);
  void (*cross_entropy)(const CrossEntropyForward<T>&, int64_t first, int64_t last, void* scratch);
};

#define FMKERNELS_DECLARE(isa)                          \
  namespace isa {                                       \
  extern const SoftSortKernels<float> soft_sort_f32;    \
  extern const SoftSortKernels<double> soft_sort_f64;   \
  }
FMKERNELS_DECLARE(baseline)
FMKERNELS_DECLARE(avx2)
FMKERNELS_DECLARE(avx512)
#undef FMKERNELS_DECLARE

}  // namespace fmkernels
