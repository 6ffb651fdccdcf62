"""VeRA: an adapter for each row."""

import pytest
import torch
from vera_layers import (
    layer,
    values_and_gradients,
)

import fmkernels


def test_rows_without_an_adapter_are_the_base_s_exactly():
    problem = layer(20, 8, 9, 4, 3).to(torch.float32)
    d, b = problem.lambda_d.detach().clone(), problem.lambda_b.detach().clone()
    d[2], b[2] = torch.nan, torch.inf  # nobody's
    ids = torch.randint(-1, 2, (20,))
    base = torch.nn.functional.linear(*problem[:3])
    found = fmkernels.vera_linear(*problem[:5], d, b, adapter_ids=ids)
    assert torch.equal(found[ids < 0], base[ids < 0])
    assert found.isfinite().all()


def test_adapters_one_by_one():
    """Every row, and every adapter's gradient, is that of a call with this adapter alone."""
    problem = layer(40, 8, 9, 4, 6).to(torch.float64)
    ids = torch.tensor([5, 0, 5, 3, -1, 0, 2, 2, 2, 1] * 4)
    found = values_and_gradients(fmkernels.vera_linear, problem, adapter_ids=ids)
    generator = torch.Generator().manual_seed(5)
    grad = torch.randn(40, 9, dtype=torch.float64, generator=generator)
    for adapter in range(6):
        rows = ids == adapter
        d, b = (x[adapter].detach().requires_grad_() for x in problem[5:])
        x = problem.x[rows].detach().requires_grad_()
        y = fmkernels.vera_linear(x, *problem[1:5], d, b)
        alone = [y, *torch.autograd.grad(y, (x, d, b), grad[rows])]
        mixed = [found[0][rows], found[1][rows], found[2][adapter], found[3][adapter]]
        for a, e in zip(mixed, alone, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)
    assert (found[2][4] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_not_finite_stays_in_rows_without_an_adapter(dtype):
    problem = layer(20, 8, 9, 4, 3).to(dtype, torch.float32)
    ids = torch.arange(20) % 4 - 1
    clean = values_and_gradients(fmkernels.vera_linear, problem, adapter_ids=ids)
    with torch.no_grad():
        problem.x[ids < 0] = torch.nan
    y, grad_x, *grads = values_and_gradients(fmkernels.vera_linear, problem, adapter_ids=ids)
    assert torch.equal(y[ids >= 0], clean[0][ids >= 0])
    assert all(torch.equal(a, e) for a, e in zip((grad_x, *grads), clean[1:], strict=True))
