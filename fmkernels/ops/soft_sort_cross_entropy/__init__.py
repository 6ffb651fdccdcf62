"""Cross entropy between a student's and a teacher's relaxed sorting of the same inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fmkernels import _checks
from fmkernels._autocast import autocasts
from fmkernels._library import GpuKernel, Op
from fmkernels.ops.soft_sort import (
    HALF,
    check_settings,
    check_sorts,
    cuda_limit,
    size_limit,
    triton_limit,
)
from fmkernels.ops.soft_sort.reference import compute_dtype
from fmkernels.ops.soft_sort_cross_entropy import reference
from fmkernels.ops.soft_sort_cross_entropy.reference import REDUCTIONS


def soft_sort_cross_entropy(
    student: Tensor,
    teacher: Tensor,
    *,
    steepness: float = 100.0,
    teacher_steepness: float | None = None,
    network: str = "bitonic",
    distribution: str = "cauchy",
    art_lambda: float = 0.25,
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Penalise a student that sorts the same inputs into another order than the teacher.

    With P and Q the relaxed permutation matrices (see :func:`fmkernels.soft_sort`) of a row of
    the student and of the teacher,

        loss = −(1/n) Σ_i Σ_j Q[i, j] · log max(P[i, j], 2⁻¹⁰⁰)

    Neither matrix is ever in memory.

    Args:
        student: (…, n) raw scores, one row per query, any floating dtype and strides.
        teacher: (…, n) likewise; no gradient flows to it.
        steepness: of the student's network, ≥ 0, per unit of score.
        teacher_steepness: of the teacher's network; that of the student if None.
        network: as in :func:`fmkernels.soft_sort`, and so are the next two.
        distribution: the soft swap's distribution function.
        art_lambda: exponent of ``logistic_phi``.
        mask: (…) weight of each query, bool or numbers, or None for 1. A query of weight 0
            contributes nothing, even if its scores are NaN.
        reduction: ``"mean"`` (Σ mask·loss / Σ mask, 0 if the sum of the mask is 0), ``"sum"``
            (Σ mask·loss) or ``"none"`` (mask·loss per query).

    Returns:
        A scalar, or (…) for ``"none"``, in the promoted dtype of student and teacher (float32
        under autocast).

    Raises:
        TypeError: a tensor is not floating-point, or a number is expected.
        ValueError: shapes, devices, network, distribution, steepness or reduction do not fit; the
            message names the argument.
        NotImplementedError: under ``vmap``. Double backward raises ``RuntimeError``.

    Numerics:
        Computed in float32 (float64 for float64) whatever the input dtype. Loss and gradient are
        finite for |score| ≤ 1e30 and a steepness up to 1e6. The student's gradient is computed in
        the forward pass and kept, (…, n) in float32; nothing else is. Bitwise deterministic.

    Source:
        Pariza et al., *NeCo*, ICLR 2025; diffsort for the networks.

    Example:
        >>> import torch, fmkernels
        >>> teacher = torch.tensor([[0.1, 0.5, 0.9]])
        >>> student = torch.tensor([[0.5, 0.1, 0.9]], requires_grad=True)
        >>> loss = fmkernels.soft_sort_cross_entropy(student, teacher)
        >>> loss.backward()
        >>> student.grad[0, 0] > 0 > student.grad[0, 1]  # the first should sink, the second rise
        tensor(True)
    """
    settings = (steepness, teacher_steepness, network, distribution, art_lambda, reduction)
    if is_compiling():
        _check(student, teacher, *settings)
        wide = False
    else:
        wide, settings = _checks.once(_checked, settings, student, teacher)
    if mask is not None:
        mask = check_mask(NAME, mask, student)
    if not wide:
        dtype = torch.promote_types(student.dtype, teacher.dtype)
        if dtype == torch.float64:
            student, teacher = student.to(dtype), teacher.to(dtype)
        elif dtype in HALF and autocasts(student):
            dtype = torch.float32
    run = SOFT_SORT_CROSS_ENTROPY_LOSS
    if torch.is_grad_enabled():
        if student.requires_grad:
            run = SOFT_SORT_CROSS_ENTROPY
        if teacher.requires_grad:
            teacher = teacher.detach()
    if mask is None and not settings:  # to parse an argument takes as long as to sort a few values
        loss: Tensor = run(student, teacher)
    else:
        loss = run(student, teacher, mask, *settings)
    return loss if wide else loss.to(dtype)


NAME = "soft_sort_cross_entropy"


