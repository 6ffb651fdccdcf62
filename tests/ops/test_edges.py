"""What nobody means to do, and what then happens."""

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad

import fmkernels
from fmkernels.api import DiffSortNet

BACKENDS = ("auto", "reference")


@pytest.mark.parametrize("shape", [(), (3, 0)])
def test_an_op_called_by_its_own_name_survives_a_bad_shape(shape):
    bad = torch.ones(shape)
    for call in (
        lambda: torch.ops.fmkernels.soft_sort(bad),
        lambda: torch.ops.fmkernels.soft_sort_backward(bad, None, bad),
        lambda: torch.ops.fmkernels.soft_sort_cross_entropy(bad, bad, reduction="none"),
        lambda: torch.ops.fmkernels.soft_sort_cross_entropy_loss(bad, bad),
    ):
        with pytest.raises((RuntimeError, ValueError, IndexError)):
            call()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", ["teacher", "mask"])
def test_an_op_called_by_its_own_name_refuses_other_counts(backend, bad):
    scores = torch.rand(4, 7)
    teacher = torch.rand(3 if bad == "teacher" else 4, 7)
    mask = torch.ones(5) if bad == "mask" else None
    name = "soft_sort_cross_entropy" + ("" if backend == "auto" else "_reference")
    call = getattr(torch.ops.fmkernels, name)
    with pytest.raises((RuntimeError, ValueError), match=bad):
        call(scores, teacher, mask)


def test_forward_mode_is_refused():
    x, y, tangent = torch.rand(3, 2, 7).unbind()
    for function in (
        lambda a: fmkernels.soft_sort_cross_entropy(a, y),
        lambda a: fmkernels.soft_sort(a)[0],
    ):
        with pytest.raises((NotImplementedError, RuntimeError), match=r"forward|jvp"):
            torch.func.jvp(function, (x,), (tangent,))
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
            function(forward_ad.make_dual(x, tangent))
        with forward_ad.dual_level():
            function(x)  # without a tangent it is an input like any other


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_a_masked_patch_of_nan_reaches_no_gradient(metric):
    tensors = torch.randn(3, 2, 5, 8, generator=torch.Generator().manual_seed(0)).unbind()
    student, teacher, references = (tensor.clone() for tensor in tensors)
    mask = torch.ones(2, 5)
    mask[1, 2] = 0
    results = []
    for value in (0.5, float("nan")):
        student[1, 2] = teacher[1, 2] = value
        leaves = [t.clone().requires_grad_() for t in (student, references)]
        loss = fmkernels.patch_neighbor_loss(
            leaves[0], teacher, leaves[1], mask=mask, metric=metric
        )
        loss.backward()
        results.append((loss.detach(), *(leaf.grad for leaf in leaves)))
    for clean, dirty in zip(*results, strict=True):
        assert clean.isfinite().all()
        assert torch.equal(clean, dirty)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_weight_of_nan_shows(backend, reduction):
    student, teacher = torch.rand(2, 4, 7).unbind()
    student.requires_grad_()
    mask = torch.tensor([1, float("nan"), 0, 1])
    with fmkernels.backend(backend):
        loss = fmkernels.soft_sort_cross_entropy(student, teacher, mask=mask, reduction=reduction)
    loss.sum().backward()
    assert loss.isnan().any()
    assert student.grad[1].isnan().all()


def test_a_backward_pass_of_the_reference_stays_there():
    scores = torch.rand(2, 7, requires_grad=True)
    with fmkernels.backend("reference"):
        values, _ = fmkernels.soft_sort(scores)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        values.sum().backward()
    called = {event.key for event in profile.key_averages()}
    assert "fmkernels::soft_sort_backward_reference" in called
    assert "fmkernels::soft_sort_backward" not in called


def test_a_long_row_may_be_differentiated_under_a_forced_kernel():
    scores = torch.rand(1, 1025, requires_grad=True)
    values, _ = fmkernels.soft_sort(scores, network="odd_even_merge")
    with fmkernels.backend("cpp"):
        values.sum().backward()
    assert scores.grad.isfinite().all()


def test_long_rows_of_a_network_that_may_not_sort_are_refused_at_once():
    with pytest.raises(ValueError, match="decided up to 1536"):
        fmkernels.soft_sort(torch.rand(1, 2000))
    assert fmkernels.soft_sort(torch.rand(1, 1025), network="odd_even_merge")[0].shape == (1, 1025)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_meta_device(dtype):
    a = torch.empty(2, 5, 8, dtype=dtype, device="meta")
    assert fmkernels.soft_sort(a)[1].shape == (2, 5, 8, 8)
    assert fmkernels.soft_sort_cross_entropy(a, a).shape == ()
    assert fmkernels.patch_neighbor_loss(a, a, a, mask=a[..., 0].bool()).shape == ()


def test_a_module_is_made_without_running_anything():
    with fmkernels.backend("triton"):
        assert DiffSortNet("odd_even", np.int64(7)).size == 7
    for size in (0, 2.5, "7", None):
        with pytest.raises(ValueError, match="DiffSortNet: size"):
            DiffSortNet("odd_even", size)


@pytest.mark.parametrize(
    ("argument", "value"),
    [("steepness", -1.0), ("teacher_steepness", -1.0), ("network", "x"), ("reduction", "x")],
)
def test_messages_name_the_function_that_was_called(argument, value):
    a = torch.rand(2, 5, 8)
    with pytest.raises(ValueError, match=f"patch_neighbor_loss: {argument}"):
        fmkernels.patch_neighbor_loss(a, a, a, **{argument: value})
    with pytest.raises(ValueError, match="patch_neighbor_loss: mask"):
        fmkernels.patch_neighbor_loss(a, a, a, mask=torch.ones(3))
    b = torch.rand(2, 22, 8)
    with pytest.raises(ValueError, match="patch_neighbor_loss: network"):
        fmkernels.patch_neighbor_loss(b, b, b)
