"""The wirings: they sort, and ``sorts`` knows when they don't (0-1 principle)."""

import numpy as np
import pytest
import torch

import fmkernels
from fmkernels.ops.soft_sort.networks import NETWORKS, layers, sorts


def run(network, patterns):
    """Hard comparators on 0-1 patterns (patterns, n)."""
    state = patterns.copy()
    for lo, hi in layers(network, patterns.shape[1]):
        a, b = state[:, lo], state[:, hi]
        state[:, lo], state[:, hi] = a & b, a | b
    return state


def is_sorted(patterns):
    return bool(np.all(patterns[:, :-1] <= patterns[:, 1:]))


@pytest.mark.parametrize("network", NETWORKS)
def test_all_patterns_of_small_sizes(network):
    for n in range(1, 17):
        patterns = (np.arange(2**n)[:, None] >> np.arange(n)) & 1
        assert is_sorted(run(network, patterns.astype(bool))) == sorts(network, n), n


@pytest.mark.parametrize("network", NETWORKS[1:])
def test_the_others_sort_every_size(network):
    rng = np.random.default_rng(0)
    for n in [*range(17, 130), 196, 255, 256, 257, 511, 1023, 1024]:
        density = rng.random((300, 1))
        assert is_sorted(run(network, rng.random((300, n)) < density)), n


def test_bitonic_fails_exactly_where_sorts_says():
    rng = np.random.default_rng(0)
    for n in range(17, 129):
        found = is_sorted(run("bitonic", rng.random((5_000, n)) < rng.random((5_000, 1))))
        assert found == sorts("bitonic", n), n


def test_bitonic_sorts_the_usual_numbers_of_patches():
    assert all(sorts("bitonic", n) for n in (49, 64, 81, 100, 121, 144, 196, 225, 256))


@pytest.mark.parametrize("network", NETWORKS)
def test_no_wire_twice_in_a_layer(network):
    for n in (2, 7, 49, 100):
        for lo, hi in layers(network, n):
            assert len({*lo, *hi}) == 2 * len(lo)


def test_comparators_at_49():
    count = {name: sum(len(lo) for lo, _ in layers(name, 49)) for name in NETWORKS}
    assert count == {
        "bitonic": 483, "reflected_bitonic": 483, "odd_even_merge": 394, "odd_even": 1176,
    }  # fmt: skip


@pytest.mark.parametrize("network", NETWORKS)
def test_becomes_the_hard_sort(network):
    for n in (2, 7, 33, 49, 129):
        x = torch.stack([torch.randperm(n) for _ in range(5)]).double()
        values, permutation = fmkernels.soft_sort(
            x, steepness=1e4, network=network, distribution="logistic"
        )
        torch.testing.assert_close(values, x.sort(dim=-1).values)
        assert torch.equal(permutation.argmax(dim=-1), x.argsort(dim=-1).argsort(dim=-1))
