// Elementary functions over a value type: the same polynomials in a CUDA thread and a CPU lane.
//
// float: own minimax polynomials (Remez, relative error below half a unit in the last place before
// rounding). double: libm, lane by lane; that path is for gradient checks, not for speed.
#pragma once

#include <cmath>

#include "fmkernels/simd.h"

FMKERNELS_NAMESPACE_BEGIN

// first + x·second + x²·… by Horner's rule.
template <class V>
FMKERNELS_INLINE V polynomial(V, float last) {
  return V(last);
}
template <class V, class... Rest>
FMKERNELS_INLINE V polynomial(V x, float first, Rest... rest) {
  return V(first) + x * polynomial(x, rest...);
}

template <class V>
FMKERNELS_INLINE V absolute(V x) {
  return select(x < V(0), -x, x);
}

// a·b, rounded, for a sum whose rest is computed from it again: nvcc may fuse the product with one of
// the additions and not with the other. GCC fuses it with all of them or none.
template <class V>
FMKERNELS_INLINE V rounded_product(V a, V b) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(V) == 4) {
    return __fmul_rn(a, b);
  } else {
    return __dmul_rn(a, b);
  }
#else
  return a * b;
#endif
}

// float ------------------------------------------------------------------------------------------

// log(x) = e·ln 2 + f + rest for normal x > 0 = m·2^e, with m = 1 + f in [√½, √2).
template <class V>
FMKERNELS_INLINE void log_parts_f32(V x, V& e, V& f, V& rest) {
  const auto bits = bits_of(x);
  const auto exponent = (bits - 0x3f3504f3) >> 23;
  e = to_float(exponent);
  f = from_bits(bits - exponent * (1 << 23)) - V(1);
  const V p = polynomial(
      f, 0.3333331045f, -0.2499998658f, 0.2000222632f, -0.166692518f, 0.1421866384f,
      -0.1238433529f, 0.1187292601f, -0.1178986428f, 0.06915539459f);
  const V f2 = f * f;
  rest = f * f2 * p - V(0.5f) * f2;
}

// log(x) for normal x > 0; NaN and +inf pass through.
template <class V>
FMKERNELS_INLINE V log_f32(V x) {
  V e, f, rest;
  log_parts_f32(x, e, f, rest);
  // ln 2 in two parts, so that e·(first part) is exact
  const V result = e * V(0.693359375f) + (f + (e * V(-2.12194440e-4f) + rest));
  return select(x < V(__builtin_inff()), result, x);
}

// exp(x): 0 below the normal range, clamped to the largest power of two above it.
template <class V>
FMKERNELS_INLINE V exp_f32(V x) {
  const V clamped = select(x < V(88.0f), select(x > V(-87.3f), x, V(-87.3f)), V(88.0f));
  const V shift = V(12582912.0f);  // 1.5·2^23: adding it rounds to an integer
  const V n = (clamped * V(1.44269504f) + shift) - shift;
  const V r = (clamped - n * V(0.693359375f)) + n * V(2.12194440e-4f);
  const V t = r * V(1.44269504f);
  const V p = polynomial(
      t, 1.0f, 0.6931472057f, 0.2402264689f, 0.05550328777f, 0.009618488956f, 0.001339993127f,
      0.0001534581241f);
  const V power = from_bits((to_int(n) + 127) * (1 << 23));
  const V result = select(x < V(-87.3f), V(0), p * power);
  return select(x > V(0), result, select(x < V(1), result, x));  // NaN stays NaN
}

// atan(1/a)/π for a ≥ 0: the small weight of a Cauchy swap, with its relative precision.
template <class V>
FMKERNELS_INLINE V cauchy_tail_f32(V a) {
  const auto far = a > V(1);
  const V t = select(far, V(1) / a, a);
  const V p = polynomial(
      t * t, 0.9999999976f, -0.3333328364f, 0.1999826604f, -0.142619331f, 0.1094203066f,
      -0.08377315498f, 0.05755210365f, -0.0308045994f, 0.01072694556f, -0.001753930543f);
  const V scaled = t * p * V(0.318309886f);
  return select(far, scaled, V(0.5f) - scaled);
}

