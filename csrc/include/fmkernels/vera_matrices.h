// The entries of VeRA's shared matrices, from random words: uniform in (−√3, √3), of variance 1.
// fmkernels/ops/vera_matrices/reference.py says which word is that of an entry.
#pragma once

#include <cstdint>

#include "fmkernels/config.h"
#include "fmkernels/philox.h"
#include "fmkernels/simd.h"

FMKERNELS_NAMESPACE_BEGIN

// √3 / 2²⁴, rounded to float32.
constexpr float uniform_step = 0x1.bb67aep-24f;
constexpr int32_t uniform_steps = 1 << 24;

// The odd integer 2 (word div 2⁸) + 1 − 2²⁴, which float32 has, times the step: one rounding.
FMKERNELS_INLINE float uniform(uint32_t word) {
  return to_float(static_cast<int32_t>((word >> 7) | 1) - uniform_steps) * uniform_step;
}

#ifndef __CUDACC__

template <int W>
FMKERNELS_INLINE Vec<float, W> uniform(typename WordVec<4 * W>::Words words) {
  using Ints = typename Native<float, W>::Ints;
  const IntVec<float, W> odd{(Ints)((words >> 7) | 1) - uniform_steps};
  return to_float(odd) * Vec<float, W>(uniform_step);
}

#endif  // __CUDACC__

FMKERNELS_NAMESPACE_END
