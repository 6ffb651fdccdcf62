"""DiffSortNet is a drop-in for diffsort's."""

import copy

import diffsort
import pytest
import torch

from fmkernels.api import DiffSortNet


@pytest.mark.parametrize(
    "arguments",
    [
        (("bitonic", 16), {}),
        (("odd_even", 7, "cpu", 20.0, 0.25, None, "logistic"), {}),
        (("bitonic", 49, "cpu"), {"steepness": 100.0, "distribution": "optimal"}),
        (("odd_even", 6), {"interpolation_type": "logistic_phi", "art_lambda": 0.5}),
    ],
)
def test_same_constructor_and_results(arguments):
    positional, named = arguments
    ours, theirs = (net(*positional, **named) for net in (DiffSortNet, diffsort.DiffSortNet))
    x = torch.randn(5, positional[1], dtype=torch.float64) * 0.15
    for a, b in zip(ours(x), theirs(x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert ours.state_dict() == theirs.state_dict() == {}
    for name in ("sorting_network_type", "size", "steepness", "art_lambda", "distribution"):
        assert getattr(ours, name) == getattr(theirs, name)


def test_is_a_module_like_any_other():
    sorter = DiffSortNet("bitonic", 8)
    x = torch.randn(2, 8)
    assert torch.equal(copy.deepcopy(sorter)(x)[1], sorter(x)[1])
    assert sorter.to("meta")(x.to("meta"))[1].shape == (2, 8, 8)
    assert sorter.half()(x.half())[1].dtype == torch.float16
    assert repr(sorter).startswith("DiffSortNet('bitonic', 8, steepness=10.0")


def test_inductor_gives_the_same():
    sorter = DiffSortNet("bitonic", 8)
    compiled = torch.compile(sorter, fullgraph=True)
    x = torch.randn(4, 8, requires_grad=True)
    weights = torch.randn(4, 8), torch.randn(4, 8, 8)
    results = [
        (*outputs, *torch.autograd.grad(outputs, x, weights))
        for outputs in (compiled(x), sorter(x))
    ]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("bitonic", 22), "network: expected one that sorts 22 values"),
        (("merge", 8), "sorting_network_type: expected one of"),
        (("bitonic", 0), "size: expected an integer >= 1, got 0"),
        (("bitonic", 8, "cpu", -1.0), "steepness: expected a finite number"),
        (("bitonic", 8, "cpu", 1.0, 0.25, "logistic", "optimal"), "interpolation_type: expected"),
    ],
)
def test_refuses_at_construction(arguments, message):
    with pytest.raises(ValueError, match=message):
        DiffSortNet(*arguments)


@pytest.mark.parametrize("shape", [(8,), (2, 7), (2, 3, 8)])
def test_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match=r"DiffSortNet: vectors: expected shape \(batch, 8\)"):
        DiffSortNet("bitonic", 8)(torch.zeros(shape))


def test_messages_name_the_module_and_its_arguments():
    with pytest.raises(ValueError, match=r"^DiffSortNet: interpolation_type: expected one of"):
        DiffSortNet("bitonic", 8, interpolation_type="nope")
    sorter = DiffSortNet("bitonic", 8)
    for vectors in ([1.0] * 8, torch.zeros(1, 8, dtype=torch.int64), torch.zeros(1, 8).to_sparse()):
        with pytest.raises(TypeError, match=r"^DiffSortNet: vectors: expected a"):
            sorter(vectors)
