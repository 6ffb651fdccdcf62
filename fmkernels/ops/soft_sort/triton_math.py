"""Elementary functions for Triton, with the polynomials of csrc/include/fmkernels/math.h.

Triton's own ``exp`` and ``log`` are approximations whose error grows with the argument, and neither
``atan`` nor ``erfc`` runs in its interpreter. The polynomials are Remez fits with a relative error
below half a unit in the last place before rounding; a test holds the coefficients against the
header's, and the functions against those of float64.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def divide(a, b):
    """a/b to the last place for 2⁻¹²⁶ < b < 2¹²⁶; ``/`` alone errs by two.

    ``tl.div_rn`` would call a subroutine that needs a stack.
    """
    inverse = 1.0 / b
    quotient = a * inverse
    return tl.fma(tl.fma(-quotient, b, a), inverse, quotient)


@triton.jit
def leading_bits(x):
    """The 12 leading bits of x: the product of two such numbers is exact."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits >> 12) << 12).to(tl.float32, bitcast=True)


@triton.jit
def log_parts(x):
    """log(x) = e·ln 2 + f + rest for normal x > 0 = m·2^e, with m = 1 + f in [√½, √2)."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    p = 0.06915539459
    p = p * f - 0.1178986428
    p = p * f + 0.1187292601
    p = p * f - 0.1238433529
    p = p * f + 0.1421866384
    p = p * f - 0.166692518
    p = p * f + 0.2000222632
    p = p * f - 0.2499998658
    p = p * f + 0.3333331045
    f2 = f * f
    return exponent.to(tl.float32), f, f * f2 * p - 0.5 * f2


@triton.jit
def log(x):
    """Of normal x > 0; NaN and +inf pass through."""
    e, f, rest = log_parts(x)
    # ln 2 in two parts, so that e·(first part) is exact
    result = e * 0.693359375 + (f + (e * -2.12194440e-4 + rest))
    return tl.where(x < float("inf"), result, x)


@triton.jit
def exp(x):
    """0 below the normal range, clamped to the largest power of two above it."""
    clamped = tl.where(x < 88.0, tl.where(x > -87.3, x, -87.3), 88.0)
    n = tl.floor(clamped * 1.44269504 + 0.5)
    r = (clamped - n * 0.693359375) + n * 2.12194440e-4
    t = r * 1.44269504
    p = 0.0001534581241
    p = p * t + 0.001339993127
    p = p * t + 0.009618488956
    p = p * t + 0.05550328777
    p = p * t + 0.2402264689
    p = p * t + 0.6931472057
    p = p * t + 1.0
    power = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    result = tl.where(x < -87.3, 0.0, p * power)
    return tl.where(x > 0, result, tl.where(x < 1, result, x))  # NaN stays NaN


@triton.jit
def exp_of_sum(x, rest):
    """exp(x + rest) for abs(rest) < 1e-4: the part of an exponent that rounding took from it."""
    e = exp(x)
    return e + e * rest


@triton.jit
def cauchy_tail(a):
    """atan(1/a)/π for a ≥ 0: the small weight of a Cauchy swap, with its relative precision."""
    far = a > 1
    t = tl.where(far, divide(1.0, tl.where(far, a, 1.0)), a)
    z = t * t
    p = -0.001753930543
    p = p * z + 0.01072694556
    p = p * z - 0.0308045994
    p = p * z + 0.05755210365
    p = p * z - 0.08377315498
    p = p * z + 0.1094203066
    p = p * z - 0.142619331
    p = p * z + 0.1999826604
    p = p * z - 0.3333328364
    p = p * z + 0.9999999976
    scaled = t * p * 0.318309886
    return tl.where(far, scaled, 0.5 - scaled)


@triton.jit
def erfc(x):
    """For x ≥ 0, as t·exp(−x² + q(t − 1)), t = 1/(1 + x/2), with x² in two parts."""
    x = tl.where(x > 16.0, 16.0, x)
    half = 0.5 * x
    t = divide(1.0, 1.0 + half)
    u = -half * t
    q = -0.1501696932
    q = q * u - 0.4795738423
    q = q * u - 0.4802389197
    q = q * u - 0.1524899797
    q = q * u - 0.1268375858
    q = q * u - 0.06525180843
    q = q * u + 0.1929920191
    q = q * u - 0.161336476
    q = q * u - 0.3032259791
    q = q * u + 1.256758682
    q = q * u
    x_leading = leading_bits(x)
    square = x_leading * x_leading
    small = q - (x - x_leading) * (x + x_leading)
    exponent = small - square
    return t * exp_of_sum(exponent, small - (exponent + square))


@triton.jit
def power(x, p):
    """x^p for normal x > 0 and abs(p·log x) < 87; ln 2 is 11/16 and a rest."""
    e, f, rest = log_parts(x)
    p_leading = leading_bits(p)
    large = e * 0.6875
    small = f + (e * 0.00564718056 + rest)
    p_large = p_leading * large
    p_small = p * small + (p - p_leading) * large
    exponent = p_large + p_small
    return exp_of_sum(exponent, p_small - (exponent - p_large))
