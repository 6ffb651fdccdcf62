// What the instruction-set builds of vera_matrices_kernel.cpp offer. Nothing in here may be inline,
// because all builds share it.
#pragma once

#include <cstdint>

namespace fmkernels {

// Rows [first, last) of a matrix of `columns` columns that begins at `matrix`; `stream` is the last
// number of the counter.
using VeraUniform = void (*)(
    uint64_t seed, uint32_t stream, int64_t first, int64_t last, int64_t columns, float* matrix);

#define FMKERNELS_DECLARE(isa)           \
  namespace isa {                        \
  extern const VeraUniform vera_uniform; \
  }
FMKERNELS_DECLARE(baseline)
FMKERNELS_DECLARE(avx2)
FMKERNELS_DECLARE(avx512)
#undef FMKERNELS_DECLARE

}  // namespace fmkernels
