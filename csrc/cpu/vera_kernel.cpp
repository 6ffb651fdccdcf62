// VeRA's elementwise work on the CPU, compiled once per instruction set. Each function reads and
// writes every number once; what is narrow is widened in registers.
#include "vera_kernel.h"

#include "fmkernels/bfloat16.h"
#include "fmkernels/config.h"
#include "fmkernels/philox.h"

FMKERNELS_NAMESPACE_BEGIN

namespace {

FMKERNELS_INLINE float wide(float value) { return value; }
FMKERNELS_INLINE float wide(uint16_t bits) { return widen(BFloat16{bits}); }

FMKERNELS_INLINE void set(float& target, float value) { target = value; }
FMKERNELS_INLINE void set(uint16_t& bits, float value) {
  BFloat16 narrowed;
  narrow(value, narrowed);
  bits = narrowed.bits;
}

// What one row of a tensor takes of (adapters, width), or null.
FMKERNELS_INLINE const float* vector_of(
    const float* vectors, const int64_t* ids, int64_t row, int64_t width) {
  if (ids == nullptr) return vectors;
  return ids[row] < 0 ? nullptr : vectors + ids[row] * width;
}

template <class T>
void scale_rows(
    const T* x, const float* vectors, const int64_t* ids, int64_t first, int64_t last,
    int64_t width, T* result) {
  for (int64_t row = first; row < last; ++row) {
    const float* vector = vector_of(vectors, ids, row, width);
    const T* from = x + row * width;
    T* to = result + row * width;
    if (vector == nullptr) {
      for (int64_t j = 0; j < width; ++j) to[j] = T{};
      continue;
    }
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) set(to[j], wide(from[j]) * vector[j]);
  }
}

template <class T>
void add_scaled(
    const T* base, const T* z, const float* vectors, const int64_t* ids, int64_t first,
    int64_t last, int64_t width, T* result) {
  for (int64_t row = first; row < last; ++row) {
    const float* vector = vector_of(vectors, ids, row, width);
    const T *from = base + row * width, *added = z + row * width;
    T* to = result + row * width;
    if (vector == nullptr) {
      for (int64_t j = 0; j < width; ++j) to[j] = from[j];
      continue;
    }
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) {
      set(to[j], wide(from[j]) + wide(added[j]) * vector[j]);
    }
  }
}

template <class T>
void sum_rows(
    const T* x, const T* y, const int64_t* ids, int64_t rows, int64_t first, int64_t last,
    int64_t width, int64_t adapters, double* sums, float* result) {
  const int64_t count = last - first;
  for (int64_t i = 0; i < adapters * count; ++i) sums[i] = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t id = ids == nullptr ? 0 : ids[row];
    if (id < 0) continue;
    const T *a = x + row * width + first, *b = y + row * width + first;
    double* to = sums + id * count;
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) to[j] += static_cast<double>(wide(a[j])) * wide(b[j]);
  }
  for (int64_t id = 0; id < adapters; ++id) {
    for (int64_t j = 0; j < count; ++j) {
      result[id * width + first + j] = static_cast<float>(sums[id * count + j]);
    }
  }
}

template <class T>
void scale_matrix(
    const T* B, const float* d, const float* b, int64_t first, int64_t last, int64_t rank,
    T* result) {
  for (int64_t i = first; i < last; ++i) {
    const T* from = B + i * rank;
    T* to = result + i * rank;
    const float scale = b[i];
#pragma omp simd
    for (int64_t k = 0; k < rank; ++k) set(to[k], scale * wide(from[k]) * d[k]);
  }
}

template <class T>
void contract(
    const float* M, const T* B, const float* d, const float* b, int64_t first, int64_t last,
    int64_t rank, float* grad_b, double* grad_d) {
  for (int64_t k = 0; k < rank; ++k) grad_d[k] = 0;
  for (int64_t i = first; i < last; ++i) {
    const float* m = M + i * rank;
    const T* row = B + i * rank;
    const float scale = b[i];
    // sixteen sums, whatever the register, so that every CPU adds in the same order; in float64,
    // because terms of either sign may leave little
    constexpr int lanes = 16;
    double sums[lanes] = {};
    int64_t k = 0;
    for (; k + lanes <= rank; k += lanes) {
#pragma omp simd
      for (int lane = 0; lane < lanes; ++lane) {
        const float both = wide(row[k + lane]) * m[k + lane];
        sums[lane] += static_cast<double>(both) * d[k + lane];
        grad_d[k + lane] += static_cast<double>(scale) * both;
      }
    }
    for (; k < rank; ++k) {
      const float both = wide(row[k]) * m[k];
      sums[k % lanes] += static_cast<double>(both) * d[k];
      grad_d[k] += static_cast<double>(scale) * both;
    }
    for (int half = lanes / 2; half > 0; half /= 2) {
      for (int lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
    }
    grad_b[i] = static_cast<float>(sums[0]);
  }
}

// The stream of fmkernels/ops/vera_dropout/reference.py.
constexpr uint32_t dropout_stream = uint32_t{6} << 24;

// Counters whose words are drawn together.
#if defined(__AVX512F__)
constexpr int counters = 16;
#elif defined(__AVX2__)
constexpr int counters = 8;
#else
constexpr int counters = 4;
#endif

template <class T>
void drop(
    const T* x, uint64_t seed, uint64_t threshold, float scale, int64_t first, int64_t last,
    int64_t width, T* result) {
  using Words = typename WordVec<4 * counters>::Words;
  const PhiloxKey key{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  Words numbers;
  for (int lane = 0; lane < counters; ++lane) numbers[lane] = static_cast<uint32_t>(lane);
  for (int64_t row = first; row < last; ++row) {
    const T* from = x + row * width;
    T* to = result + row * width;
    for (int64_t start = 0; start < width; start += 4 * counters) {
      Words words[1][4] = {
          {numbers + static_cast<uint32_t>(start / 4), Words{} + static_cast<uint32_t>(row),
           Words{} + static_cast<uint32_t>(static_cast<uint64_t>(row) >> 32),
           Words{} + dropout_stream}};
      philox(key, words);
      uint32_t drawn[4][counters];
      __builtin_memcpy(drawn, words, sizeof drawn);
      const int64_t left = width - start;
      for (int lane = 0; lane < counters && 4 * lane < left; ++lane) {
        for (int word = 0; word < 4 && 4 * lane + word < left; ++word) {
          const int64_t j = start + 4 * lane + word;
          const bool stays = drawn[word][lane] >= threshold;
          set(to[j], stays ? wide(from[j]) * scale : 0.0f);
        }
      }
    }
  }
}

template <class T>
constexpr VeraKernels<T> vera_kernels{
    scale_rows<T>, add_scaled<T>, sum_rows<T>, scale_matrix<T>, contract<T>, drop<T>};

}  // namespace

extern const VeraKernels<float> vera_f32 = vera_kernels<float>;
extern const VeraKernels<uint16_t> vera_bf16 = vera_kernels<uint16_t>;

FMKERNELS_NAMESPACE_END
