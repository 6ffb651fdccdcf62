// Products of bfloat16 whose sums stay in float32, which PyTorch's products on a CPU round to
// bfloat16: M = Gᵀ U is contracted with random signs, and where G and U have a mean little is left
// of it. A tile of 6 rows and 64 columns is in registers; all that is read lies in a row.
#include "vera_product_kernel.h"

#include "fmkernels/bfloat16.h"
#include "fmkernels/config.h"

FMKERNELS_NAMESPACE_BEGIN

namespace {

constexpr int rows = vera_tile_rows, columns = vera_tile_columns;
constexpr int64_t chunk = 16;  // pairs whose rows are packed together

FMKERNELS_INLINE uint32_t pair(uint16_t low, uint16_t high) {
  return low | static_cast<uint32_t>(high) << 16;
}

FMKERNELS_INLINE uint16_t rounded(float value) {
  BFloat16 narrowed;
  narrow(value, narrowed);
  return narrowed.bits;
}

// The first `count` numbers of rows 2 p and 2 p + 1 of x (inner, …), side by side.
FMKERNELS_INLINE void pair_row(
    const uint16_t* x, int64_t inner, int64_t width, int64_t p, int64_t count, uint32_t* pairs) {
  const uint16_t *low = x + 2 * p * width, *high = low + width;
  if (2 * p + 1 < inner) {
#pragma omp simd
    for (int64_t k = 0; k < count; ++k) pairs[k] = pair(low[k], high[k]);
  } else {
    for (int64_t k = 0; k < count; ++k) pairs[k] = low[k];
  }
}

// Pairs [first, last) of rows of x (inner, width), a tile after the other: by strips of a few pairs
// and tiles, which are paired along the rows and then handed to their tiles in pieces.
void pack_left(
    const uint16_t* x, int64_t inner, int64_t width, int64_t pairs, int64_t first, int64_t last,
    uint32_t* packed) {
  constexpr int64_t strip = 16 * rows;
  uint32_t paired[chunk][strip];
  for (int64_t start = first; start < last; start += chunk) {
    const int64_t count = last - start < chunk ? last - start : chunk;
    for (int64_t column = 0; column < width; column += strip) {
      const int64_t some = width - column < strip ? width - column : strip;
      for (int64_t p = 0; p < count; ++p) {
        pair_row(x + column, inner, width, start + p, some, paired[p]);
        for (int64_t k = some; k % rows != 0; ++k) paired[p][k] = 0;
      }
      for (int64_t k = 0; k < some; k += rows) {
        uint32_t* to = packed + (column + k) * pairs + start * rows;
        for (int64_t p = 0; p < count; ++p) {
          __builtin_memcpy(to + p * rows, paired[p] + k, rows * sizeof(uint32_t));
        }
      }
    }
  }
}

void pack_right(
    const uint16_t* x, int64_t inner, int64_t width, int64_t stride, int64_t first, int64_t last,
    uint32_t* packed) {
  for (int64_t p = first; p < last; ++p) {
    uint32_t* to = packed + p * stride;
    pair_row(x, inner, width, p, width, to);
    for (int64_t k = width; k < stride; ++k) to[k] = 0;
  }
}

// Tiles [first, last) of rows of s (count, inner), as what bfloat16 keeps of them and, with as
// many pairs again, what it loses.
void split_left(
    const float* s, int64_t count, int64_t inner, int64_t pairs, int64_t first, int64_t last,
    uint32_t* packed) {
  for (int64_t i = first * rows; i < last * rows; ++i) {
    uint32_t* to = packed + i / rows * 2 * pairs * rows + i % rows;
    for (int64_t p = 0; p < pairs; ++p) {
      uint16_t high[2] = {}, low[2] = {};
      for (int half = 0; half < 2; ++half) {
        const int64_t j = 2 * p + half;
        if (i >= count || j >= inner) continue;
        const float value = s[i * inner + j];
        high[half] = rounded(value);
        low[half] = rounded(value - widen(BFloat16{high[half]}));
      }
      to[p * rows] = pair(high[0], high[1]);
      to[(pairs + p) * rows] = pair(low[0], low[1]);
    }
  }
}

// Pairs [first, last) along the rows of x (count, inner), twice.
void pack_right_of_rows(
    const uint16_t* x, int64_t count, int64_t inner, int64_t stride, int64_t pairs, int64_t first,
    int64_t last, uint32_t* packed) {
  for (int64_t p = first; p < last; ++p) {
    uint32_t *to = packed + p * stride, *again = packed + (pairs + p) * stride;
    for (int64_t k = 0; k < count; ++k) {
      const uint16_t* from = x + k * inner + 2 * p;
      to[k] = again[k] = pair(from[0], 2 * p + 1 < inner ? from[1] : 0);
    }
    for (int64_t k = count; k < stride; ++k) to[k] = again[k] = 0;
  }
}

#if defined(__AVX512BW__)

typedef float Sums __attribute__((vector_size(64)));
typedef uint32_t Pairs __attribute__((vector_size(64)));
typedef float SumsInMemory __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t PairsInMemory __attribute__((vector_size(64), aligned(4), may_alias));

// By its name: this file is compiled for machines that lack it, too, where nobody asks for it.
FMKERNELS_INLINE Sums add(Sums sums, Pairs a, Pairs b) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sums) : "v"(a), "v"(b));
  return sums;
}

