"""NeCo's loss: student and teacher patches must order the same references alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import functional as F

from fmkernels import _checks
from fmkernels._autocast import product_dtype, without_autocast
from fmkernels.ops.soft_sort import check_settings, check_sorts
from fmkernels.ops.soft_sort_cross_entropy import check_mask, soft_sort_cross_entropy
from fmkernels.ops.soft_sort_cross_entropy.reference import REDUCTIONS

METRICS = ("cosine", "euclidean")


def patch_neighbor_loss(
    student: Tensor,
    teacher: Tensor,
    references: Tensor,
    *,
    metric: str = "cosine",
    mask: Tensor | None = None,
    reduction: str = "mean",
    steepness: float = 100.0,
    teacher_steepness: float | None = None,
    network: str = "bitonic",
    distribution: str = "cauchy",
    art_lambda: float = 0.25,
) -> Tensor:
    """Penalise student patches whose neighbours among the references are in another order.

    With S[b, q, r] the cosine similarity of patch q to reference r of the same image (for
    ``"euclidean"`` their distance), sorted ascending by a relaxed network:

        loss = soft_sort_cross_entropy(S(student, references), S(teacher, references))

    Args:
        student: (B, N, D) patch features; need not be normalised.
        teacher: (B, N, D) features of the same patches; never in the graph.
        references: (B, R, D) patches to be ordered; R is the length of the sorted rows. Their
            gradient is that of the student's term.
        metric: ``"cosine"`` normalises the features; ``"euclidean"`` takes them as they are.
        mask: (B, N) weight of each patch, bool or numbers, or None. A patch of weight 0 contributes
            nothing to loss or gradients, even if its features are NaN.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (B, N); as in
            :func:`fmkernels.soft_sort_cross_entropy`, and so are the remaining arguments.
        steepness: of the student's sort.
        teacher_steepness: of the teacher's sort; that of the student if None.
        network: the wiring.
        distribution: the soft swap's distribution function.
        art_lambda: exponent of ``logistic_phi``.

    Returns:
        A scalar, or (B, N) for ``"none"``; float32 for half-precision features.

    Raises:
        TypeError: a tensor is not floating-point, or a number is expected.
        ValueError: an argument does not fit; the message names it.

    Numerics:
        Similarities are computed in float32 (float64 for float64), also under autocast; and in
        float64 where ``torch.set_float32_matmul_precision`` would round their factors: at a
        steepness of 100 that would reorder neighbours.

    Source:
        Pariza et al., *NeCo*, ICLR 2025.

    Example:
        >>> import torch, fmkernels
        >>> features = torch.randn(2, 49, 64, generator=torch.Generator().manual_seed(0))
        >>> student = (features + 0.1).requires_grad_()
        >>> loss = fmkernels.patch_neighbor_loss(student, features, features.roll(1, dims=0))
        >>> loss.backward()
        >>> student.grad.shape
        torch.Size([2, 49, 64])
    """
    op = "patch_neighbor_loss"
    _check_features(op, student, teacher, references)
    if metric not in METRICS:
        _checks.choice(op, "metric", metric, METRICS)
    check_settings(op, steepness, network, distribution, art_lambda)
    if teacher_steepness is not None:
        _checks.non_negative(op, "teacher_steepness", teacher_steepness)
    _checks.choice(op, "reduction", reduction, REDUCTIONS)
    if not is_compiling():  # the op itself checks it when it is traced
        check_sorts(op, network, references.shape[1])
    if mask is not None:
        mask = check_mask(op, mask, student)
        out = (mask == 0).unsqueeze(-1)  # so that a NaN there reaches no gradient
        student, teacher = student.masked_fill(out, 0), teacher.masked_fill(out, 0)
    dtype = torch.float32
    for features in (student, teacher, references):
        dtype = torch.promote_types(dtype, features.dtype)

    with without_autocast(student):
        references = references.to(dtype)
        student_scores = _scores(student.to(dtype), references, metric)
        with torch.no_grad():
            teacher_scores = _scores(teacher.to(dtype), references, metric)
        return soft_sort_cross_entropy(
            student_scores,
            teacher_scores,
            steepness=steepness,
            teacher_steepness=teacher_steepness,
            network=network,
            distribution=distribution,
            art_lambda=art_lambda,
            mask=mask,
            reduction=reduction,
        )


def _scores(patches: Tensor, references: Tensor, metric: str) -> Tensor:
    """(B, N, D), (B, R, D) -> (B, N, R)"""
    if metric == "cosine":
        wide = product_dtype(patches)
        a, b = (F.normalize(features, dim=-1).to(wide) for features in (patches, references))
        return (a @ b.mT).to(patches.dtype)
    # the matrix-product form of cdist loses the small distances to cancellation
    return torch.cdist(patches, references, compute_mode="donot_use_mm_for_euclid_dist")


def _check_features(op: str, student: Any, teacher: Any, references: Any) -> None:
    for argument, value, layout in (
        ("student", student, "(B, N, D)"),
        ("teacher", teacher, "(B, N, D)"),
        ("references", references, "(B, R, D)"),
    ):
        _checks.floating_tensor(op, argument, value)
        _checks.dimensions(op, argument, value, layout)
        _checks.same_device(op, argument, value, "student", student)
    _checks.like(op, "teacher", teacher, "student", student)
    batch, _, dim = student.shape
    if references.shape[0] != batch or references.shape[2] != dim or references.shape[1] < 1:
        raise ValueError(
            f"{op}: references: expected shape (B, R, D) = ({batch}, at least 1, {dim}) "
            f"to go with student, got {_checks.shape(references)}"
        )
