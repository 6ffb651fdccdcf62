"""soft_sort_cross_entropy on NVIDIA GPUs with the CUDA library: what surrounds the launch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fmkernels import _cuda  # type: ignore[attr-defined]
from fmkernels.ops.soft_sort.cuda import dense, launch_arguments
from fmkernels.ops.soft_sort_cross_entropy.reference import check_counts, row_weights


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
    """(…, n), (…, n) -> the reduced loss, and its gradient in the student's scores (or None)."""
    check_counts(student, teacher, mask)
    x, y = dense(student), dense(teacher)
    losses = x.new_empty(x.shape[:-1])
    grad = torch.empty_like(x) if compute_grad else None
    if losses.numel() > 0:
        weights = row_weights(losses.flatten(), mask, reduction)
        settings = (steepness, network, distribution, art_lambda)
        _cuda.soft_sort_cross_entropy(
            *launch_arguments(x, *settings, with_teacher=True, with_grad=compute_grad),
            y.data_ptr(),
            steepness if teacher_steepness is None else teacher_steepness,
            weights.data_ptr(),
            losses.data_ptr(),
            0 if grad is None else grad.data_ptr(),
        )
    loss = losses if reduction == "none" else losses.sum()
    return loss.to(student.dtype), grad


def soft_sort_cross_entropy_loss(*args: Any) -> Tensor:
    """Only the loss, of the same arguments."""
    return soft_sort_cross_entropy(*args, compute_grad=False)[0]
