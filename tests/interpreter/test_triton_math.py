"""The elementary functions of the Triton kernels, in the interpreter."""

import math
import os
import re
from pathlib import Path

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

import triton
import triton.language as tl

from fmkernels.ops.soft_sort import triton_math

ROOT = Path(__file__).parent.parent.parent
SIZE = 1024


@triton.jit
def apply_kernel(p_x, p_y, FUNCTION: tl.constexpr, N: tl.constexpr):
    offsets = tl.arange(0, N)
    tl.store(p_y + offsets, FUNCTION(tl.load(p_x + offsets)))


@triton.jit
def inverse(x):
    return triton_math.divide(1.0, x)


@triton.jit
def inverse_fourth_root(x):
    return triton_math.power(x, 0.0 * x - 0.25)


CASES = [
    (triton_math.log, torch.log, (-80, 80), 1),
    (triton_math.exp, torch.exp, None, 2),
    (triton_math.cauchy_tail, lambda a: torch.atan2(torch.ones_like(a), a) / math.pi, (-30, 80), 3),
    (triton_math.erfc, torch.special.erfc, (-20, 2), 6),
    (inverse, torch.reciprocal, (-80, 80), 1),
    (inverse_fourth_root, lambda x: x.pow(-0.25), (-33, 60), 3),
]


@pytest.mark.parametrize(("function", "exact", "exponents", "ulps"), CASES)
def test_last_places(function, exact, exponents, ulps):
    """Few units in the last place; tests/native/test_math.py allows the header's as many."""
    if exponents is None:
        x = torch.linspace(-87, 87, SIZE)
    else:
        x = torch.logspace(*exponents, SIZE, base=2)
    found = torch.empty_like(x)
    apply_kernel[(1,)](x, found, FUNCTION=function, N=SIZE)
    expected = exact(x.double())
    error = (found.double() - expected).abs()
    spacing = expected.abs() * 2.0**-23
    normal = expected.abs() > 2.0**-126
    assert (error[normal] <= ulps * spacing[normal]).all(), (error / spacing)[normal].max()


def test_coefficients_are_the_headers():
    """Every long number of the header's float32 functions."""
    header = (ROOT / "csrc/include/fmkernels/math.h").read_text().split("// double ---")[0]
    numbers = {float(text) for text in re.findall(r"(\d+\.\d{7,}(?:e-?\d+)?)f", header)}
    ours = {
        float(text)
        for text in re.findall(r"\d+\.\d+(?:e-?\d+)?", Path(triton_math.__file__).read_text())
    }
    assert len(numbers) > 30
    assert numbers - ours == {12582912.0} & numbers
