// Random words, and what is made of them, at one register size, as lanes.cpp.
#include "philox.h"

#include "fmkernels/project_gradients.h"
#include "fmkernels/vera_matrices.h"

FMKERNELS_NAMESPACE_BEGIN
namespace {

#if REGISTER_BYTES == 0

void run_philox(const uint32_t* key, uint32_t* counters, int64_t count) {
  for (int64_t n = 0; n < count; n += 2) {
    uint32_t x[2][4];
    memcpy(x, counters + 4 * n, sizeof x);
    philox({key[0], key[1]}, x);
    memcpy(counters + 4 * n, x, sizeof x);
  }
}

void run_flip(const uint32_t* words, float* values, int64_t count) {
  for (int64_t j = 0; j < count; ++j) values[j] = flip(values[j], words[j / 32] >> (j % 32));
}

void run_flip_by_highest(const uint32_t* words, float* values, int64_t count) {
  for (int64_t j = 0; j < count; ++j) values[j] = flip(values[j], words[j] >> 31);
}

void run_uniform(const uint32_t* words, float* entries, int64_t count) {
  for (int64_t j = 0; j < count; ++j) entries[j] = uniform(words[j]);
}

#else

constexpr int W = REGISTER_BYTES / 4;
using V = Vec<float, W>;
using Words = WordVec<REGISTER_BYTES>::Words;

void run_philox(const uint32_t* key, uint32_t* counters, int64_t count) {
  for (int64_t n = 0; n < count; n += 2 * W) {
    Words x[2][4];
    for (int i = 0; i < 8 * W; ++i) x[i / (4 * W)][i % 4][i / 4 % W] = counters[4 * n + i];
    philox({key[0], key[1]}, x);
    for (int i = 0; i < 8 * W; ++i) counters[4 * n + i] = x[i / (4 * W)][i % 4][i / 4 % W];
  }
}

void run_flip(const uint32_t* words, float* values, int64_t count) {
  for (int64_t j = 0; j < count; j += W) {
    const SignBits<W> bits(words[j / 32], j % 32 / W);
    store(flip(load<V>(values + j), bits), values + j);
  }
}

void run_flip_by_highest(const uint32_t* words, float* values, int64_t count) {
  for (int64_t j = 0; j < count; j += W) {
    Words signs;
    memcpy(&signs, words + j, sizeof signs);
    store(flip_by_highest(load<V>(values + j), signs), values + j);
  }
}

void run_uniform(const uint32_t* words, float* entries, int64_t count) {
  for (int64_t j = 0; j < count; j += W) {
    Words some;
    memcpy(&some, words + j, sizeof some);
    store(uniform<W>(some), entries + j);
  }
}

#endif

}  // namespace

extern const Signs signs{run_philox, run_flip, run_flip_by_highest, run_uniform};

FMKERNELS_NAMESPACE_END
