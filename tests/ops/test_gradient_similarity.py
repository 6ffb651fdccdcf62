"""Exact inner products of gradients: against the built ones, layouts, derivatives, refusals."""

import pytest
import torch
from gradients import gradients, pair

import fmkernels
from fmkernels import testing
from fmkernels.ops import gradient_similarity as module
from fmkernels.testing import assert_parity

SIZES = [(1, None, 1, None), (7, 3, 5, 1), (4, None, 6, 12), (9, 2, 3, None), (33, 1, 40, 2)]


def built(first, other, bias, dtype):
    one, two = (gradients(delta.to(dtype), a.to(dtype), bias) for delta, a in (first, other))
    return one @ two.mT


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_parity_with_built_gradients(dtype, bias):
    for samples, rows, others, other_rows in SIZES:
        first = pair(samples, rows, 24, 33, dtype)
        other = pair(others, other_rows, 24, 33, dtype)
        found = fmkernels.gradient_similarity(*first, *other, bias=bias)
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        exact = built(first, other, bias, torch.float64)
        if dtype == torch.float64:  # of which there is no wider one
            torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)
        else:
            assert_parity(found, built(first, other, bias, found.dtype), exact)


def test_it_is_what_projections_are_on_average():
    first, other = pair(4, 3, 12, 10), pair(5, None, 12, 10)
    exact = fmkernels.gradient_similarity(*first, *other)
    projection = fmkernels.Rademacher(12, 10, 20_000)
    one, two = (fmkernels.project_gradients(*x, projection) for x in (first, other))
    sizes = gradients(*first).norm(dim=1)[:, None] * gradients(*other).norm(dim=1)
    # √(2 / 20,000) is the standard deviation for parallel gradients, and these are not
    assert ((one @ two.mT - exact).abs() < 0.045 * sizes).all()


def test_the_tiles_change_nothing(monkeypatch):
    first, other = pair(9, 3, 24, 33, torch.float64), pair(5, 2, 24, 33, torch.float64)
    whole = fmkernels.gradient_similarity(*first, *other)
    monkeypatch.setattr(module, "TILE", 1)
    torch.testing.assert_close(fmkernels.gradient_similarity(*first, *other), whole)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_of_1e_8_lose_nothing(dtype):
    first = pair(4, 3, 24, 33, dtype, size=1e-6)
    other = pair(5, None, 24, 33, dtype, size=1e-6)
    exact = built(first, other, True, torch.float64)
    found = fmkernels.gradient_similarity(*first, *other)
    assert (exact.abs() > 0).all()
    sizes = gradients(*(x.double() for x in first)).norm(dim=1)[:, None]
    sizes = sizes * gradients(*(x.double() for x in other)).norm(dim=1)
    assert ((found - exact).abs() < 1e-6 * sizes).all()
    tiny = tuple(x.float() * s for x, s in zip(first, (1e-25, 1e25), strict=True))
    inverse = tuple(x.float() * s for x, s in zip(other, (1e-25, 1e25), strict=True))
    found = fmkernels.gradient_similarity(*tiny, *inverse, bias=False)
    exact = built(tiny, inverse, False, torch.float64)
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-18)


@pytest.mark.parametrize("size", [3e38, 1.8e38, 1e-42])
def test_numbers_at_the_ends_of_float32(size):
    """No product of sizes is made that the result does not have."""
    delta, other = torch.full((1, 6), size), torch.full((1, 6), 1 / size if size > 1 else 1.0)
    a, other_a = torch.full((1, 5), 1e-38), torch.ones(1, 5)
    for first, second in (((delta, a), (other, other_a)), ((other, other_a), (delta, a))):
        found = fmkernels.gradient_similarity(*first, *second)
        exact = fmkernels.gradient_similarity(*(x.double() for x in (*first, *second)))
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=2e-45)


def test_sizes_that_only_cancel_together():
    tensors = [torch.full((1, n), 10.0**x) for n, x in ((6, -30), (5, -20), (6, 30), (5, 20))]
    found = fmkernels.gradient_similarity(*tensors, bias=False)
    torch.testing.assert_close(found, torch.tensor([[30.0]]))
    wide = [torch.full((1, n), 10.0**x).double() for n, x in ((6, -30), (5, -20), (6, 30), (5, 20))]
    wide = [x**8 for x in wide]
    found = fmkernels.gradient_similarity(*wide, bias=False)
    torch.testing.assert_close(found, torch.tensor([[30.0]]).double())
    assert torch.equal(
        fmkernels.gradient_similarity(0 * wide[2], *wide[1:], bias=False),
        torch.zeros(1, 1).double(),
    )
    huge = fmkernels.gradient_similarity(wide[2], wide[3], wide[2], wide[3])
    assert torch.equal(huge, torch.tensor([[torch.inf]]).double())


