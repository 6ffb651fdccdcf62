// Drawing the random signs of the projections, and sums of values with them: included by
// project_gradients_kernel.cpp alone, once per instruction set.
#pragma once

#include "fmkernels/project_gradients.h"

FMKERNELS_NAMESPACE_BEGIN
namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
using V = Vec<float, W>;
using Words = WordVec<4 * W>::Words;

constexpr int parts = 32 / W;  // registers for the signs of a word
constexpr int64_t drawn = 16;  // counters that are drawn at once, outputs that are summed together
constexpr int nibbles = 8;     // of a word: groups of four signs, that choose one of 16 sums

// 16 counters, of which one number goes up by one each: word w of counter n is to be put at
// words[w · stride + n].
struct Draw {
  uint32_t start[4];
  uint32_t* words;
};

// Draws some at once: one alone would mostly wait for its own products.
template <int count>
void draw(PhiloxKey key, int rising, int64_t stride, const Draw (&draws)[count]) {
  Words lanes{};
  for (int lane = 0; lane < W; ++lane) lanes[lane] = lane;
  for (uint32_t first = 0; first < drawn; first += W) {
    Words x[count][4];
    for (int n = 0; n < count; ++n) {
      for (int d = 0; d < 4; ++d) x[n][d] = Words{} + draws[n].start[d];
      x[n][rising] += lanes + first;
    }
    philox(key, x);
    for (int n = 0; n < count; ++n) {
      for (int w = 0; w < 4; ++w) {
        memcpy(draws[n].words + w * stride + first, &x[n][w], sizeof x[n][w]);
      }
    }
  }
}

FMKERNELS_INLINE void add_to(double* sums, V values) {
  float lanes[W];
  store(values, lanes);
#pragma omp simd
  for (int lane = 0; lane < W; ++lane) sums[lane] += static_cast<double>(lanes[lane]);
}

// Signs of 16 outputs for some rows of the matrix: word w of output k at words[w · 16 + k], of the
// next row `row_stride` further.
struct SignRows {
  const uint32_t* words;
  int64_t row_stride, rows, row_words;
};

// sums[n][k] += Σ_row coefficient[n][row] (Σ_j ±x[n][j]) for 16 outputs k, some at a time, and for
// vectors x that share the signs.
template <int count>
void add_signed(
    const SignRows& signs, const float* const (&x)[count],
    const float* const (&coefficient)[count], double* const (&sums)[count]) {
  constexpr int outputs = W == 16 ? 8 : 4;
  for (int64_t first = 0; first < drawn; first += outputs) {
    V of_rows[count][outputs];
    for (int n = 0; n < count; ++n) {
      for (int k = 0; k < outputs; ++k) of_rows[n][k] = V(0.0f);
    }
    for (int64_t row = 0; row < signs.rows; ++row) {
      const uint32_t* const words = signs.words + row * signs.row_stride + first;
      V total[count][outputs];
      for (int n = 0; n < count; ++n) {
        for (int k = 0; k < outputs; ++k) total[n][k] = V(0.0f);
      }
      for (int64_t w = 0; w < signs.row_words; ++w) {
        for (int part = 0; part < parts; ++part) {
          V values[count];
          for (int n = 0; n < count; ++n) values[n] = load<V>(x[n] + 32 * w + W * part);
#pragma GCC unroll 8
          for (int k = 0; k < outputs; ++k) {
            const SignBits<W> bits(words[w * drawn + k], part);
            for (int n = 0; n < count; ++n) total[n][k] += flip(values[n], bits);
          }
        }
      }
      for (int n = 0; n < count; ++n) {
        for (int k = 0; k < outputs; ++k) {
          of_rows[n][k] += V(coefficient[n][row]) * total[n][k];
        }
      }
    }
    for (int n = 0; n < count; ++n) {
      for (int k = 0; k < outputs; ++k) sums[n][first + k] += sum_of_lanes(of_rows[n][k]);
    }
  }
}

#if defined(__AVX512F__)

// The same for several vectors x, four entries at a time: a register has the 16 sums that four
// entries can have, of which every output picks one by four bits. 3 instructions for 64 products,
// where add_signed takes 12.
constexpr int64_t table_size = drawn * nibbles;  // numbers of the tables for a word

void make_tables(const float* x, int64_t row_words, float* tables) {
  V signs[4];
  for (int bit = 0; bit < 4; ++bit) {
    for (int lane = 0; lane < W; ++lane) signs[bit].native[lane] = lane >> bit & 1 ? -1.0f : 1.0f;
  }
  for (int64_t four = 0; four < row_words * nibbles; ++four, x += 4) {
    const V sum = (signs[0] * V(x[0]) + signs[1] * V(x[1])) +
                  (signs[2] * V(x[2]) + signs[3] * V(x[3]));
    store(sum, tables + four * drawn);
  }
}

template <int count>
void add_from_tables(
    const SignRows& signs, const float* const (&tables)[count],
    const float* const (&coefficient)[count], double* const (&sums)[count]) {
  constexpr int chains = 4;  // of additions, which wait for one another
  V of_rows[count];
  for (int n = 0; n < count; ++n) of_rows[n] = V(0.0f);
  for (int64_t row = 0; row < signs.rows; ++row) {
    const uint32_t* const words = signs.words + row * signs.row_stride;
    V total[count][chains];
    for (int n = 0; n < count; ++n) {
      for (int chain = 0; chain < chains; ++chain) total[n][chain] = V(0.0f);
    }
    for (int64_t w = 0; w < signs.row_words; ++w) {
      const __m512i of_outputs = _mm512_loadu_si512(words + w * drawn);
      __builtin_prefetch(words + 4 * signs.row_stride + w * drawn);
#pragma GCC unroll 8
      for (int nibble = 0; nibble < nibbles; ++nibble) {
        const __m512i which = _mm512_maskz_srli_epi32(0xffff, of_outputs, 4 * nibble);
        for (int n = 0; n < count; ++n) {
          const V table = load<V>(tables[n] + w * table_size + nibble * drawn);
          total[n][nibble % chains] +=
              V(_mm512_maskz_permutexvar_ps(0xffff, which, (__m512)table.native));
        }
      }
    }
    for (int n = 0; n < count; ++n) {
      const V sum = (total[n][0] + total[n][1]) + (total[n][2] + total[n][3]);
      of_rows[n] += V(coefficient[n][row]) * sum;
    }
  }
  for (int n = 0; n < count; ++n) add_to(sums[n], of_rows[n]);
}

#endif

}  // namespace
FMKERNELS_NAMESPACE_END
