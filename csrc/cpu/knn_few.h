// The products of a few queries, without a matrix product's preparations.
#pragma once

#include "fmkernels/knn.h"
#include "fmkernels/simd.h"
#include "knn_kernel.h"

FMKERNELS_NAMESPACE_BEGIN

#if defined(__AVX512F__)
constexpr int floats = 16;
#elif defined(__AVX2__)
constexpr int floats = 8;
#else
constexpr int floats = 4;
#endif
using Register = Vec<float, floats>;

FMKERNELS_INLINE Register load_wide(const float* memory) { return load<Register>(memory); }
FMKERNELS_INLINE Register load_wide(const int8_t* memory) {
  typedef int8_t Codes __attribute__((vector_size(floats)));
  Codes codes;
  __builtin_memcpy(&codes, memory, sizeof codes);
  return __builtin_convertvector(codes, Native<float, floats>::Values);
}
FMKERNELS_INLINE Register load_wide(const BFloat16* memory) {
  typedef uint16_t Halves __attribute__((vector_size(floats * sizeof(uint16_t))));
  Halves halves;
  __builtin_memcpy(&halves, memory, sizeof halves);
  const auto wide = __builtin_convertvector(halves, Native<float, floats>::Ints) << 16;
  return from_bits(IntVec<float, floats>{wide});
}

// The products of a unit with as many rows as a register has lanes, whose sums are then added up
// together.
template <class P>
FMKERNELS_INLINE void multiply_block(
    const float* unit, const P* rows, int64_t dim, float* products) {
  constexpr int parts = 4;
  const int64_t whole = dim / floats * floats;
  Register sums[floats];
  for (int row = 0; row < floats; ++row) {
    const P* numbers = rows + row * dim;
    Register sum[parts] = {Register(0.0f), Register(0.0f), Register(0.0f), Register(0.0f)};
    int64_t d = 0;
    for (; d + parts * floats <= whole; d += parts * floats) {
      for (int part = 0; part < parts; ++part) {
        const int64_t at = d + part * floats;
        sum[part] += load<Register>(unit + at) * load_wide(numbers + at);
      }
    }
    for (; d < whole; d += floats) sum[0] += load<Register>(unit + d) * load_wide(numbers + d);
    sums[row] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  }
  transpose(sums);
  for (int half = floats / 2; half > 0; half /= 2) {
    for (int row = 0; row < half; ++row) sums[row] += sums[row + half];
  }
  store(sums[0], products);
  for (int64_t d = whole; d < dim; ++d) {
    for (int row = 0; row < floats; ++row) products[row] += unit[d] * widen(rows[row * dim + d]);
  }
}

// The products of a few queries with rows [first, last), without a matrix product's preparations.
template <class P>
void multiply_rows(
    const float* units, int64_t queries, const P* shadow, int64_t first, int64_t last, int64_t dim,
    int64_t stride, float* products) {
  int64_t j = first;
  for (; j + floats <= last; j += floats) {
    for (int64_t q = 0; q < queries; ++q) {
      multiply_block(units + q * dim, shadow + j * dim, dim, products + q * stride + j);
    }
  }
  for (; j < last; ++j) {
    for (int64_t q = 0; q < queries; ++q) {
      float sum = 0;
      for (int64_t d = 0; d < dim; ++d) sum += units[q * dim + d] * widen(shadow[j * dim + d]);
      products[q * stride + j] = sum;
    }
  }
}

FMKERNELS_NAMESPACE_END
