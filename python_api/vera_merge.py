"""An adapter merged into the base weights, and these weights as they were."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .vera_base import base_bias, base_dtype, dense_weight, is_conv1d, plain_weight
from .vera_layer import VeraLayer


class MergedAdapter:
    """The base weights as they were before an adapter was merged into them.

    Merged weights take their places and leave them alone: another module, such as the embeddings of
    a language model, may hold the same.
    """

    def __init__(self, name: str, active: str | None) -> None:
        self.name = name
        self.active = active
        self.originals: dict[str, tuple[VeraLayer, nn.Parameter]] = {}
        self.unloaded: dict[str, tuple[nn.Module, nn.Module]] = {}
        """path -> what was there, and what took its place"""

    @classmethod
    def of(
        cls, op: str, name: str, active: str | None, layers: Mapping[str, VeraLayer]
    ) -> MergedAdapter:
        """Merge an adapter into its layers.

        Raises:
            ValueError: a weight cannot take it; all are as they were.
        """
        originals = {
            path: _held_weight(op, path, layer.base_layer) for path, layer in layers.items()
        }
        adapted = {}
        for path, layer in layers.items():
            adapted[path] = _adapted(layer, name, originals[path])
            if not bool(torch.isfinite(adapted[path]).all()):
                raise ValueError(f"{op}: expected finite weights, got some that are not in {path}")
        merged = cls(name, active)
        for path, layer in layers.items():
            merged.originals[path] = layer, originals[path]
            layer.base_layer.weight = nn.Parameter(adapted[path], originals[path].requires_grad)
            layer.state.merged = name
        return merged

    def undo(self) -> None:
        """Put them back."""
        for layer, original in self.originals.values():
            merged: Any = layer.base_layer.weight
            if (original.device, original.dtype) != (merged.device, merged.dtype):
                original.data = original.data.to(merged.device, merged.dtype)
            layer.base_layer.weight = original
            layer.state.merged = None


def check_whole(op: str, model: nn.Module) -> None:
    """Refuse a model that FSDP shards: it would not know what is put in its weights' places."""
    for path, module in model.named_modules():
        sharded = [key for key, p in module._parameters.items() if hasattr(p, "full_tensor")]
        if sharded or any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__):
            place = ".".join(filter(None, [path, *sharded[:1]])) or "the model"
            raise ValueError(
                f"{op}: expected weights that are whole, got {place}, which is sharded; save the "
                "adapter, and load it into a model that is not"
            )


def _held_weight(op: str, path: str, base: nn.Module) -> nn.Parameter:
    """The weight of a layer that gives X W0ᵀ + bias of it, and nothing else."""
    weight = base._parameters.get("weight")
    kind = type(base).__name__
    if type(weight) is not nn.Parameter or base_dtype(base) is None or weight.is_meta:
        raise ValueError(f"{op}: expected floating-point base weights, got {path} ({kind})")
    if plain_weight(base) is None:  # it must be called: because of hooks, which may change nothing
        given, own = dense_weight(base), _oriented(base, weight.detach())
        bias = base_bias(base)
        size = own.abs() if bias is None else own.abs() + bias.detach().abs().unsqueeze(1)
        is_same = given.shape == own.shape and bool(((given - own).abs() <= size / ROUNDING).all())
        if not is_same:
            raise ValueError(
                f"{op}: expected layers that multiply by their weight and do no more, got {path} "
                f"({kind}), whose output hooks or a forward of its own change"
            )
    return weight


ROUNDING = 64
"""Of bfloat16, which has 8 bits, two are for what rounds."""


def _adapted(layer: VeraLayer, name: str, weight: nn.Parameter) -> Tensor:
    """As the base layer holds it."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    adapted = layer.adapted_weight(name, _oriented(layer.base_layer, weight.detach()).to(wide))
    return _oriented(layer.base_layer, adapted.to(weight.dtype)).contiguous()


def _oriented(base: nn.Module, weight: Tensor) -> Tensor:
    """(n, m) of what the layer holds, and back."""
    return weight.mT if is_conv1d(base) else weight
