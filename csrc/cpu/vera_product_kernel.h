// What the instruction-set builds of vera_product_kernel.cpp offer: products of bfloat16 with sums
// in float32. Plain data and functions of raw pointers: nothing in here may be inline, because all
// builds share it.
//
// A number of bfloat16 is its bits. What is summed over lies in pairs of them, as the instruction
// takes them: those of the left factor (tiles of 6 rows, pairs, 6), of the right (pairs, stride), a
// multiple of 64 columns. What is not there is 0.
#pragma once

#include <cstdint>

namespace fmkernels {

constexpr int vera_tile_rows = 6, vera_tile_columns = 64;

struct VeraProductKernels {
  // whether this build has the instruction; whether the machine does is asked at run time
  bool there;
  // x (inner, width), of which pairs [first, last) of rows are packed
  void (*pack_left)(
      const uint16_t* x, int64_t inner, int64_t width, int64_t pairs, int64_t first, int64_t last,
      uint32_t* packed);
  void (*pack_right)(
      const uint16_t* x, int64_t inner, int64_t width, int64_t stride, int64_t first,
      int64_t last, uint32_t* packed);
  // tiles [first, last) of s (count, inner) in float32, as two numbers each: twice as many pairs
  void (*split_left)(
      const float* s, int64_t count, int64_t inner, int64_t pairs, int64_t first, int64_t last,
      uint32_t* packed);
  // x (count, inner), of which pairs [first, last) along the rows are packed, twice
  void (*pack_right_of_rows)(
      const uint16_t* x, int64_t count, int64_t inner, int64_t stride, int64_t pairs,
      int64_t first, int64_t last, uint32_t* packed);
  // tiles [first, last) of the result (tiles · 6, stride)
  void (*multiply)(
      const uint32_t* left, const uint32_t* right, int64_t pairs, int64_t stride, int64_t first,
      int64_t last, float* result);
};

#define FMKERNELS_DECLARE(isa)                       \
  namespace isa {                                    \
  extern const VeraProductKernels vera_products;     \
  }
FMKERNELS_DECLARE(baseline)
FMKERNELS_DECLARE(avx2)
FMKERNELS_DECLARE(avx512)
#undef FMKERNELS_DECLARE

}  // namespace fmkernels