// exp(x + rest) for |rest| < 1e-4: the part of an exponent that rounding took from it.
template <class V>
FMKERNELS_INLINE V exp_f32(V x, V rest) {
  const V e = exp_f32(x);
  return e + e * rest;
}

// The 12 leading bits of x: the product of two such numbers is exact.
template <class V>
FMKERNELS_INLINE V leading_bits(V x) {
  return from_bits((bits_of(x) >> 12) * (1 << 12));
}

// erfc(x) for x ≥ 0 as t·exp(−x² + q(t − 1)), t = 1/(1 + x/2). A rounded x² would cost x² units in
// the last place.
template <class V>
FMKERNELS_INLINE V erfc_f32(V x) {
  x = select(x > V(16), V(16), x);
  const V half = V(0.5f) * x, t = V(1) / (V(1) + half), u = -half * t;
  const V q = u * polynomial(
      u, 1.256758682f, -0.3032259791f, -0.161336476f, 0.1929920191f, -0.06525180843f,
      -0.1268375858f, -0.1524899797f, -0.4802389197f, -0.4795738423f, -0.1501696932f);
  const V x_leading = leading_bits(x);
  const V square = x_leading * x_leading;
  const V small = q - (x - x_leading) * (x + x_leading);
  const V exponent = small - square;
  return t * exp_f32(exponent, small - (exponent + square));
}

// x^p for normal x > 0 and |p·log x| < 87. ln 2 is taken as 11/16 and a rest, which makes the large
// part of the exponent exact.
template <class V>
FMKERNELS_INLINE V power_f32(V x, V p) {
  V e, f, rest;
  log_parts_f32(x, e, f, rest);
  const V p_leading = leading_bits(p), large = e * V(0.6875f);
  const V small = f + (e * V(0.00564718056f) + rest);
  const V p_large = p_leading * large;
  const V p_small = p * small + (p - p_leading) * large;
  const V exponent = p_large + p_small;
  return exp_f32(exponent, p_small - (exponent - p_large));
}

// double -----------------------------------------------------------------------------------------

FMKERNELS_INLINE double log_f64(double x) { return ::log(x); }
FMKERNELS_INLINE double exp_f64(double x) { return ::exp(x); }
FMKERNELS_INLINE double cauchy_tail_f64(double a) { return ::atan2(1.0, a) * 0.318309886183790672; }
FMKERNELS_INLINE double erfc_f64(double x) { return ::erfc(x); }
FMKERNELS_INLINE double power_f64(double x, double p) { return ::pow(x, p); }

#ifndef __CUDACC__
#define FMKERNELS_LANE_BY_LANE(name)                                          \
  template <int W, class... Others>                                           \
  FMKERNELS_INLINE Vec<double, W> name(Vec<double, W> x, Others... others) {  \
    Vec<double, W> result;                                                    \
    for (int lane = 0; lane < W; ++lane) {                                    \
      result.native[lane] = name(x.native[lane], others.native[lane]...);     \
    }                                                                         \
    return result;                                                            \
  }
FMKERNELS_LANE_BY_LANE(log_f64)
FMKERNELS_LANE_BY_LANE(exp_f64)
FMKERNELS_LANE_BY_LANE(cauchy_tail_f64)
FMKERNELS_LANE_BY_LANE(erfc_f64)
FMKERNELS_LANE_BY_LANE(power_f64)
#undef FMKERNELS_LANE_BY_LANE
#endif

// by value type ----------------------------------------------------------------------------------

#define FMKERNELS_BY_PRECISION(name)                             \
  template <class V, class... Others>                            \
  FMKERNELS_INLINE V name(V x, Others... others) {               \
    if constexpr (sizeof(typename Lanes<V>::Scalar) == 4) {      \
      return name##_f32(x, others...);                           \
    } else {                                                     \
      return name##_f64(x, others...);                           \
    }                                                            \
  }
FMKERNELS_BY_PRECISION(log)
FMKERNELS_BY_PRECISION(exp)
FMKERNELS_BY_PRECISION(cauchy_tail)
FMKERNELS_BY_PRECISION(erfc)
FMKERNELS_BY_PRECISION(power)
#undef FMKERNELS_BY_PRECISION

FMKERNELS_NAMESPACE_END
