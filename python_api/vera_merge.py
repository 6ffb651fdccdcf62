"""An adapter merged into the base weights, and these weights as they were."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .vera_base import base_dtype
from .vera_layer import VeraLayer


class MergedAdapter:
    """The base weights as they were before an adapter was merged into them."""

    def __init__(self, name: str, active: str | None) -> None:
        self.name = name
        self.active = active
        self.originals: dict[str, tuple[VeraLayer, Tensor]] = {}
        self.unloaded: dict[str, nn.Module] = {}

    @classmethod
    def of(
        cls, op: str, name: str, active: str | None, layers: Mapping[str, VeraLayer]
    ) -> MergedAdapter:
        """Merge an adapter into its layers.

        Raises:
            ValueError: a weight cannot take it; all are as they were.
        """
        for path, layer in layers.items():
            if base_dtype(layer.base_layer) is None:
                raise ValueError(
                    f"{op}: expected floating-point base weights, got {path} "
                    f"({type(layer.base_layer).__name__})"
                )
        merged = cls(name, active)
        try:
            for path, layer in layers.items():
                weight = layer.base_layer.weight
                adapted = layer.adapted_weight(name).to(weight.dtype)
                if not bool(torch.isfinite(adapted).all()):
                    raise ValueError(
                        f"{op}: expected finite weights, got some that are not in {path}"
                    )
                merged.originals[path] = layer, weight.detach().clone()
                with torch.no_grad():
                    weight.copy_(adapted if adapted.shape == weight.shape else adapted.mT)
                layer.merged = name
        except BaseException:
            merged.undo()
            raise
        return merged

    def undo(self) -> None:
        """Put them back."""
        for layer, original in self.originals.values():
            with torch.no_grad():
                layer.base_layer.weight.copy_(original)
            layer.merged = None
