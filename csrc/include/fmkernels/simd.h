// The value types that the numerics are templates over: a scalar, or a register of W lanes.
//
// Each lane is an independent problem (another query), so no numerics shuffle or reduce over lanes,
// and a lane's result does not depend on its neighbours; `transpose` is for getting in and out.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#include "fmkernels/config.h"

FMKERNELS_NAMESPACE_BEGIN

template <class T>
struct IntOf;
template <>
struct IntOf<float> {
  using type = int32_t;
};
template <>
struct IntOf<double> {
  using type = int64_t;
};

// Scalar: what one CUDA thread, or a test, computes with.
template <class V>
struct Lanes {
  using Scalar = V;
  static constexpr int count = 1;
};

FMKERNELS_INLINE float select(bool condition, float yes, float no) { return condition ? yes : no; }
FMKERNELS_INLINE double select(bool condition, double yes, double no) {
  return condition ? yes : no;
}
FMKERNELS_INLINE int32_t bits_of(float value) {
  int32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}
FMKERNELS_INLINE float from_bits(int32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
FMKERNELS_INLINE float to_float(int32_t value) { return static_cast<float>(value); }
FMKERNELS_INLINE int32_t to_int(float value) { return static_cast<int32_t>(value); }

#ifndef __CUDACC__

template <class T, int W>
struct Native;  // the GNU vector types of W lanes
#define FMKERNELS_NATIVE(T, W)                                                      \
  template <>                                                                       \
  struct Native<T, W> {                                                             \
    typedef T Values __attribute__((vector_size(W * sizeof(T))));                   \
    typedef IntOf<T>::type Ints __attribute__((vector_size(W * sizeof(T))));        \
  };
FMKERNELS_NATIVE(float, 4)
FMKERNELS_NATIVE(float, 8)
FMKERNELS_NATIVE(float, 16)
FMKERNELS_NATIVE(double, 2)
FMKERNELS_NATIVE(double, 4)
FMKERNELS_NATIVE(double, 8)
#undef FMKERNELS_NATIVE

// Integers, or the truth of a comparison, lane by lane.
template <class T, int W>
struct IntVec {
  typename Native<T, W>::Ints native;

  FMKERNELS_INLINE friend IntVec operator+(IntVec a, int b) { return {a.native + b}; }
  FMKERNELS_INLINE friend IntVec operator-(IntVec a, int b) { return {a.native - b}; }
  FMKERNELS_INLINE friend IntVec operator-(IntVec a, IntVec b) { return {a.native - b.native}; }
  FMKERNELS_INLINE friend IntVec operator*(IntVec a, int b) { return {a.native * b}; }
  FMKERNELS_INLINE friend IntVec operator>>(IntVec a, int b) { return {a.native >> b}; }
};

// W lanes of T, in one or several machine registers: a thin wrapper of the GNU vector extension.
template <class T, int W>
struct Vec {
  using Values = typename Native<T, W>::Values;
  Values native;

  Vec() = default;
  FMKERNELS_INLINE Vec(Values values) : native(values) {}
  // not 0 + value, which would be an addition, for the sake of −0
  FMKERNELS_INLINE explicit Vec(T value) : native(value - Values{}) {}

  FMKERNELS_INLINE friend Vec operator+(Vec a, Vec b) { return a.native + b.native; }
  FMKERNELS_INLINE friend Vec operator-(Vec a, Vec b) { return a.native - b.native; }
  FMKERNELS_INLINE friend Vec operator*(Vec a, Vec b) { return a.native * b.native; }
  FMKERNELS_INLINE friend Vec operator/(Vec a, Vec b) { return a.native / b.native; }
  FMKERNELS_INLINE friend Vec operator-(Vec a) { return -a.native; }
  FMKERNELS_INLINE Vec& operator+=(Vec b) { return *this = *this + b; }
  FMKERNELS_INLINE friend IntVec<T, W> operator<(Vec a, Vec b) { return {a.native < b.native}; }
  FMKERNELS_INLINE friend IntVec<T, W> operator>(Vec a, Vec b) { return {a.native > b.native}; }

  FMKERNELS_INLINE friend Vec select(IntVec<T, W> condition, Vec yes, Vec no) {
    return condition.native ? yes.native : no.native;
  }
  FMKERNELS_INLINE friend IntVec<T, W> bits_of(Vec value) {
    return {reinterpret_cast<typename Native<T, W>::Ints>(value.native)};
  }
  FMKERNELS_INLINE friend IntVec<T, W> to_int(Vec value) {
    return {__builtin_convertvector(value.native, typename Native<T, W>::Ints)};
  }
};

template <class T, int W>
FMKERNELS_INLINE Vec<T, W> from_bits(IntVec<T, W> bits) {
  return reinterpret_cast<typename Native<T, W>::Values>(bits.native);
}
template <class T, int W>
FMKERNELS_INLINE Vec<T, W> to_float(IntVec<T, W> value) {
  return __builtin_convertvector(value.native, typename Native<T, W>::Values);
}

template <class T, int W>
struct Lanes<Vec<T, W>> {
  using Scalar = T;
  static constexpr int count = W;
};

// Unaligned memory.
template <class V>
FMKERNELS_INLINE V load(const typename Lanes<V>::Scalar* memory) {
  V value;
  memcpy(&value, memory, sizeof value);
  return value;
}
template <class V>
FMKERNELS_INLINE void store(V value, typename Lanes<V>::Scalar* memory) {
  memcpy(memory, &value, sizeof value);
}

// Lanes of a and b chosen by constant indices; those of b count on from W.
template <int... lane, class T, int W>
FMKERNELS_INLINE Vec<T, W> shuffle(Vec<T, W> a, Vec<T, W> b) {
#ifdef __clang__
  return __builtin_shufflevector(a.native, b.native, lane...);
#else
  return __builtin_shuffle(a.native, b.native, typename Native<T, W>::Ints{lane...});
#endif
}

// Exchanges the lanes of a that have bit `distance` in their number with those of b that have not.
template <int distance, class T, int W, size_t... lane>
FMKERNELS_INLINE void exchange(Vec<T, W>& a, Vec<T, W>& b, std::index_sequence<lane...>) {
  const Vec<T, W> low = shuffle<(lane & distance ? W + lane - distance : lane)...>(a, b);
  b = shuffle<(lane & distance ? W + lane : lane + distance)...>(a, b);
  a = low;
}

// The W × W matrix whose rows are W registers: blocks of half the size change places, then blocks
// inside of them.
template <int distance, class T, int W>
FMKERNELS_INLINE void transpose(Vec<T, W> (&rows)[W]) {
  for (int row = 0; row < W; ++row) {
    if (row & distance) continue;
    exchange<distance>(rows[row], rows[row + distance], std::make_index_sequence<W>{});
  }
  if constexpr (distance > 1) transpose<distance / 2>(rows);
}
template <class T, int W>
FMKERNELS_INLINE void transpose(Vec<T, W> (&rows)[W]) {
  transpose<W / 2>(rows);
}

#endif  // __CUDACC__

FMKERNELS_NAMESPACE_END
