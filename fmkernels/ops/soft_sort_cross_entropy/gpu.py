"""soft_sort_cross_entropy on NVIDIA GPUs: what its kernels share, which is all but the launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fmkernels.ops.soft_sort_cross_entropy.reference import check_counts, row_weights


def loss_and_gradient(
    launch: Callable[..., None],
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

    Args:
        launch: the kernel: takes student, teacher, the weight of every query (queries), where to
            write the losses (…) and the gradient (…, n) or None, all float32 but the first two, and
            the steepness of both, network, distribution and art_lambda.
        student: and all that follows, as in the reference.
    """
    check_counts(student, teacher, mask)
    losses = torch.empty(student.shape[:-1], dtype=torch.float32, device=student.device)
    grad = None
    if compute_grad:
        grad = torch.empty(student.shape, dtype=torch.float32, device=student.device)
    if losses.numel() > 0:
        weights = row_weights(losses.flatten(), mask, reduction)
        if teacher_steepness is None:
            teacher_steepness = steepness
        settings = (steepness, teacher_steepness, network, distribution, art_lambda)
        launch(student, teacher, weights, losses, grad, *settings)
    return losses if reduction == "none" else losses.sum(), grad


def loss_alone(launch: Callable[..., None], *args: Any) -> Tensor:
    """Only the loss, of the same arguments."""
    return loss_and_gradient(launch, *args, compute_grad=False)[0]