def _check(
    student: Tensor,
    teacher: Tensor,
    steepness: float,
    teacher_steepness: float | None,
    network: str,
    distribution: str,
    art_lambda: float,
    reduction: str,
) -> None:
    _checks.floating_tensor(NAME, "student", student)
    _checks.like(NAME, "teacher", teacher, "student", student)
    check_settings(NAME, steepness, network, distribution, art_lambda)
    if teacher_steepness is not None:
        _checks.non_negative(NAME, "teacher_steepness", teacher_steepness)
    _checks.choice(NAME, "reduction", reduction, REDUCTIONS)


def _checked(student: Tensor, teacher: Tensor, *settings: Any) -> tuple[bool, tuple[Any, ...]]:
    """Whether both have the same wide dtype, and the settings for the op."""
    _check(student, teacher, *settings)
    check_sorts(NAME, settings[2], student.shape[-1])
    wide = student.dtype == teacher.dtype and student.dtype not in HALF
    return wide, SOFT_SORT_CROSS_ENTROPY.without_defaults(*_checks.plain(settings))


def check_mask(op: str, mask: Any, student: Tensor) -> Tensor:
    """One weight per row of ``student``, outside of the graph, in float32 (or float64)."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"{op}: mask: expected a torch.Tensor, got {type(mask).__name__}")
    if mask.shape != student.shape[:-1]:
        raise ValueError(
            f"{op}: mask: expected one weight per query, shape {tuple(student.shape[:-1])}, "
            f"got {_checks.shape(mask)}"
        )
    if mask.is_complex():
        raise TypeError(f"{op}: mask: expected bool or real numbers, got {mask.dtype}")
    _checks.same_device(op, "mask", mask, "student", student)
    return mask.detach().to(torch.float64 if student.dtype == torch.float64 else torch.float32)


def _fake_loss(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    steepness: float = 100.0,
    teacher_steepness: float | None = None,
    network: str = "bitonic",
    distribution: str = "cauchy",
    art_lambda: float = 0.25,
    reduction: str = "mean",
) -> Tensor:
    check_sorts(NAME, network, student.shape[-1])
    shape = student.shape[:-1] if reduction == "none" else ()
    return student.new_empty(shape, dtype=compute_dtype(student.dtype))


def _fake(student: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    loss = _fake_loss(student, *others)
    return loss, student.new_empty(student.shape, dtype=loss.dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, grad_student = output
    ctx.mark_non_differentiable(grad_student)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad_student, inputs[0])  # the student so that double backward refuses


def _backward(ctx: Any, _: bool, grad_loss: Tensor | None, *__: None) -> Tensor | None:
    if grad_loss is None:
        return None
    grad_student, student = ctx.saved_tensors
    grad: Tensor = grad_student * (grad_loss.unsqueeze(-1) if grad_loss.ndim else grad_loss)
    return grad if grad.dtype is student.dtype else grad.to(student.dtype)


_ARGUMENTS = (
    "Tensor student, Tensor teacher, Tensor? mask=None, float steepness=100.0, "
    'float? teacher_steepness=None, str network="bitonic", str distribution="cauchy", '
    'float art_lambda=0.25, str reduction="mean"'
)

HERE = "fmkernels.ops.soft_sort_cross_entropy"


def _gpu_kernels(with_grad: bool) -> tuple[GpuKernel, ...]:
    limit = cuda_limit(with_teacher=True, with_grad=with_grad)

    def cuda(
        student: Tensor,
        teacher: Tensor,
        mask: Tensor | None = None,
        steepness: float = 100.0,
        teacher_steepness: float | None = None,
        *settings: Any,
    ) -> str | None:
        return limit(student, steepness, *settings)

    return (
        GpuKernel("cuda", f"{HERE}.cuda", cuda),
        GpuKernel("triton", f"{HERE}.triton", triton_limit),
    )


SOFT_SORT_CROSS_ENTROPY = Op(
    NAME,
    f"({_ARGUMENTS}) -> (Tensor loss, Tensor grad_student)",
    reference=reference.soft_sort_cross_entropy,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    only_first=True,
    limits=size_limit,
    gpu=_gpu_kernels(with_grad=True),
)

SOFT_SORT_CROSS_ENTROPY_LOSS = Op(
    f"{NAME}_loss",
    f"({_ARGUMENTS}) -> Tensor",
    reference=reference.soft_sort_cross_entropy_loss,
    fake=_fake_loss,
    limits=size_limit,
    gpu=_gpu_kernels(with_grad=False),
)
"""For calls without a gradient."""
