// What the instruction-set builds of vera_product_kernel.cpp offer: products of bfloat16 with sums
// in float32. Plain data and functions of raw pointers: nothing in here may be inline, because all
// builds share it.
//
// A number of bfloat16 is its bits. What is summed over lies in pairs of them, as the instruction
// takes them: those of the right factor (panels of 64 columns, pairs, 64); those of the left are
// packed for a strip of tiles when its turn comes. What is not there is 0.
#pragma once

#include <cstdint>

namespace fmkernels {

constexpr int vera_tile_rows = 6, vera_tile_columns = 64;
// words of a strip: 16 tiles and 512 pairs, which with the right factor's stay in the level-2 cache
constexpr int64_t vera_strip_tiles = 16, vera_strip_pairs = 512;
constexpr int64_t vera_strip_words = vera_strip_tiles * vera_tile_rows * vera_strip_pairs;

struct VeraProductKernels {
  // whether this build has the instruction; whether the machine does is asked at run time
  bool there;
  // pairs [first, last) of the rows of x (inner, width)
  void (*pack_right)(
      const uint16_t* x, int64_t inner, int64_t width, int64_t first, int64_t last,
      uint32_t* packed);
  // pairs [first, last) along the rows of x (count, inner)
  void (*pack_right_of_rows)(
      const uint16_t* x, int64_t count, int64_t inner, int64_t first, int64_t last,
      uint32_t* packed);
  // tiles [first, last) of gᵀ right, (tiles · 6, stride), of g (inner, width)
  void (*sum_of_outer)(
      const uint16_t* g, const uint32_t* right, int64_t inner, int64_t width, int64_t stride,
      int64_t first, int64_t last, uint32_t* strip, float* result);
  // tiles [first, last) of s right, of s (count, inner), which counts as two numbers of bfloat16
  void (*product_of_rows)(
      const float* s, const uint32_t* right, int64_t count, int64_t inner, int64_t stride,
      int64_t first, int64_t last, uint32_t* strip, float* result);
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
