// bfloat16 on CPUs without instructions for it.
#pragma once

#include <cstdint>

#include "fmkernels/config.h"

FMKERNELS_NAMESPACE_BEGIN

// bfloat16, which is what a float32 has in its upper half.
struct BFloat16 {
  uint16_t bits;
};
FMKERNELS_INLINE float widen(float value) { return value; }
FMKERNELS_INLINE float widen(BFloat16 value) {
  const uint32_t bits = uint32_t{value.bits} << 16;
  float wide;
  __builtin_memcpy(&wide, &bits, sizeof wide);
  return wide;
}

// The nearest bfloat16, ties to even; a NaN stays one.
FMKERNELS_INLINE void narrow(float value, BFloat16& narrowed) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1);
  narrowed.bits = static_cast<uint16_t>((value == value ? rounded : bits | 0x400000) >> 16);
}
FMKERNELS_INLINE void narrow(float value, float& narrowed) { narrowed = value; }

FMKERNELS_NAMESPACE_END
