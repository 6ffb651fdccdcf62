// What the instruction-set builds of soft_sort_kernel.cpp offer. Plain data and functions of raw
// pointers: nothing in here may be inline, because all builds share it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "fmkernels/soft_sort_args.h"

namespace fmkernels {

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
