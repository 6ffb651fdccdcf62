"""The elementary functions against float64, in units in the last place, at every lane count."""

import hypothesis.extra.numpy as hnp
import mpmath
import numpy as np
import pytest
import scipy.special
from hypothesis import given
from hypothesis import strategies as st

REGISTER_BYTES = (0, 16, 32, 64)
LANES = 16  # of the widest register

EXACT = {
    "log": np.log,
    "exp": np.exp,
    "cauchy_tail": lambda x: np.arctan2(1.0, x) / np.pi,
    "erfc": scipy.special.erfc,
    "power": lambda x: x**-0.25,
}
TINY, HUGE = np.finfo(np.float32).tiny.item(), np.finfo(np.float32).max.item()
DOMAIN = {
    "log": (TINY, HUGE),
    "exp": (np.float32(-87.3).item(), 88.0),
    "cauchy_tail": (0.0, HUGE),
    "erfc": (0.0, 9.0),  # the result leaves the normal range at 9.2
    "power": (TINY, HUGE),
}


ALLOWED_ULPS = {"log": 1, "exp": 2, "cauchy_tail": 3, "erfc": 6, "power": 3}
"""The contract of each function: a few roundings, found by an exhaustive search to be enough."""


def ulps(actual, exact):
    """|actual − exact| in spacings of actual's dtype at exact."""
    spacing = np.spacing(np.abs(exact).astype(actual.dtype)).astype(np.float64)
    return np.abs(actual.astype(np.float64) - exact) / spacing


def padded(x):
    """x with its last value repeated until the widest register is full."""
    x = np.asarray(x)
    return np.pad(x, (0, -len(x) % LANES), mode="edge")


def check(native, name, x):
    results = [native.elementwise(name, x, size) for size in REGISTER_BYTES]
    for other in results[1:]:
        assert np.array_equal(results[0], other, equal_nan=True), "the lane count matters"
    wide = x.astype(np.float64)
    error = ulps(results[0], EXACT[name](wide)) - ALLOWED_ULPS[name]
    worst = error.argmax()
    assert error[worst] <= 0, f"{name}({x[worst]!r}): {error[worst]} units too many"


@pytest.mark.parametrize("name", EXACT)
def test_over_the_whole_domain(native, name):
    low, high = DOMAIN[name]
    even = np.linspace(low, min(high, 128.0), 2**20, dtype=np.float32)
    check(native, name, np.clip(even, low, high))
    if low >= 0:  # every exponent: the bit patterns of positive floats are ordered
        first, last = np.array([low, high], np.float32).view(np.uint32)
        check(native, name, padded(np.arange(first, last, 2039, dtype=np.uint32).view(np.float32)))


@pytest.mark.parametrize("name", EXACT)
def test_random_values(native, name):
    low, high = DOMAIN[name]
    value = st.floats(low, high, width=32, allow_subnormal=low == 0)

    @given(hnp.arrays(np.float32, LANES, elements=value))
    def fuzz(x):
        check(native, name, x)

    fuzz()


@pytest.mark.parametrize(
    ("name", "x", "expected"),
    [
        ("log", [1.0, np.inf, np.nan], [0.0, np.inf, np.nan]),
        ("exp", [0.0, -0.0, -87.4, -3e38, -np.inf, np.nan], [1.0, 1.0, 0.0, 0.0, 0.0, np.nan]),
        ("cauchy_tail", [0.0, 1e-45, 1.0, np.inf, np.nan], [0.5, 0.5, 0.25, 0.0, np.nan]),
        ("erfc", [0.0, 1e-45, 10.0, 3e38, np.inf, np.nan], [1.0, 1.0, 0.0, 0.0, 0.0, np.nan]),
    ],
)
def test_special_values(native, register_bytes, name, x, expected):
    actual = native.elementwise(name, padded(np.float32(x)), register_bytes)
    assert np.array_equal(actual, padded(np.float32(expected)), equal_nan=True)


def test_exp_is_clamped_above_and_stays_finite(native, register_bytes):
    x = padded(np.float32([88.0, 89.0, 1e30, np.inf]))
    assert np.ptp(native.elementwise("exp", x, register_bytes)) == 0


@pytest.mark.parametrize("name", EXACT)
def test_double_precision(native, register_bytes, name):
    low, high = DOMAIN[name]
    x = np.random.default_rng(0).uniform(low, min(high, 50.0), 4 * LANES)
    x[:LANES] *= 1e-3
    actual = native.elementwise(name, x, register_bytes)
    exact = {
        "log": mpmath.log,
        "exp": mpmath.exp,
        "cauchy_tail": lambda v: mpmath.atan2(1, v) / mpmath.pi,
        "erfc": mpmath.erfc,
        "power": lambda v: mpmath.power(v, -0.25),
    }[name]
    with mpmath.workdps(40):
        error = [
            abs(mpmath.mpf(float(a)) - exact(float(v))) for v, a in zip(x, actual, strict=True)
        ]
    # libm's functions, at most one of them and a product
    assert max(float(e / np.spacing(abs(a))) for e, a in zip(error, actual, strict=True)) <= 2
