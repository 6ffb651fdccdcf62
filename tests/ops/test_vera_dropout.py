"""VeRA's dropout: a function of seed and position."""

import pytest
import torch
from vera_layers import (
    layer,
    values_and_gradients,
)

import fmkernels

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def test_dropout_is_a_function_of_seed_and_position():
    problem = layer(64, 30, 12, 5, bias=False).to(torch.float32)

    def run(problem=problem, **settings):
        settings = {"dropout_p": 0.3, "training": True, "seed": 7} | settings
        return values_and_gradients(fmkernels.vera_linear, problem, **settings)

    first = run()
    assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
    assert not torch.equal(first[0], run(seed=8)[0])
    with fmkernels.backend("reference"):
        for a, b in zip(first, run(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for off in ({"training": False}, {"dropout_p": 0.0}):
        for a, b in zip(
            run(**off), values_and_gradients(fmkernels.vera_linear, problem), strict=True
        ):
            assert torch.equal(a, b)
    torch.manual_seed(1)
    drawn = run(seed=None)
    assert not torch.equal(drawn[0], run(seed=None)[0])
    torch.manual_seed(1)
    assert torch.equal(drawn[0], run(seed=None)[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_drops_its_share_and_backward_drops_the_same(dtype):
    from fmkernels.ops.vera_dropout import vera_dropout
    from fmkernels.ops.vera_dropout.reference import kept as stays

    x = torch.ones(257, 131, dtype=dtype, requires_grad=True)
    for p in (0.1, 0.5, 0.9):
        y = vera_dropout(x, p, seed=2**62 + 1)
        mask = stays(torch.tensor(2**62 + 1), 0, 257, 131, p)
        assert torch.equal(y != 0, mask)
        assert y[mask].unique().item() == torch.tensor(1 / (1 - p), dtype=torch.float64).to(dtype)
        share = (~mask).double().mean().item()
        assert abs(share - p) < 5 * (p * (1 - p) / mask.numel()) ** 0.5
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], y)
    assert (vera_dropout(x, 1.0) == 0).all()
    assert torch.equal(
        vera_dropout(x.mT, 0.5, seed=3).mT == 0,
        vera_dropout(x.mT.contiguous(), 0.5, seed=3).mT == 0,
    )


def test_dropped_numbers_are_those_of_every_release():
    from fmkernels.ops.vera_dropout import vera_dropout

    found = vera_dropout(torch.ones(3, 11), 0.5, seed=2**40 + 3) != 0
    assert ["".join(map(str, row)) for row in found.int().tolist()] == GOLDEN


GOLDEN = ["01110100110", "10010101001", "11111110110"]
