"""Who computes a layer with an adapter, forward and backward: ours, PEFT's, and the layer alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import fmkernels

if TYPE_CHECKING:
    from vera.workloads import Adapted

Step = Callable[[Tensor, Tensor], list[Tensor]]
"""x and the gradient at y -> y, the gradient of x, and those of the vectors."""


class Layer:
    """A linear layer, and PEFT's over it, with the same vectors."""

    def __init__(self, problem: Adapted) -> None:
        import peft

        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(problem.into, problem.out, dtype=problem.dtype))
        config = peft.VeraConfig(r=problem.rank, target_modules=["0"])
        self.peft = peft.get_peft_model(model, config).base_model.model[0]
        base = self.peft.base_layer
        self.weight, self.bias = base.weight.requires_grad_(False), base.bias.requires_grad_(False)
        # rounded to the base's dtype by PEFT, which keeps them in float32
        self.A = self.peft.vera_A["default"].to(problem.dtype)
        self.B = self.peft.vera_B["default"].to(problem.dtype)
        self.lambda_d = self.peft.vera_lambda_d["default"]
        self.lambda_b = self.peft.vera_lambda_b["default"]
        nn.init.normal_(self.lambda_b)
        several = (problem.adapters, 1)
        self.many_d = self.lambda_d.detach().repeat(several).requires_grad_()
        self.many_b = self.lambda_b.detach().repeat(several).requires_grad_()
        draw = torch.Generator().manual_seed(1)
        self.ids = torch.randint(problem.adapters, (problem.tokens,), generator=draw)


def stepping(
    forward: Callable[[Tensor], Tensor], *vectors: Tensor, dtype: torch.dtype | None = None
) -> Step:
    """Forward and backward; ``dtype`` is that of the gradient that arrives, if not y's."""

    def step(x: Tensor, grad: Tensor) -> list[Tensor]:
        y = forward(x)
        found = torch.autograd.grad(y, [x, *vectors], grad if dtype is None else grad.to(dtype))
        return [y.detach(), *found]

    return step


def base(layer: Layer) -> Step:
    return stepping(layer.peft.base_layer)


def ours(layer: Layer, **settings: Any) -> Step:
    def forward(x: Tensor) -> Tensor:
        return fmkernels.vera_linear(
            x,
            layer.weight,
            layer.bias,
            layer.A,
            layer.B,
            layer.lambda_d,
            layer.lambda_b,
            **settings,
        )

    return stepping(forward, layer.lambda_d, layer.lambda_b)


def stock(layer: Layer) -> Step:
    """The products of VeRA's formula with PyTorch's operators: the bar for every other form."""
    from fmkernels.ops.vera_expand import VERA_EXPAND
    from fmkernels.ops.vera_shrink import VERA_SHRINK

    def forward(x: Tensor) -> Tensor:
        y = nn.functional.linear(x, layer.weight, layer.bias)
        vectors = layer.lambda_d.unsqueeze(0), layer.lambda_b.unsqueeze(0)
        with fmkernels.backend("reference"):
            return VERA_EXPAND(y, VERA_SHRINK(x, layer.A), *vectors, layer.B, None, True)

    return stepping(forward, layer.lambda_d, layer.lambda_b)


def peft_default(layer: Layer) -> Step:
    return stepping(layer.peft, layer.lambda_d, layer.lambda_b)


def peft_compiled(layer: Layer) -> Step:
    return stepping(torch.compile(layer.peft), layer.lambda_d, layer.lambda_b)


def peft_autocast(layer: Layer) -> Step:
    def forward(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return layer.peft(x)

    return stepping(forward, layer.lambda_d, layer.lambda_b, dtype=torch.bfloat16)


def lora(layer: Layer) -> Step:
    """PEFT's LoRA of rank 16, without dropout, over the same layer: another method, for scale."""
    import peft

    linear = nn.Linear(
        layer.weight.shape[1], layer.weight.shape[0], dtype=layer.weight.dtype
    ).requires_grad_(False)
    linear.weight.copy_(layer.weight)
    config = peft.LoraConfig(r=16, target_modules=["0"])
    found = peft.get_peft_model(nn.Sequential(linear), config).base_model.model[0]
    return stepping(found, found.lora_A["default"].weight, found.lora_B["default"].weight)


def mixed(layer: Layer) -> Step:
    """Every token with an adapter of its own."""

    def forward(x: Tensor) -> Tensor:
        vectors = layer.many_d, layer.many_b
        return fmkernels.vera_linear(
            x, layer.weight, layer.bias, layer.A, layer.B, *vectors, adapter_ids=layer.ids
        )

    return stepping(forward, layer.many_d, layer.many_b)


def looped(layer: Layer) -> Step:
    """The base once, and PEFT's formula for each adapter and its tokens."""

    def forward(x: Tensor) -> Tensor:
        y = nn.functional.linear(x, layer.weight, layer.bias)
        A, B = layer.peft.vera_A["default"], layer.peft.vera_B["default"]
        for adapter in layer.ids.unique().tolist():
            rows = (layer.ids == adapter).nonzero().squeeze(1)
            seen = x[rows].to(A.dtype)
            d, b = layer.many_d[adapter], layer.many_b[adapter]
            z = b * nn.functional.linear(d * nn.functional.linear(seen, A), B)
            y = y.index_add(0, rows, z.to(y.dtype))
        return y

    return stepping(forward, layer.many_d, layer.many_b)


PROVIDERS: dict[str, Callable[[Layer], Step]] = {
    "base": base,
    "fmkernels": ours,
    "fmkernels-merged": functools.partial(ours, merge=True),
    "fmkernels-mixed": mixed,
    "stock": stock,
    "looped": looped,
    "peft": peft_default,
    "peft-autocast": peft_autocast,
    "peft-compiled": peft_compiled,
    "lora": lora,
}
