"""Dropout by seed and position: backward makes it again, and nothing is kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fmkernels._library import GpuKernel, Op
from fmkernels.ops.vera_dropout import cpp, reference
from fmkernels.ops.vera_shrink.gpu_config import limits


def vera_dropout(x: Tensor, p: float, *, seed: int | None = None) -> Tensor:
    """Numbers of x (…, m), each zero with probability p and otherwise divided by 1 − p.

    Which ones depends on the seed, the row and the column alone, on every device. Without a seed
    one is drawn from PyTorch's generator.
    """
    if seed is None:
        drawn = torch.randint(2**63 - 1, (), dtype=torch.int64, device=x.device)
    else:
        drawn = torch.full((), seed, dtype=torch.int64, device=x.device)
    dropped: Tensor = VERA_DROPOUT(x.reshape(-1, x.shape[-1]), drawn, p)
    return dropped.reshape(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, seed, ctx.p = inputs
    ctx.save_for_backward(seed)


def _backward(ctx: Any, on_reference: bool, grad: Tensor) -> Tensor:
    (seed,) = ctx.saved_tensors
    grad_x: Tensor = VERA_DROPOUT.run(on_reference, grad, seed, ctx.p)
    return grad_x


VERA_DROPOUT = Op(
    "vera_dropout",
    "(Tensor x, Tensor seed, float p) -> Tensor",
    reference=reference.vera_dropout,
    cpu=cpp.vera_dropout,
    fake=lambda x, seed, p: torch.empty_like(x, memory_format=torch.contiguous_format),
    setup_context=_setup_context,
    backward=_backward,
    gpu=(GpuKernel("triton", "fmkernels.ops.vera_dropout.gpu", limits),),
)
"""(T, m), () int64 -> (T, m)."""
