"""Agreement with the diffsort package in float64: values, permutation, gradients, loss."""

import peers
import pytest
import torch
from cases import scores

import fmkernels
from fmkernels.ops.soft_sort import DISTRIBUTIONS
from fmkernels.ops.soft_sort.networks import sorts

# diffsort rounds 1/steepness to float32 for the gaussian's gradient: a power of two is exact there
STEEPNESS = 32.0
TOLERANCE = dict.fromkeys(DISTRIBUTIONS, 1e-9) | {"optimal": 1e-7}  # diffsort adds 1e-10 to its |v|
every_distribution = pytest.mark.parametrize("distribution", DISTRIBUTIONS)


def assert_close(actual, expected, distribution="cauchy"):
    scale = expected.abs().max().clamp_min(1.0)
    assert ((actual - expected).abs().max() / scale).item() <= TOLERANCE[distribution]


@pytest.mark.parametrize("sizes", [range(2, 65), range(65, 97), range(97, 114), range(114, 129)])
@pytest.mark.parametrize("network", ["bitonic", "odd_even"])
def test_every_size_from_2_to_128(network, sizes):
    for n in sizes:
        if sorts(network, n):
            for distribution in DISTRIBUTIONS:
                check_size(network, n, distribution)


def check_size(network, n, distribution):
    settings = {"steepness": STEEPNESS, "network": network, "distribution": distribution}
    x = scores(1, n)
    results = []
    for sort in (fmkernels.soft_sort, peers.soft_sort):
        values, permutation = sort(x, **settings)
        generator = torch.Generator().manual_seed(n)
        weight = torch.randn(permutation.shape, dtype=x.dtype, generator=generator)
        objective = (values * weight[..., 0]).sum() + (permutation * weight).sum()
        results.append((values, permutation, *torch.autograd.grad(objective, x)))
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected, distribution)


@every_distribution
def test_loss(distribution):
    for n in (2, 7, 16, 49):
        student, teacher = scores(4, n), scores(4, n, requires_grad=False)
        results = []
        for loss in (fmkernels.soft_sort_cross_entropy, peers.soft_sort_cross_entropy):
            value = loss(student, teacher, steepness=8.0, distribution=distribution).mean()
            results.append((value, *torch.autograd.grad(value, student)))
        for actual, expected in zip(*results, strict=True):
            assert_close(actual, expected, distribution)


def test_patch_neighbor_loss():
    student, teacher = torch.randn(2, 3, 9, 16, dtype=torch.float64)
    references = torch.randn(3, 7, 16, dtype=torch.float64)
    student.requires_grad_()
    references.requires_grad_()
    results = []
    for loss in (fmkernels.patch_neighbor_loss, peers.patch_neighbor_loss):
        value = loss(student, teacher, references, steepness=20.0)
        results.append((value, *torch.autograd.grad(value, (student, references))))
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected)


def test_sizes_that_diffsort_leaves_unsorted_are_refused():
    refused = [n for n in range(2, 129) if not sorts("bitonic", n)]
    assert refused[:9] == [22, 38, 42, 43, 44, 45, 46, 54, 70]
    for n in refused:
        with pytest.raises(
            ValueError,
            match=rf"network: expected one that sorts {n} values.*'reflected_bitonic', "
            "'odd_even_merge', 'odd_even'",
        ):
            fmkernels.soft_sort(torch.zeros(1, n))
