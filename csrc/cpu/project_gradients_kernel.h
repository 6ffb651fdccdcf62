// What the instruction-set builds of project_gradients_kernel.cpp offer. Plain data and functions
// of raw pointers: nothing in here may be inline, because all builds share it.
#pragma once

#include <cstdint>

namespace fmkernels {

enum class Kind : int { count_sketch, rademacher, khatri_rao, kronecker };

// Rows that are projected together, in one pass over the random matrix; also the most samples.
constexpr int64_t projection_group = 32;

// `samples` samples with the rows from offsets[b] to offsets[b + 1], in groups: several short ones,
// or one of any length.
template <class T>
struct ProjectionArgs {
  Kind kind;
  int64_t out, in, dim, left;  // left: rows of a Kronecker product's left factor
  bool bias;
  double scale;
  uint32_t key_low, key_high, layer;
  int64_t repeats;
  const uint32_t* packed;      // (dim, words) of a given matrix, or null
  const T* delta;              // (rows, out)
  const T* a;                  // (rows, in)
  const int64_t* offsets;      // (samples + 1)
  const int64_t* groups;       // (group_count + 1), the samples that they begin with
  int32_t* delta_exponents;    // (samples)
  int32_t* exponents;          // (samples)
  float* result;               // (samples, dim)
};

template <class T>
struct ProjectionKernels {
  // the exponents of samples [first, last)
  void (*measure)(const ProjectionArgs<T>&, int64_t first, int64_t last);
  // parts of the result of one group that are computed one by one, and what each takes
  int64_t (*tiles)(const ProjectionArgs<T>&);
  int64_t (*scratch_bytes)(const ProjectionArgs<T>&);
  // tasks [first, last), of which task t is tile t mod tiles of group t div tiles
  void (*project)(const ProjectionArgs<T>&, int64_t first, int64_t last, void* scratch);
};

#define FMKERNELS_DECLARE(isa)                                \
  namespace isa {                                             \
  extern const ProjectionKernels<float> projections_f32;      \
  extern const ProjectionKernels<double> projections_f64;     \
  }
FMKERNELS_DECLARE(baseline)
FMKERNELS_DECLARE(avx2)
FMKERNELS_DECLARE(avx512)
#undef FMKERNELS_DECLARE

}  // namespace fmkernels
