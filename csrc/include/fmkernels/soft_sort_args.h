// What the kernels of the sort work on: plain data, shared by host and device.
#pragma once

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

}  // namespace fmkernels
