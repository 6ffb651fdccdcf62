// VeRA's shared matrices on the CPU, compiled once per instruction set. A lane has a counter, which
// gives four entries side by side.
#include "vera_matrices_kernel.h"

#include "fmkernels/vera_matrices.h"

FMKERNELS_NAMESPACE_BEGIN

namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
using Words = WordVec<4 * W>::Words;

constexpr int registers = 2;                  // of counters, which do not wait for each other
constexpr int64_t drawn = 4 * registers * W;  // entries that are drawn together

// The entries of a row from column `start` on.
FMKERNELS_INLINE void draw(
    PhiloxKey key, uint32_t stream, int64_t row, int64_t start, float (&entries)[drawn]) {
  Words lanes{};
  for (int lane = 0; lane < W; ++lane) lanes[lane] = static_cast<uint32_t>(lane);
  Words x[registers][4];
  for (int n = 0; n < registers; ++n) {
    x[n][0] = lanes + static_cast<uint32_t>(start / 4 + n * W);
    x[n][1] = Words{} + static_cast<uint32_t>(row);
    x[n][2] = Words{};
    x[n][3] = Words{} + stream;
  }
  philox(key, x);
  for (int n = 0; n < registers; ++n) {
    float of_words[4][W];
    for (int word = 0; word < 4; ++word) store(uniform<W>(x[n][word]), of_words[word]);
    for (int lane = 0; lane < W; ++lane) {
      for (int word = 0; word < 4; ++word) {
        entries[4 * (n * W + lane) + word] = of_words[word][lane];
      }
    }
  }
}

void fill_rows(
    uint64_t seed, uint32_t stream, int64_t first, int64_t last, int64_t columns, float* matrix) {
  const PhiloxKey key{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  for (int64_t row = first; row < last; ++row) {
    float* to = matrix + row * columns;
    for (int64_t start = 0; start < columns; start += drawn) {
      float entries[drawn];
      draw(key, stream, row, start, entries);
      const int64_t left = columns - start;
      memcpy(to + start, entries, sizeof(float) * static_cast<size_t>(left < drawn ? left : drawn));
    }
  }
}

}  // namespace

extern const VeraUniform vera_uniform = fill_rows;

FMKERNELS_NAMESPACE_END
