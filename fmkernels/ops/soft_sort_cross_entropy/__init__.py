"""Cross entropy between a student's and a teacher's relaxed sorting of the same inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fmkernels import _checks
from fmkernels._library import Op
from fmkernels.ops.soft_sort import HALF, check_settings, check_sorts, size_limit
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
        Pariza et al., *NeCo*, ICLR 2025, equation 5; diffsort for the networks.

    Example:
        >>> import torch, fmkernels
        >>> teacher = torch.tensor([[0.1, 0.5, 0.9]])
        >>> student = torch.tensor([[0.5, 0.1, 0.9]], requires_grad=True)
        >>> loss = fmkernels.soft_sort_cross_entropy(student, teacher)
        >>> loss.backward()
        >>> student.grad[0, 0] > 0 > student.grad[0, 1]  # the first should sink, the second rise
        tensor(True)
    """
    op = "soft_sort_cross_entropy"
    _checks.floating_tensor(op, "student", student)
    _checks.like(op, "teacher", teacher, "student", student)
    if teacher_steepness is None:
        teacher_steepness = steepness
    else:
        _checks.non_negative(op, "teacher_steepness", teacher_steepness)
    check_settings(op, network, distribution, student.shape[-1], steepness, art_lambda)
    if reduction not in REDUCTIONS:
        _checks.choice(op, "reduction", reduction, REDUCTIONS)
    if mask is not None:
        mask = _check_mask(op, mask, student)
    if student.dtype is not teacher.dtype:
        dtype = torch.promote_types(student.dtype, teacher.dtype)
        student, teacher = student.to(dtype), teacher.to(dtype)
    if student.dtype in HALF and torch.is_autocast_enabled(student.device.type):
        student, teacher = student.float(), teacher.float()

    needs_grad = student.requires_grad and torch.is_grad_enabled()
    loss, _ = SOFT_SORT_CROSS_ENTROPY(
        student,
        teacher.detach() if teacher.requires_grad else teacher,
        mask,
        steepness,
        teacher_steepness,
        network,
        distribution,
        art_lambda,
        reduction,
        needs_grad,
    )
    return loss  # type: ignore[no-any-return]


def _check_mask(op: str, mask: Any, student: Tensor) -> Tensor:
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


def _fake(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    steepness: float,
    teacher_steepness: float,
    network: str,
    distribution: str,
    art_lambda: float,
    reduction: str,
    compute_grad: bool,
) -> tuple[Tensor, Tensor]:
    check_sorts("soft_sort_cross_entropy", network, student.shape[-1])
    loss = student.new_empty(student.shape[:-1] if reduction == "none" else ())
    dtype = reference.compute_dtype(student.dtype)
    return loss, student.new_empty(student.shape if compute_grad else (0,), dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, grad_student = output
    ctx.dtype = inputs[0].dtype
    ctx.computed_grad = inputs[-1]
    ctx.per_query = inputs[-2] == "none"
    ctx.mark_non_differentiable(grad_student)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad_student, inputs[0])  # the student so that double backward refuses


def _backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 10
    if not ctx.computed_grad:
        raise RuntimeError(
            "soft_sort_cross_entropy: compute_grad: expected True for a backward pass, got False"
        )
    grad_student, _ = ctx.saved_tensors
    grad = grad_student * (grad_loss.unsqueeze(-1) if ctx.per_query else grad_loss)
    return (grad if grad.dtype == ctx.dtype else grad.to(ctx.dtype), *(None,) * 9)


SOFT_SORT_CROSS_ENTROPY = Op(
    "soft_sort_cross_entropy",
    "(Tensor student, Tensor teacher, Tensor? mask, float steepness, float teacher_steepness, "
    "str network, str distribution, float art_lambda, str reduction, bool compute_grad) "
    "-> (Tensor loss, Tensor grad_student)",
    reference=reference.soft_sort_cross_entropy,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    limits=size_limit,
)