def test_symmetric_and_positive():
    first = pair(6, 3, 24, 33)
    found = fmkernels.gradient_similarity(*first, *first)
    torch.testing.assert_close(found, found.mT)
    assert (found.diagonal() > 0).all()


def test_zeros_empty_and_what_is_not_finite():
    first, other = pair(4, 3, 6, 5), pair(3, 2, 6, 5)
    assert fmkernels.gradient_similarity(first[0][:0], first[1][:0], *other).shape == (0, 3)
    assert fmkernels.gradient_similarity(*other, first[0][:0], first[1][:0]).shape == (3, 0)
    no_rows = first[0][:, :0], first[1][:, :0]
    assert torch.equal(fmkernels.gradient_similarity(*no_rows, *other), torch.zeros(4, 3))
    assert torch.equal(
        fmkernels.gradient_similarity(0 * first[0], first[1], *other), torch.zeros(4, 3)
    )
    clean = fmkernels.gradient_similarity(*first, *other)
    first[0][1, 0, 2] = torch.nan
    found = fmkernels.gradient_similarity(*first, *other)
    assert found[1].isnan().all()
    torch.testing.assert_close(found[[0, 2, 3]], clean[[0, 2, 3]])


def test_layouts_and_gradients():
    first, other = pair(3, 2, 6, 5, torch.float64), pair(4, None, 6, 5, torch.float64)
    inputs = [x.requires_grad_() for x in (*first, *other)]
    assert torch.autograd.gradcheck(fmkernels.gradient_similarity, inputs)
    expected = fmkernels.gradient_similarity(*inputs)
    for position, value in enumerate(inputs):
        for _, laid_out in testing.layouts(value):
            changed = [*inputs[:position], laid_out, *inputs[position + 1 :]]
            torch.testing.assert_close(fmkernels.gradient_similarity(*changed), expected)


def test_autocast_matmul_precision_and_compile():
    first, other = pair(3, 2, 24, 33), pair(4, None, 24, 33)
    expected = fmkernels.gradient_similarity(*first, *other)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = fmkernels.gradient_similarity(*first, *other)
    finally:
        torch.set_float32_matmul_precision(before)
    torch.testing.assert_close(found, expected)
    torch._dynamo.reset()
    compiled = torch.compile(fmkernels.gradient_similarity, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*first, *other), expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"grad_output": torch.zeros(4)}, ValueError, r"grad_output: expected shape \(B, S, features\)"),
        ({"activation": torch.zeros(4, 5)}, ValueError, r"activation: expected shape \(4, 3, features\)"),
        ({"other_activation": torch.zeros(2, 4)}, ValueError, r"other_activation: expected rows of 5 numbers, as activation has, got shape \(2, 4\)"),
        ({"other_grad_output": torch.zeros(2, 7)}, ValueError, r"other_grad_output: expected rows of 6 numbers"),
        ({"other_grad_output": torch.zeros(3, 6)}, ValueError, r"other_activation: expected shape \(3, features\)"),
        ({"bias": 2}, TypeError, r"gradient_similarity: bias: expected True or False, got 2"),
        ({"grad_output": torch.zeros(4, 3, 6).long()}, TypeError, r"gradient_similarity: grad_output: expected a floating-point dtype"),
        ({"other_grad_output": torch.zeros(2, 6, device="meta"), "other_activation": torch.zeros(2, 5, device="meta")}, ValueError, r"other_grad_output: expected the device of grad_output"),
    ],
)  # fmt: skip
def test_refusals(change, error, message):
    arguments = {
        "grad_output": torch.zeros(4, 3, 6),
        "activation": torch.zeros(4, 3, 5),
        "other_grad_output": torch.zeros(2, 6),
        "other_activation": torch.zeros(2, 5),
    }
    with pytest.raises(error, match=message):
        fmkernels.gradient_similarity(**(arguments | change))
