"""PEFT's VeRA layer with the ops under it; imported by ``accelerate_peft`` alone: it needs peft."""

from __future__ import annotations

from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from peft.tuners.vera.layer import Linear
from torch import Tensor, nn
from torch.compiler import is_compiling

from fmkernels import vera_expand, vera_linear, vera_shrink
from fmkernels._autocast import autocasts, lower_precision
from fmkernels.ops.vera_dropout import vera_dropout

from .vera_base import base_bias, plain_weight

PLAIN = (Tensor, nn.Parameter)
"""Types of tensors whose numbers are what they hold; quantised and distributed ones are others."""

_Cast: TypeAlias = tuple[Tensor, tuple[int, int], Tensor]
_CASTS: WeakKeyDictionary[nn.Module, dict[tuple[str, torch.device, torch.dtype], _Cast]] = (
    WeakKeyDictionary()
)
"""Of a model's shared matrices, by the module that holds them: a matrix, its state, its cast copy.

Held here, where no copy, pickle or ``state_dict`` of the model comes by.
"""


class AcceleratedLinear(Linear):
    """PEFT's layer, whose class alone was changed: it has no state of its own."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What PEFT's layer gives, in x's dtype as there."""
        names = [name for name in self.active_adapters if name in self.vera_lambda_d]
        if self.disable_adapters or self.merged or not names or type(x) not in PLAIN:
            y: Tensor = super().forward(x, *args, **kwargs)
            return y
        low = lower_precision(x)
        product = None if args or kwargs else own_product(self.base_layer, low)
        base: Tensor | None = None
        for name in names:
            A, B = (matrix(each, name, low) for each in (self.vera_A, self.vera_B))
            vectors = self.vera_lambda_d[name], self.vera_lambda_b[name]
            dropout = self.vera_dropout[name]
            share = dropped_share(dropout)
            if base is None and product is not None and share is not None:
                base = vera_linear(
                    low, *product, A, B, *vectors, dropout_p=share, training=share > 0
                )
                continue
            if base is None:
                base = self.base_layer(x, *args, **kwargs)
            seen = dropout(low) if share is None else vera_dropout(low, share) if share else low
            base = vera_expand(base, vera_shrink(seen, A), *vectors, B)
        assert base is not None
        return base.to(x.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Moved or cast: copies of what the matrices were take memory, perhaps elsewhere."""
        self.forget()
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def forget(self) -> None:
        """Free the cast copies of the shared matrices."""
        for buffers in (self.vera_A, self.vera_B):
            if buffers is not None:
                _CASTS.pop(buffers, None)


def own_product(base: nn.Module, low: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """The weight (n, m) and bias of a base layer that is no more than x W0ᵀ + bias, else None.

    It is not where it must be called (see ``plain_weight``), or PyTorch would refuse the dtypes.
    """
    weight, bias = plain_weight(base), base_bias(base)
    if weight is None or not multiplies(weight, low):
        return None
    return (weight, bias) if bias is None or multiplies(bias, low) else None


def multiplies(weight: Tensor, low: Tensor) -> bool:
    """Whether PyTorch multiplies x, of autocast's dtype where it is on, and the weight."""
    if weight.dtype == low.dtype:
        return True
    types = (weight.dtype, low.dtype)
    return autocasts(low) and weight.is_floating_point() and torch.float64 not in types


def dropped_share(dropout: nn.Module) -> float | None:
    """Which share of the input PEFT's dropout drops now; None if another module is in its place."""
    if type(dropout) is nn.Dropout:
        return dropout.p if dropout.training else 0.0
    return 0.0 if type(dropout) is nn.Identity else None


def matrix(buffers: Any, name: str, low: Tensor) -> Tensor:
    """An adapter's A or B in the dtype and on the device of ``low``; a copy is made only once.

    Over a half-precision base PEFT keeps the matrices, rounded to its dtype, in float32.
    """
    source: Tensor = buffers[name]
    if source.dtype == low.dtype and source.device == low.device:
        return source
    untracked = is_compiling() or torch._C._are_functorch_transforms_active()
    if untracked or type(source) not in PLAIN or source.is_inference():
        return source.to(low.device, low.dtype)
    casts = _CASTS.setdefault(buffers, {})
    key, state = (name, low.device, low.dtype), (source._version, source.data_ptr())
    found = casts.get(key)
    if found is not None and found[0] is source and found[1] == state:
        return found[2]
    for other in [k for k, (of, *_) in casts.items() if buffers._buffers.get(k[0]) is not of]:
        del casts[other]
    with torch.inference_mode(False):
        casts[key] = source, state, source.to(low.device, low.dtype)
    return casts[key][2]
