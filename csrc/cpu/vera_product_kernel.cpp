// Products of bfloat16 whose sums stay in float32, which PyTorch's products on a CPU round to
// bfloat16: M = Gᵀ U is contracted with random signs, and where G and U have a mean little is left
// of it. A tile of 6 rows and 64 columns is in registers; all that is read lies in a row.
#include "vera_product_kernel.h"

#include "fmkernels/bfloat16.h"
#include "fmkernels/config.h"

FMKERNELS_NAMESPACE_BEGIN

namespace {

constexpr int rows = vera_tile_rows, columns = vera_tile_columns;
constexpr int64_t strip_tiles = vera_strip_tiles, strip_pairs = vera_strip_pairs;

FMKERNELS_INLINE uint32_t pair(uint16_t low, uint16_t high) {
  return low | static_cast<uint32_t>(high) << 16;
}

FMKERNELS_INLINE uint16_t rounded(float value) {
  BFloat16 narrowed;
  narrow(value, narrowed);
  return narrowed.bits;
}

FMKERNELS_INLINE int64_t less(int64_t a, int64_t b) { return a < b ? a : b; }

// The first `count` numbers of rows 2 p and 2 p + 1 of `inner`, side by side.
FMKERNELS_INLINE void pair_rows(
    const uint16_t* x, int64_t inner, int64_t stride, int64_t p, int64_t count, uint32_t* pairs) {
  const uint16_t *low = x + 2 * p * stride, *high = low + stride;
  if (2 * p + 1 < inner) {
#pragma omp simd
    for (int64_t k = 0; k < count; ++k) pairs[k] = pair(low[k], high[k]);
  } else {
    for (int64_t k = 0; k < count; ++k) pairs[k] = low[k];
  }
}

void pack_right(
    const uint16_t* x, int64_t inner, int64_t width, int64_t first, int64_t last,
    uint32_t* packed) {
  const int64_t pairs = (inner + 1) / 2;
  for (int64_t start = 0; start < width; start += columns) {
    const int64_t some = less(columns, width - start);
    for (int64_t p = first; p < last; ++p) {
      uint32_t* to = packed + start * pairs + p * columns;
      pair_rows(x + start, inner, width, p, some, to);
      for (int64_t k = some; k < columns; ++k) to[k] = 0;
    }
  }
}

void pack_right_of_rows(
    const uint16_t* x, int64_t count, int64_t inner, int64_t first, int64_t last,
    uint32_t* packed) {
  const int64_t pairs = (inner + 1) / 2;
  for (int64_t start = 0; start < count; start += columns) {
    const int64_t some = less(columns, count - start);
    for (int64_t p = first; p < last; ++p) {
      uint32_t* to = packed + start * pairs + p * columns;
      const uint16_t* from = x + start * inner + 2 * p;
      const bool whole = 2 * p + 1 < inner;
      for (int64_t k = 0; k < some; ++k, from += inner) to[k] = pair(from[0], whole ? from[1] : 0);
      for (int64_t k = some; k < columns; ++k) to[k] = 0;
    }
  }
}

// Pairs [first, last) of the columns that tiles [tile, end) of gᵀ have: (tiles, pairs, 6). They are
// paired along the rows of g and then handed to their tiles in pieces, a few rows at a time.
FMKERNELS_INLINE void pack_columns(
    const uint16_t* g, int64_t inner, int64_t width, int64_t tile, int64_t end, int64_t first,
    int64_t last, uint32_t* strip) {
  constexpr int64_t chunk = 16;
  uint32_t paired[chunk][strip_tiles * rows];
  const int64_t some = less(width, end * rows) - tile * rows;
  for (int64_t start = first; start < last; start += chunk) {
    const int64_t count = less(chunk, last - start);
    for (int64_t p = 0; p < count; ++p) {
      pair_rows(g + tile * rows, inner, width, start + p, some, paired[p]);
      for (int64_t k = some; k % rows != 0; ++k) paired[p][k] = 0;
    }
    for (int64_t t = 0; t < end - tile; ++t) {
      uint32_t* to = strip + (t * (last - first) + start - first) * rows;
      for (int64_t p = 0; p < count; ++p) {
        __builtin_memcpy(to + p * rows, paired[p] + t * rows, rows * sizeof(uint32_t));
      }
    }
  }
}

// Pairs [first, last) along the rows that tiles [tile, end) of s have: what bfloat16 keeps of each
// number, or what it loses.
FMKERNELS_INLINE void split_rows(
    const float* s, int64_t count, int64_t inner, bool lost, int64_t tile, int64_t end,
    int64_t first, int64_t last, uint32_t* strip) {
  const int64_t some = less(inner, 2 * last) - 2 * first;
  for (int64_t i = tile * rows; i < end * rows; ++i) {
    uint16_t parts[2 * strip_pairs] = {};
    if (i < count) {
      const float* from = s + i * inner + 2 * first;
#pragma omp simd
      for (int64_t j = 0; j < some; ++j) {
        const uint16_t kept = rounded(from[j]);
        parts[j] = lost ? rounded(from[j] - widen(BFloat16{kept})) : kept;
      }
    }
    uint32_t* to = strip + (i / rows - tile) * (last - first) * rows + i % rows;
    for (int64_t p = 0; p < last - first; ++p) {
      to[p * rows] = pair(parts[2 * p], parts[2 * p + 1]);
    }
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
    const uint32_t* left, const uint32_t* right, int64_t pairs, bool more, float* result,
    int64_t stride) {
  constexpr int vectors = columns / 16;
  Sums sums[rows][vectors];
  for (int i = 0; i < rows; ++i) {
    for (int v = 0; v < vectors; ++v) {
      const auto* before = reinterpret_cast<const SumsInMemory*>(result + i * stride + 16 * v);
      sums[i][v] = more ? *before : Sums{};
    }
  }
  for (int64_t p = 0; p < pairs; ++p) {
    Pairs of_columns[vectors];
    for (int v = 0; v < vectors; ++v) {
      of_columns[v] = *reinterpret_cast<const PairsInMemory*>(right + p * columns + 16 * v);
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
      *reinterpret_cast<SumsInMemory*>(result + i * stride + 16 * v) = sums[i][v];
    }
  }
}

constexpr bool there = true;

#else

void multiply_tile(const uint32_t*, const uint32_t*, int64_t, bool, float*, int64_t) {}

constexpr bool there = false;

#endif

// Adds to tiles [first, last) the product of what `pack` gives of the left factor, or begins them.
template <class Pack>
void multiply(
    const Pack& pack, const uint32_t* right, int64_t pairs, int64_t stride, int64_t first,
    int64_t last, bool more, uint32_t* strip, float* result) {
  int64_t start = 0;
  do {  // once at least: an empty sum is 0
    const int64_t some = less(strip_pairs, pairs - start);
    for (int64_t tile = first; tile < last; tile += strip_tiles) {
      const int64_t end = less(last, tile + strip_tiles);
      pack(tile, end, start, start + some, strip);
      for (int64_t k = 0; k < stride; k += columns) {
        for (int64_t t = tile; t < end; ++t) {
          multiply_tile(
              strip + (t - tile) * some * rows, right + k * pairs + start * columns, some, more,
              result + t * rows * stride + k, stride);
        }
      }
    }
    start += strip_pairs;
    more = true;
  } while (start < pairs);
}

void sum_of_outer(
    const uint16_t* g, const uint32_t* right, int64_t inner, int64_t width, int64_t stride,
    int64_t first, int64_t last, uint32_t* strip, float* result) {
  const auto pack = [&](int64_t tile, int64_t end, int64_t from, int64_t to, uint32_t* packed) {
    pack_columns(g, inner, width, tile, end, from, to, packed);
  };
  multiply(pack, right, (inner + 1) / 2, stride, first, last, false, strip, result);
}

void product_of_rows(
    const float* s, const uint32_t* right, int64_t count, int64_t inner, int64_t stride,
    int64_t first, int64_t last, uint32_t* strip, float* result) {
  for (int part = 0; part < 2; ++part) {
    const bool lost = part == 1;
    const auto pack = [&](int64_t tile, int64_t end, int64_t from, int64_t to, uint32_t* packed) {
      split_rows(s, count, inner, lost, tile, end, from, to, packed);
    };
    multiply(pack, right, (inner + 1) / 2, stride, first, last, lost, strip, result);
  }
}

}  // namespace

extern const VeraProductKernels vera_products = {
    there, pack_right, pack_right_of_rows, sum_of_outer, product_of_rows};

FMKERNELS_NAMESPACE_END
