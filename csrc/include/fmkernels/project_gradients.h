// The arithmetic of gradient projections: random signs in words of 32 bits, values whose sign they
// turn, and powers of two that keep a sample in range. fmkernels/ops/project_gradients/reference.py
// has the formulas.
#pragma once

#include <cstdint>

#include "fmkernels/config.h"
#include "fmkernels/philox.h"
#include "fmkernels/simd.h"

FMKERNELS_NAMESPACE_BEGIN

// Where a CountSketch block is rotated to: (word · dim) div 2³².
FMKERNELS_INLINE int64_t shift_of(uint32_t word, int64_t dim) {
  return static_cast<int64_t>((static_cast<uint64_t>(word) * static_cast<uint64_t>(dim)) >> 32);
}

// The value, negative where the lowest bit of the word is 1.
FMKERNELS_INLINE float flip(float value, uint32_t word) {
  return from_bits(bits_of(value) ^ static_cast<int32_t>(word << 31));
}

#ifndef __CUDACC__

// Sign bits for the lanes of a register, of the bits part · W, … of a word.
template <int W>
struct SignBits {
  using Ints = typename Native<float, W>::Ints;
  Ints bits;

  FMKERNELS_INLINE SignBits(uint32_t word, int part) {
    const Ints words = Ints{} + static_cast<int32_t>(word);
#if defined(__AVX2__)
    bits = (words << (31 - part * W - lane_numbers())) & sign;
#else
    // no instruction shifts each lane by its own distance
    const Ints place = lane_bits(part * W);
    bits = ((words & place) == place) & sign;
#endif
  }

 private:
  static constexpr int32_t sign = INT32_MIN;
  FMKERNELS_INLINE static Ints lane_numbers() {
    Ints numbers{};
    for (int lane = 0; lane < W; ++lane) numbers[lane] = lane;
    return numbers;
  }
  FMKERNELS_INLINE static Ints lane_bits(int first) {
    Ints places{};
    for (int lane = 0; lane < W; ++lane) {
      places[lane] = static_cast<int32_t>(uint32_t{1} << (first + lane));
    }
    return places;
  }
};

template <int W>
FMKERNELS_INLINE Vec<float, W> flip(Vec<float, W> value, SignBits<W> signs) {
  return from_bits(IntVec<float, W>{bits_of(value).native ^ signs.bits});
}

// Negative in the lanes where the highest bit of the word is 1.
template <int W>
FMKERNELS_INLINE Vec<float, W> flip_by_highest(
    Vec<float, W> value, typename WordVec<4 * W>::Words words) {
  using Ints = typename Native<float, W>::Ints;
  return from_bits(IntVec<float, W>{bits_of(value).native ^ ((Ints)words & INT32_MIN)});
}

template <int W>
FMKERNELS_INLINE float sum_of_lanes(Vec<float, W> value) {
  float lanes[W];
  store(value, lanes);
  for (int half = W / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

#endif  // __CUDACC__

// Of the numbers of a sample: the e for which the largest is in [2^(e − 1), 2^e).
constexpr int not_finite = 1 << 20;

template <class T>
FMKERNELS_INLINE int exponent_of(const T* values, int64_t count, T at_least) {
  T largest = at_least, poison = 0;
#pragma omp simd reduction(max : largest) reduction(+ : poison)
  for (int64_t i = 0; i < count; ++i) {
    const T size = values[i] < 0 ? -values[i] : values[i];
    largest = size > largest ? size : largest;
    poison += values[i] * 0;  // NaN, if a value is not finite
  }
  if (poison != 0) return not_finite;
  int exponent;
  __builtin_frexp(static_cast<double>(largest), &exponent);
  return largest > 0 ? exponent : 0;
}

// Multiplies by 2^−exponent, in two steps: the power itself may leave the range.
template <class T>
struct Scaling {
  T half = 1, other = 1;

  FMKERNELS_INLINE explicit Scaling(int exponent) {
    if (exponent == not_finite) return;
    const int first = -exponent / 2;
    half = static_cast<T>(__builtin_ldexp(1.0, first));
    other = static_cast<T>(__builtin_ldexp(1.0, -exponent - first));
  }
  FMKERNELS_INLINE float operator()(T value) const {
    return static_cast<float>(value * half * other);
  }
};

// What a sample's sums are multiplied by.
FMKERNELS_INLINE double factor_of(double scale, int delta_exponent, int exponent) {
  if (delta_exponent == not_finite || exponent == not_finite) return __builtin_nan("");
  const int sum = delta_exponent + exponent;
  return scale * __builtin_ldexp(1.0, sum > 1000 ? 1000 : sum < -1000 ? -1000 : sum);
}

FMKERNELS_NAMESPACE_END
