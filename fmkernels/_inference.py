"""How the forward pass of a frozen model goes faster on a CPU, without a look into the model."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fmkernels.ops.knn.config import has_fast_bfloat16

NUMBERS_OF_A_PASS = 2**21
"""That go in, 13 images of 224 pixels: a layer's output then stays below 32 MB, from which on the
allocator gets fresh pages for every one. 48 views of a ViT-S at once take 1.2 times as long."""

SCORES = 2**20
"""In memory at a time. All 12 heads of two images of 1,025 tokens took 48 ms, these parts 26."""
LONGEST = 2048
"""Keys up to which :func:`attention` is faster: by 1.6 times at 197 and 1,025, not at 4,097."""

Halves = dict[tuple[str, int], tuple[Tensor, Tensor]]
"""(what was made, id of a weight): the weight itself, and what was made of it."""


def pass_size(inputs: Tensor) -> int:
    """How many of the inputs (N, …) should go through a model at a time; all, but for a CPU."""
    if inputs.device.type != "cpu" or not inputs.numel():
        return max(1, len(inputs))
    return max(1, NUMBERS_OF_A_PASS * len(inputs) // inputs.numel())


def half_precision(place: torch.device, halves: Halves) -> contextlib.AbstractContextManager[Any]:
    """A context in which a model in bfloat16, or under autocast to it, is faster on a CPU.

    Weights are cast once as long as ``halves`` is the same, where autocast does so in each pass;
    linear layers and attention take what :func:`linear` and :func:`attention` do.
    """
    native = place.type == "cpu" and has_fast_bfloat16()
    return _HalfPrecision(halves) if native else contextlib.nullcontext()


class _HalfPrecision(TorchFunctionMode):
    def __init__(self, halves: Halves) -> None:
        super().__init__()
        self.halves = halves
        # with AMX PyTorch's own attention has another path
        self.attends = not torch.cpu._is_amx_tile_supported()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and not kwargs:
            return linear(self.halves, *args)
        if func is F.scaled_dot_product_attention and self.attends:
            found = attention(*args, **kwargs)
            if found is not None:
                return found
        return func(*args, **kwargs)


def linear(halves: Halves, inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``, in bfloat16 with a weight that was put into the order that the product takes.

    On AVX512-BF16 all linear layers of a ViT-S took 42 ms so, where PyTorch's took 48, which
    reorders the weight and copies the bias into the result in each call.
    """
    half = all(product_dtype(each) == torch.bfloat16 for each in (inputs, weight))
    if not half or type(weight) is not Parameter:
        return F.linear(inputs, weight, bias)
    if bias is not None:
        bias = _kept(halves, "half", bias, _cast)
    taped = torch.is_grad_enabled() and inputs.requires_grad
    if taped or type(inputs) is not Tensor or not inputs.numel() or not _packs():
        return F.linear(inputs, _kept(halves, "half", weight, _cast), bias)
    packed = _kept(halves, "packed", weight, _packed)
    found: Tensor = torch.ops.mkldnn._linear_pointwise(
        inputs.to(torch.bfloat16), packed, bias, "none", [], ""
    )
    return found


def _kept(halves: Halves, what: str, weight: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
    key = what, id(weight)
    if key not in halves:
        halves[key] = weight, make(weight)
    return halves[key][1]


def _cast(weight: Tensor) -> Tensor:
    return weight.detach().to(torch.bfloat16)


def _packed(weight: Tensor) -> Tensor:
    found: Tensor = torch.ops.mkldnn._reorder_linear_weight(_cast(weight))
    return found


@functools.cache
def _packs() -> bool:
    """Whether this PyTorch has what its own compiler makes of linear layers on a CPU."""
    names = ("_linear_pointwise", "_reorder_linear_weight")
    return torch.backends.mkldnn.is_available() and all(
        hasattr(torch.ops.mkldnn, name) for name in names
    )


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
        Scores and weights are rounded to bfloat16, as in models that write attention out; sums are
        in float32. PyTorch's fused one keeps scores in float32 and errs less, of which FUNGI's
        features show nothing: their cosines to float32 were as high. Keys are taken relative to
        their mean, which changes no weight and makes the scores, and what they lose, smaller.
    """
    tensors = (query, key, value)
    plain = attn_mask is None and not dropout_p and not is_causal and not enable_gqa
    taped = torch.is_grad_enabled() and any(each.requires_grad for each in tensors)
    if not plain or taped or any(type(each) is not Tensor or each.ndim != 4 for each in tensors):
        return None
    if any(product_dtype(each) != torch.bfloat16 for each in tensors):
        return None
    if not 0 < key.shape[2] <= LONGEST or not query.numel() or query.shape[:2] != key.shape[:2]:
        return None
    with torch.autocast("cpu", enabled=False):
        query = query * (query.shape[-1] ** -0.5 if scale is None else scale)
        key = key - key.mean(dim=-2, keepdim=True)
        heads = [each.bfloat16().reshape(-1, *each.shape[2:]) for each in (query, key, value)]
        step = max(1, SCORES // (query.shape[2] * key.shape[2]))
        parts = zip(*(each.split(step) for each in heads), strict=True)
        found: Tensor = torch.cat([(q @ k.mT).softmax(dim=-1) @ v for q, k, v in parts])
        return found.view(*query.shape[:-1], -1)


def product_dtype(tensor: Tensor) -> torch.dtype:
    """In which dtype products of it are computed now, on a CPU."""
    if tensor.dtype == torch.float32 and torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu")
    return tensor.dtype
