"""DVoRA's magnitude on NVIDIA GPUs: the kernels of ``triton.py``, and the sum of their parts."""

from __future__ import annotations

import torch
from torch import Tensor

from fmkernels.ops.dvora_linear import reference
from fmkernels.ops.dvora_linear.gpu_config import Rows, rows_plan
from fmkernels.ops.dvora_linear.triton import dvora_scale_backward_kernel, dvora_scale_kernel
from fmkernels.ops.vera_shrink.gpu import sums


def dvora_scale(before: Tensor, magnitude: Tensor, norms: Tensor, bias: Tensor | None) -> Tensor:
    """(T, n), (n), (n), (n) -> (T, n) in the dtype of ``before``."""
    tokens, width = before.shape
    y = torch.empty_like(before, memory_format=torch.contiguous_format)
    if not y.numel():
        return y
    magnitude, norms = magnitude.contiguous(), norms.contiguous()
    plan = rows_plan(tokens, width)
    dvora_scale_kernel[(-(-tokens // plan.rows) * -(-width // plan.columns),)](
        before,
        magnitude,
        norms,
        norms if bias is None else bias.contiguous(),
        y,
        tokens,
        width,
        *before.stride(),
        BIAS=bias is not None,
        BT=plan.rows,
        BN=plan.columns,
        num_warps=plan.num_warps,
        enable_fp_fusion=True,
    )
    return y


def dvora_scale_backward(
    grad: Tensor, before: Tensor, magnitude: Tensor, norms: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``before``, of the magnitude, and of the bias in float32."""
    if not grad.numel():
        return reference.dvora_scale_backward(grad, before, magnitude, norms)
    plan = rows_plan(*grad.shape)
    result, parts = scale_backward(grad, before, magnitude.contiguous(), norms.contiguous(), plan)
    of_c, of_bias = sums(parts, norms.dtype)[0].view(2, -1).unbind()
    return result, (of_c / norms).to(magnitude.dtype), of_bias


def scale_backward(
    grad: Tensor, before: Tensor, magnitude: Tensor, norms: Tensor, plan: Rows
) -> tuple[Tensor, Tensor]:
    """c ⊙ G (T, n), and parts (parts, 2 n) of the sums of G ⊙ P and of G."""
    tokens, width = grad.shape
    result = torch.empty_like(before, memory_format=torch.contiguous_format)
    parts = torch.empty(plan.parts, 2 * width, dtype=torch.float32, device=grad.device)
    dvora_scale_backward_kernel[(plan.parts * -(-width // plan.columns),)](
        grad,
        before,
        magnitude,
        norms,
        result,
        parts,
        tokens,
        width,
        plan.tokens,
        *grad.stride(),
        *before.stride(),
        BT=plan.rows,
        BN=plan.columns,
        num_warps=plan.num_warps,
        enable_fp_fusion=True,
    )
    return result, parts
