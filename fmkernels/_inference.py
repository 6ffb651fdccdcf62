"""How the forward pass of a frozen model goes faster on a CPU, without a look into the model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fmkernels.ops.knn.config import has_fast_bfloat16

NUMBERS_OF_A_PASS = 2**21
"""That go in, 13 images of 224 pixels: a layer's output then stays below 32 MB, from which on the
allocator gets fresh pages for every one. 49 views of a ViT-S at once took 1.2 times as long."""

SCORES = 2**23
"""In memory at a time: 16 MB."""
LONGEST = 1024
"""Keys up to which products of whole matrices were seen to be faster."""


def pass_size(inputs: Tensor) -> int:
    """How many of the inputs (N, …) should go through a model at a time; all, but for a CPU."""
    if inputs.device.type != "cpu" or not inputs.numel():
        return max(1, len(inputs))
    return max(1, NUMBERS_OF_A_PASS * len(inputs) // inputs.numel())


def faster_attention(place: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A context in which attention in bfloat16 is computed as :func:`attention` does, if faster.

    PyTorch's own was measured at 8.7 ms for 8 images of ViT-S where this takes 5.4 (AVX512-BF16);
    with AMX it has another one.
    """
    amx = torch.cpu._is_amx_tile_supported()  # type: ignore[attr-defined]
    if place.type == "cpu" and has_fast_bfloat16() and not amx:
        return _Attention()
    return contextlib.nullcontext()


class _Attention(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            found = attention(*args, **kwargs)
            if found is not None:
                return found
        return func(*args, **kwargs)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """softmax(Q Kᵀ · scale) V in bfloat16, (N, H, T, D), or None where PyTorch's has to do it.

    Numerics:
        Scores and weights are rounded to bfloat16; sums are in float32. Keys are taken relative to
        their mean, which changes no weight and makes the scores, and what they lose, smaller.
    """
    plain = attn_mask is None and not dropout_p and not is_causal and not enable_gqa
    tensors = (query, key, value)
    taped = torch.is_grad_enabled() and any(each.requires_grad for each in tensors)
    fits = query.ndim == 4 and key.shape[-2] <= LONGEST and query.numel() and key.numel()
    if not plain or taped or not fits or any(type(each) is not Tensor for each in tensors):
        return None
    if any(_product_dtype(each) != torch.bfloat16 for each in tensors):
        return None
    with torch.autocast("cpu", enabled=False):
        query = (query * (query.shape[-1] ** -0.5 if scale is None else scale)).bfloat16()
        key = (key - key.mean(dim=-2, keepdim=True)).bfloat16()
        numbers = query.shape[1] * query.shape[2] * key.shape[2]
        parts = zip(*(x.split(max(1, SCORES // numbers)) for x in (query, key, value)), strict=True)
        found = [(q @ k.mT).softmax(dim=-1) @ v.bfloat16() for q, k, v in parts]
        return found[0] if len(found) == 1 else torch.cat(found)


def _product_dtype(tensor: Tensor) -> torch.dtype:
    """In which products of it are computed now."""
    if tensor.dtype == torch.float32 and torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu")
    return tensor.dtype