void multiply_tile(
    const uint32_t* left, const uint32_t* right, int64_t stride, int64_t pairs, bool more,
    float* result, int64_t result_stride) {
  constexpr int vectors = columns / 16;
  Sums sums[rows][vectors];
  for (int i = 0; i < rows; ++i) {
    for (int v = 0; v < vectors; ++v) {
      const auto* before =
          reinterpret_cast<const SumsInMemory*>(result + i * result_stride + 16 * v);
      sums[i][v] = more ? *before : Sums{};
    }
  }
  for (int64_t p = 0; p < pairs; ++p) {
    Pairs of_columns[vectors];
    for (int v = 0; v < vectors; ++v) {
      of_columns[v] = *reinterpret_cast<const PairsInMemory*>(right + p * stride + 16 * v);
    }
    for (int i = 0; i < rows; ++i) {
      const Pairs of_row = Pairs{} + left[p * rows + i];
      for (int v = 0; v < vectors; ++v) {
        sums[i][v] = add(sums[i][v], of_row, of_columns[v]);
      }
    }
  }
  for (int i = 0; i < rows; ++i) {
    for (int v = 0; v < vectors; ++v) {
      *reinterpret_cast<SumsInMemory*>(result + i * result_stride + 16 * v) = sums[i][v];
    }
  }
}

constexpr bool there = true;

#else

void multiply_tile(
    const uint32_t*, const uint32_t*, int64_t, int64_t, bool, float*, int64_t) {}

constexpr bool there = false;

#endif

// Pairs whose 64 columns stay in the level-2 cache.
constexpr int64_t block = 1024;

void multiply(
    const uint32_t* left, const uint32_t* right, int64_t pairs, int64_t stride, int64_t first,
    int64_t last, float* result) {
  for (int64_t start = 0; start < pairs; start += block) {
    const int64_t some = pairs - start < block ? pairs - start : block;
    for (int64_t k = 0; k < stride; k += columns) {
      for (int64_t tile = first; tile < last; ++tile) {
        multiply_tile(
            left + (tile * pairs + start) * rows, right + start * stride + k, stride, some,
            start > 0, result + tile * rows * stride + k, stride);
      }
    }
  }
}

}  // namespace

extern const VeraProductKernels vera_products = {
    there, pack_left, pack_right, split_left, pack_right_of_rows, multiply};

FMKERNELS_NAMESPACE_END
