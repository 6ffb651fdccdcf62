// What lanes.cpp offers for one register size, as plain functions of pointers.
#pragma once

#include <cstdint>

#include "soft_sort_kernel.h"

template <class T>
using ElementwiseFunction = void (*)(const T* x, T* y, int64_t count);

template <class T>
struct Numerics {
  ElementwiseFunction<T> log, exp, cauchy_tail, erfc, fourth_root_inverse;
  fmkernels::SoftSortKernels<T> soft_sort;
};

#define DECLARE(size)                     \
  namespace fmkernels::size {             \
  extern const Numerics<float> float32;   \
  extern const Numerics<double> float64;  \
  }
DECLARE(scalar)
DECLARE(bytes16)
DECLARE(bytes32)
DECLARE(bytes64)
#undef DECLARE
