"""VeRA and DVoRA written out with PyTorch's operators, and PEFT's layer: what the ops are held against."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fmkernels

SIZES_OF = {
    "products": (6, 60, 50, 4),
    "folded": (8, 9, 10, 4),
    "refolded": (30, 8, 9, 4),
    "apart": (30, 8, 9, 40),
    "merged": (30, 8, 9, 40),
}
"""(tokens, in, out, rank) of a layer in float32 whose form this is; apart is asked for, with
``merge=False``. What has other arguments than these goes by products."""


class Layer(NamedTuple):
    """A layer with N adapters, or one."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    A: Tensor
    B: Tensor
    lambda_d: Tensor
    lambda_b: Tensor

    def to(self, dtype, vectors=None):
        """Another dtype, of the vectors possibly another one; leaves that require a gradient."""
        frozen = (x if x is None else x.to(dtype) for x in self[1:5])
        trained = (x.detach().to(vectors or dtype).requires_grad_() for x in self[5:])
        return Layer(self.x.detach().to(dtype).requires_grad_(), *frozen, *trained)


def layer(tokens, into, out, rank, adapters=None, bias=True, wider=3):
    """In float64; A and B are larger than the layer, as matrices that several layers share."""

    def random(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    several = () if adapters is None else (adapters,)
    return Layer(
        random(tokens, into),
        random(out, into) / into**0.5,
        random(out) if bias else None,
        random(rank, into + wider) / into**0.5,
        random(out + wider, rank) / rank**0.5,
        random(*several, rank),
        random(*several, out),
    )


def composed(x, weight, bias, A, B, lambda_d, lambda_b, adapter_ids=None):
    """The formula, in x's dtype."""
    d, b = lambda_d.to(x.dtype), lambda_b.to(x.dtype)
    base = F.linear(x, weight, bias)
    u = x @ A[:, : weight.shape[1]].mT
    if adapter_ids is None:
        return base + b * ((u * d) @ B[: len(weight)].mT)
    rows = adapter_ids.clamp(min=0).long()
    z = b[rows] * ((u * d[rows]) @ B[: len(weight)].mT)
    return base + torch.where((adapter_ids >= 0).unsqueeze(-1), z, 0)


def of_shared_u(x, weight, bias, A, B, lambda_d, lambda_b, **settings):
    """The layer of a U that another layer needs too."""
    u = fmkernels.vera_shrink(x, A)
    return fmkernels.vera_linear(x, weight, bias, A, B, lambda_d, lambda_b, u=u, **settings)


def composed_dvora(x, weight, bias, A, B, lambda_d, lambda_b, magnitude):
    """DoRA as PEFT applies it, with VeRA's update: the norms of the built matrix, detached."""
    update = (
        lambda_b.unsqueeze(1) * B[: len(weight)] @ (lambda_d.unsqueeze(1) * A[:, : weight.shape[1]])
    )
    norms = (weight.to(update.dtype) + update).norm(dim=1).detach()
    y = composed(x, weight, None, A, B, lambda_d, lambda_b)
    y = (magnitude / norms).to(x.dtype) * y
    return y if bias is None else y + bias


def values_and_gradients(function, arguments, **settings):
    """Y, and the gradients of a fixed combination of it: of x, lambda_d, lambda_b, …"""
    y = function(*arguments, **settings)
    generator = torch.Generator().manual_seed(5)
    grad = torch.randn(y.shape, dtype=torch.float64, generator=generator).to(y.dtype)
    leaves = [x for x in arguments if x is not None and x.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def pooled(results):
    """Those of several problems of one size, side by side: what four numbers err by is chance."""
    return [torch.cat([x.flatten() for x in same]) for same in zip(*results, strict=True)]


def peft_layer(weight, bias, rank, **settings):
    """PEFT's VeRA layer over a linear layer, with random vectors."""
    import peft

    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, dtype=weight.dtype)
    linear.weight.data = weight.detach().clone()
    if bias is not None:
        linear.bias.data = bias.detach().clone()
    config = peft.VeraConfig(r=rank, target_modules=["0"], **settings)
    found = peft.get_peft_model(nn.Sequential(linear), config).base_model.model[0]
    for vectors in (found.vera_lambda_d, found.vera_lambda_b):
        vectors["default"].data.normal_()
    return found


def arguments_of(peft_layer, x):
    """What the op is called with in its place; the vectors are copies. Over a half-precision base
    PEFT rounds A and B to its dtype and keeps them in float32: here they are in that dtype."""
    base = peft_layer.base_layer
    return Layer(
        x.detach().requires_grad_(),
        base.weight.detach(),
        None if base.bias is None else base.bias.detach(),
        peft_layer.vera_A["default"].to(x.dtype),
        peft_layer.vera_B["default"].to(x.dtype),
        *(
            copy.deepcopy(vectors["default"])
            for vectors in (peft_layer.vera_lambda_d, peft_layer.vera_lambda_b)
        ),
    )
