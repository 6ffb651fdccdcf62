// What the instruction-set builds of vera_kernel.cpp offer: what VeRA does beside matrix products.
// Plain data and functions of raw pointers: nothing in here may be inline, because all builds share
// it.
#pragma once

#include <cstdint>

namespace fmkernels {


// That one thread adds up in one go, so that sums do not depend on the threads.
constexpr int64_t vera_rows_of_a_part = 64;

// T is float, or uint16_t for the bits of a bfloat16. `ids` is null for one adapter, or has the adapter of each row: −1 for none.
template <class T>
struct VeraKernels {
  // rows [first, last) of x (rows, width), each times its adapter's vector (adapters, width)
  void (*scale_rows)(
      const T* x, const float* vectors, const int64_t* ids, int64_t first, int64_t last,
      int64_t width, T* result);
  // base + z times the vector
  void (*add_scaled)(
      const T* base, const T* z, const float* vectors, const int64_t* ids, int64_t first,
      int64_t last, int64_t width, T* result);
  // columns [first, last) of the sums (adapters, width) of x ⊙ y over the rows of each adapter
  void (*sum_rows)(
      const T* x, const T* y, const int64_t* ids, int64_t rows, int64_t first, int64_t last,
      int64_t width, int64_t adapters, double* sums, float* result);
  // rows [first, last) of diag(b) B diag(d) (rows, rank)
  void (*scale_matrix)(
      const T* B, const float* d, const float* b, int64_t first, int64_t last, int64_t rank,
      T* result);
  // of rows [first, last): (B ⊙ M) d, and the sum of b ⊙ (B ⊙ M)
  void (*contract)(
      const float* M, const T* B, const float* d, const float* b, int64_t first, int64_t last,
      int64_t rank, float* grad_b, double* grad_d);
  // rows [first, last) of x (rows, width), zero or times `scale`
  void (*drop)(
      const T* x, uint64_t seed, uint64_t threshold, float scale, int64_t first, int64_t last,
      int64_t width, T* result);
};

#define FMKERNELS_DECLARE(isa)                              \
  namespace isa {                                           \
  extern const VeraKernels<float> vera_f32;                 \
  extern const VeraKernels<uint16_t> vera_bf16;             \
  }
FMKERNELS_DECLARE(baseline)
FMKERNELS_DECLARE(avx2)
FMKERNELS_DECLARE(avx512)
#undef FMKERNELS_DECLARE

}  // namespace fmkernels
