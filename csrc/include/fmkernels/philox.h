// Philox4x32-10, the counter-based generator of every random matrix; what is drawn at which counter
// is documented in fmkernels/ops/project_gradients/philox.py. A word is a uint32_t, or a register
// of them.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__) && !defined(__CUDACC__)
#include <immintrin.h>
#endif

#include "fmkernels/config.h"

FMKERNELS_NAMESPACE_BEGIN

// The streams, and the bits that one counter gives.
enum : uint32_t { dense_stream = 1, sketch_stream, shift_stream, left_stream, right_stream };
constexpr int group_bits = 128;

struct PhiloxKey {
  uint32_t low, high;
};

// The high and the low word of a product.
FMKERNELS_INLINE void multiply(uint32_t a, uint32_t b, uint32_t& high, uint32_t& low) {
  const uint64_t product = static_cast<uint64_t>(a) * b;
  high = static_cast<uint32_t>(product >> 32);
  low = static_cast<uint32_t>(product);
}

#ifndef __CUDACC__

// A register of `bytes` bytes, as words and as pairs of words.
template <int bytes>
struct WordVec;
#define FMKERNELS_WORDS(bytes)                                            \
  template <>                                                             \
  struct WordVec<bytes> {                                                 \
    typedef uint32_t Words __attribute__((vector_size(bytes)));           \
    typedef uint64_t Pairs __attribute__((vector_size(bytes)));           \
  };
FMKERNELS_WORDS(16)
FMKERNELS_WORDS(32)
FMKERNELS_WORDS(64)
#undef FMKERNELS_WORDS

// The lower words of the pairs, times a word.
template <class Pairs>
FMKERNELS_INLINE Pairs multiply_low(Pairs a, uint32_t b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Pairs) == 64) {
    // without the mask gcc 12 warns of a register that it leaves undefined on purpose
    return (Pairs)_mm512_maskz_mul_epu32(0xff, (__m512i)a, _mm512_set1_epi64(b));
  }
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(Pairs) == 32) {
    return (Pairs)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
  }
#endif
#if defined(__SSE2__)
  if constexpr (sizeof(Pairs) == 16) {
    return (Pairs)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
  }
#endif
  return (a & 0xffffffffu) * static_cast<uint64_t>(b);
}

template <class Words>
FMKERNELS_INLINE void multiply(Words a, uint32_t b, Words& high, Words& low) {
  using Pairs = typename WordVec<sizeof(Words)>::Pairs;
  constexpr uint64_t lower = 0xffffffffu;
  const Pairs pairs = (Pairs)a;
  const Pairs even = multiply_low(pairs, b), odd = multiply_low(pairs >> 32, b);
  high = (Words)((even >> 32) | (odd & ~lower));
  low = (Words)((even & lower) | (odd << 32));
}

#endif  // __CUDACC__

// Four words for each of several counters, which wait for their own products only.
template <class Word, int count>
FMKERNELS_INLINE void philox(PhiloxKey key, Word (&x)[count][4]) {
  for (int round = 0; round < 10; ++round) {
    for (int n = 0; n < count; ++n) {
      Word high0, low0, high1, low1;
      multiply(x[n][0], 0xD2511F53u, high0, low0);
      multiply(x[n][2], 0xCD9E8D57u, high1, low1);
      x[n][0] = high1 ^ x[n][1] ^ key.low;
      x[n][1] = low1;
      x[n][2] = high0 ^ x[n][3] ^ key.high;
      x[n][3] = low0;
    }
    key.low += 0x9E3779B9u;
    key.high += 0xBB67AE85u;
  }
}

FMKERNELS_NAMESPACE_END
