"""Cross entropy between two relaxed permutations, in PyTorch: the definition.

For each query, with P and Q the relaxed permutation matrices of the student's and the teacher's
scores (see ``ops/soft_sort/reference.py``),

    loss = −(1/n) Σ_i Σ_j Q[i, j] · log max(P[i, j], 2⁻¹⁰⁰)

whose gradient with respect to P is −Q/(n·P), and 0 where the maximum clamps. The rows i of P and
Q are independent chains, so they are built, compared and differentiated a few at a time, and
neither matrix exists as a whole. The loss is linear in the gradient that arrives at it; so the
gradient of the student's scores is computed here, in the forward pass, and backward scales it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fmkernels.ops.soft_sort.reference import (
    add_keep_gradient,
    compute_dtype,
    identity_rows,
    row_chunks,
    sort_rows,
    sort_values,
    sort_values_backward,
)

FLOOR = 2.0**-100
"""Probabilities below this count as this: the logarithm stays finite."""

REDUCTIONS = ("none", "mean", "sum")


def row_weights(losses: Tensor, mask: Tensor | None, reduction: str) -> Tensor:
    """The weight of every query in the reduced loss, (queries,)."""
    if mask is None:
        weights = torch.ones_like(losses)
        total = torch.full((), len(losses), dtype=losses.dtype, device=losses.device)
    else:
        weights = mask.reshape(-1).to(losses.dtype)
        total = weights.sum()
    if reduction == "mean":
        weights = torch.where(total == 0, torch.zeros_like(weights), weights / total)
    return weights


def check_counts(student: Tensor, teacher: Tensor, mask: Tensor | None) -> None:
    """Guards the memory of whoever calls an op itself; the public functions check in words."""
    if teacher.shape != student.shape:
        raise ValueError(f"teacher: expected shape {student.shape}, got {teacher.shape}")
    if mask is not None and mask.numel() * student.shape[-1] != student.numel():
        raise ValueError(f"mask: expected one weight per row of {student.shape}, got {mask.shape}")


def weighted(weights: Tensor, values: Tensor) -> Tensor:
    """weights·values in which a weight of zero removes even a NaN."""
    return torch.where(weights == 0, torch.zeros_like(values), weights * values)


def soft_sort_cross_entropy(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    steepness: float = 100.0,
    teacher_steepness: float | None = None,
    network: str = "bitonic",
    distribution: str = "cauchy",
    art_lambda: float = 0.25,
    reduction: str = "mean",
    *,
    compute_grad: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """(…, n), (…, n) -> the reduced loss, and its gradient in the student's scores (or None).

    Both in float32, or float64 for a student of that.
    """
    check_counts(student, teacher, mask)
    n = student.shape[-1]
    dtype = compute_dtype(student.dtype)
    x, y = student.reshape(-1, n).to(dtype), teacher.reshape(-1, n).to(dtype)
    if teacher_steepness is None:
        teacher_steepness = steepness
    _, trace = sort_values(x, steepness, network, distribution, art_lambda)
    _, teacher_trace = sort_values(y, teacher_steepness, network, distribution, art_lambda)
    losses = x.new_zeros(len(x))
    grad_keep = [torch.zeros_like(layer.keep) for layer in trace]
    for rows in row_chunks(x, trace):
        p, differences = sort_rows(identity_rows(x, rows), trace)
        q, _ = sort_rows(identity_rows(x, rows), teacher_trace)
        losses -= (q * p.clamp_min(FLOOR).log()).sum(dim=(1, 2)) / n
        if compute_grad:
            grad = torch.where(p > FLOOR, -q / (n * p), torch.zeros_like(p))
            add_keep_gradient(grad_keep, grad, differences, trace)

    weights = row_weights(losses, mask, reduction)
    loss = weighted(weights, losses)
    loss = loss.reshape(student.shape[:-1]) if reduction == "none" else loss.sum()
    if not compute_grad:
        return loss, None
    grad_student = sort_values_backward(torch.zeros_like(x), grad_keep, trace)
    grad_student = weighted(weights[:, None], grad_student)
    return loss, grad_student.reshape(student.shape)


def soft_sort_cross_entropy_loss(*args: Any) -> Tensor:
    """Only the loss, of the same arguments."""
    return soft_sort_cross_entropy(*args, compute_grad=False)[0]
