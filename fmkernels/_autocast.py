"""Where lower precision than float32 would change the result."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def autocasts(tensor: Tensor) -> bool:
    """Whether autocast is on for the tensor's device; the meta device has none."""
    return not tensor.is_meta and torch.is_autocast_enabled(tensor.device.type)


def without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """A context in which autocast leaves alone what is computed on the tensor's device."""
    if tensor.is_meta:
        return nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)


def multiplied_in(tensor: Tensor) -> torch.dtype:
    """The dtype in which PyTorch's products take the tensor: autocast's where it is on."""
    if tensor.dtype == torch.float64 or not autocasts(tensor):
        return tensor.dtype
    return torch.get_autocast_dtype(tensor.device.type)


def lower_precision(tensor: Tensor) -> Tensor:
    """In the dtype in which autocast multiplies, where it is on: as PyTorch's own products do."""
    return tensor.to(multiplied_in(tensor))


def product_dtype(tensor: Tensor) -> torch.dtype:
    """In which dtype a product of the tensor, and its backward pass, keeps float32's precision.

    ``torch.set_float32_matmul_precision("high")`` makes products of float32 round their factors to
    10 bits (TF32) or 7 (bfloat16); those of float64 do not.
    """
    rounded = tensor.dtype == torch.float32 and _rounds_factors(tensor.device.type)
    return torch.float64 if rounded else tensor.dtype


def _rounds_factors(device: str) -> bool:
    """Compiled code has its own guard on the setting."""
    if device == "cuda":
        return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")
    products = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    return device == "cpu" and products.fp32_precision in ("tf32", "bf16")


# torch.compiler.assume_constant_result, which would import the compiler to do no more than this
_rounds_factors._dynamo_marked_constant = True  # type: ignore[attr-defined]
