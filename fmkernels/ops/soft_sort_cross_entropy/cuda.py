"""soft_sort_cross_entropy on NVIDIA GPUs with the CUDA library."""

from __future__ import annotations

import functools

from torch import Tensor

import fmkernels._cuda as _cuda
from fmkernels.ops.soft_sort.cuda import dense, launch_arguments
from fmkernels.ops.soft_sort_cross_entropy.gpu import loss_alone, loss_and_gradient


def launch(
    student: Tensor,
    teacher: Tensor,
    weights: Tensor,
    losses: Tensor,
    grad: Tensor | None,
    steepness: float,
    teacher_steepness: float,
    network: str,
    distribution: str,
    art_lambda: float,
) -> None:
    """Start the kernel; see ``gpu.py`` for the arguments."""
    x, y = dense(student), dense(teacher)
    settings = (steepness, network, distribution, art_lambda)
    _cuda.soft_sort_cross_entropy(
        *launch_arguments(x, *settings, with_teacher=True, with_grad=grad is not None),
        y.data_ptr(),
        teacher_steepness,
        weights.data_ptr(),
        losses.data_ptr(),
        0 if grad is None else grad.data_ptr(),
    )


soft_sort_cross_entropy = functools.partial(loss_and_gradient, launch)
soft_sort_cross_entropy_loss = functools.partial(loss_alone, launch)
