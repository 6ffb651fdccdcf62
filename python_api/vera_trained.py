"""Modules that an adapter trains whole, such as a classifier: a copy for each adapter."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from .vera_state import AdapterState


class TrainedModule(nn.Module):
    """Stands in the place of a module, which it holds, and calls the active adapter's copy of it.

    Args:
        original_module: what all others use.
        state: that of the model.
    """

    def __init__(self, original_module: nn.Module, state: AdapterState) -> None:
        super().__init__()
        self.original_module = original_module
        self.copies = nn.ModuleDict()
        self.state = state

    def start(self, name: str, tensors: Mapping[str, Tensor] | None = None) -> None:
        """A copy for an adapter, of the module as it is or with these tensors."""
        own = copy.deepcopy(self.original_module).requires_grad_(True)
        if tensors is not None:
            own.load_state_dict(tensors)
        self.copies[name] = own

    def remove(self, name: str) -> None:
        """Take away the copy of an adapter, if it has one."""
        if name in self.copies:
            del self.copies[name]

    def rename(self, name: str, new_name: str) -> None:
        """Call an adapter otherwise."""
        if name in self.copies:
            self.copies[new_name] = self.copies.pop(name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the copy of the active adapter gives; with an adapter for each row, put together."""
        rows = self.state.rows
        if rows is None:
            return self.of(self.state.active)(*args, **kwargs)
        parts = list(rows.parts(list(self.copies)))
        if len(parts) == 1:
            return self.of(parts[0][0])(*args, **kwargs)
        outputs, places = [], []
        for name, indices in parts:
            own = _rows_of((args, kwargs), indices, rows.count)
            outputs.append(self.of(name)(*own[0], **own[1]))
            places.append(indices)
        order = torch.cat(places).argsort()
        return _pytree.tree_map(
            lambda *values: _put_together(values, order), outputs[0], *outputs[1:]
        )

    def of(self, name: str | None) -> nn.Module:
        """The copy of an adapter, or what all others use."""
        if name is None or name not in self.copies:
            return self.original_module
        return self.copies[name]


def _rows_of(arguments: Any, indices: Tensor, count: int) -> Any:
    """Of every tensor with a row for each of the batch, these."""

    def own(value: Any) -> Any:
        is_batch = isinstance(value, Tensor) and value.ndim and value.shape[0] == count
        return value[indices.to(value.device)] if is_batch else value

    return _pytree.tree_map(own, arguments)


def _put_together(values: tuple[Any, ...], order: Tensor) -> Any:
    first = values[0]
    if isinstance(first, Tensor) and first.ndim:
        return torch.cat(values)[order.to(first.device)]
    return first
