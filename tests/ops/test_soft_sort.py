"""Properties and refusals of soft_sort."""

import pytest
import torch
from cases import scores
from hypothesis import given
from hypothesis import strategies as st

import fmkernels
from fmkernels.ops.soft_sort import DISTRIBUTIONS, NETWORKS

every_distribution = pytest.mark.parametrize("distribution", DISTRIBUTIONS)
every_network = pytest.mark.parametrize("network", NETWORKS)


@every_distribution
@every_network
def test_rows_and_columns_sum_to_one(network, distribution):
    _, permutation = fmkernels.soft_sort(
        scores(5, 33).float(), network=network, distribution=distribution
    )
    ones = torch.ones(5, 33)
    assert (permutation >= 0).all()
    torch.testing.assert_close(permutation.sum(dim=-1), ones)
    torch.testing.assert_close(permutation.sum(dim=-2), ones)


@every_distribution
def test_values_are_the_mixed_scores(distribution):
    x = scores(4, 49)
    values, permutation = fmkernels.soft_sort(x, distribution=distribution)
    torch.testing.assert_close(values, (x[:, None] @ permutation)[:, 0])


@given(
    shape=st.lists(st.integers(0, 3), max_size=3),
    n=st.integers(1, 21),
    network=st.sampled_from(NETWORKS),
    shift=st.floats(-10, 10),
)
def test_any_leading_shape_and_shift_invariance(shape, n, network, shift):
    x = scores(1, 1).new_empty((*shape, n)).normal_()
    values, permutation = fmkernels.soft_sort(x, network=network, steepness=3.0)
    assert values.shape == x.shape
    assert permutation.shape == (*x.shape, n)
    shifted, same = fmkernels.soft_sort(x + shift, network=network, steepness=3.0)
    torch.testing.assert_close(shifted, values + shift)
    torch.testing.assert_close(same, permutation)


def test_one_value_is_the_identity():
    values, permutation = fmkernels.soft_sort(torch.tensor([[3.0], [-1.0]]))
    assert values.tolist() == [[3.0], [-1.0]]
    assert permutation.tolist() == [[[1.0]], [[1.0]]]


def test_ties_share_their_slots():
    values, permutation = fmkernels.soft_sort(torch.full((2, 8), 0.5))
    torch.testing.assert_close(values, torch.full((2, 8), 0.5))
    torch.testing.assert_close(permutation, torch.full((2, 8, 8), 0.125))


@every_distribution
@every_network
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_extreme_scores_stay_finite(network, distribution, dtype):
    rows = torch.tensor(
        [[1e30, -1e30, 0, 1e-30, 5, 5, -5], [1e30] * 7, [0] * 7, [1e-38, 0, -1e-38, 1, 2, 3, 1e30]],
        dtype=dtype,
    )
    for steepness in (0.0, 1.0, 100.0, 1e6):
        x = rows.clone().requires_grad_()
        values, permutation = fmkernels.soft_sort(
            x, steepness=steepness, network=network, distribution=distribution
        )
        assert values.isfinite().all()
        assert permutation.isfinite().all()
        (grad,) = torch.autograd.grad(permutation.square().sum(), x)
        assert grad.isfinite().all()


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_row_stays_alone(poison):
    x = scores(20, 9).float().detach()
    dirty = x.clone()
    dirty[7, 3] = poison
    clean_rows = torch.arange(20) != 7
    results = []
    for y in (x, dirty):
        y.requires_grad_()
        values, permutation = fmkernels.soft_sort(y)
        (grad,) = torch.autograd.grad(permutation[..., 0].sum(), y)
        results.append((values, permutation, grad))
    for clean, with_bad_row in zip(*results, strict=True):
        assert torch.equal(clean[clean_rows], with_bad_row[clean_rows])


@every_distribution
def test_small_probabilities_keep_their_relative_precision(distribution, record_property):
    x = scores(64, 49).detach()
    settings = {"steepness": 100.0, "distribution": distribution}
    _, exact = fmkernels.soft_sort(x.float().double(), **settings)
    _, actual = fmkernels.soft_sort(x.float(), **settings)
    counted = exact > 2.0**-100
    error = (actual[counted].double().log() - exact[counted].log()).abs()
    record_property("mean log error", error.mean().item())
    record_property("largest log error", error.max().item())
    assert error.mean().item() <= 1e-3


def test_half_precision_is_computed_in_float32():
    x = scores(8, 49).detach().bfloat16()
    _, permutation = fmkernels.soft_sort(x)
    assert permutation.dtype == torch.bfloat16
    assert torch.equal(permutation, fmkernels.soft_sort(x.float())[1].bfloat16())


def refusal(error, message, **changes):
    arguments = {"scores": torch.zeros(2, 8), **changes}
    return pytest.param(arguments, error, message, id=message[:40])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        refusal(TypeError, "scores: expected a torch.Tensor, got list", scores=[1.0]),
        refusal(TypeError, "scores: expected a floating-point", scores=torch.zeros(2, 8).int()),
        refusal(TypeError, "floating-point.*complex", scores=torch.zeros(2, dtype=torch.cfloat)),
        refusal(ValueError, "scores: expected at least one dimension", scores=torch.tensor(1.0)),
        refusal(ValueError, r"a last dimension of at least 1, got shape \(8, 0\)", scores=torch.zeros(8, 0)),
        refusal(ValueError, "network: expected one of bitonic.*got 'quick'", network="quick"),
        refusal(ValueError, "distribution: expected one of logistic.*'normal'", distribution="normal"),
        refusal(ValueError, "steepness: expected a finite number >= 0, got -1", steepness=-1.0),
        refusal(ValueError, "steepness: expected a finite number >= 0, got inf", steepness=float("inf")),
        refusal(ValueError, "steepness: expected a finite number >= 0, got nan", steepness=float("nan")),
        refusal(TypeError, "steepness: expected a number, got str", steepness="steep"),
        refusal(ValueError, "art_lambda: expected a finite number", art_lambda=-0.5),
        refusal(ValueError, "art_lambda: expected a number from 0 to 1, got 4", art_lambda=4),
    ],
)  # fmt: skip
def test_refusals(arguments, error, message):
    with pytest.raises(error, match="soft_sort: .*" + message):
        fmkernels.soft_sort(**arguments)
