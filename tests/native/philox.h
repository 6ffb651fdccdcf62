// What philox.cpp offers for one register size: the words of counters, and what is made of them.
#pragma once

#include <cstdint>

// (count, 4) counters become (count, 4) words; count is a multiple of 32, and so is that of values.
using PhiloxFunction = void (*)(const uint32_t* key, uint32_t* counters, int64_t count);
// values with signs turned by bit j mod 32 of word j div 32, or by the highest bit of word j
using FlipFunction = void (*)(const uint32_t* words, float* values, int64_t count);

// entries of VeRA's matrices
using UniformFunction = void (*)(const uint32_t* words, float* entries, int64_t count);

struct Signs {
  PhiloxFunction philox;
  FlipFunction flip, flip_by_highest;
  UniformFunction uniform;
};

#define DECLARE(size)          \
  namespace fmkernels::size {  \
  extern const Signs signs;    \
  }
DECLARE(scalar)
DECLARE(bytes16)
DECLARE(bytes32)
DECLARE(bytes64)
#undef DECLARE
