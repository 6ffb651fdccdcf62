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
        batch = _batch_of((args, kwargs), rows.count)
        outputs, places = [], []
        for name, indices in parts:
            of_all = torch.arange(batch, device=indices.device).view(rows.count, -1)
            places.append(of_all[indices].flatten())  # beams of one sequence lie side by side
            own = _rows_of((args, kwargs), places[-1], batch)
            outputs.append(self.of(name)(*own[0], **own[1]))
        return _pytree.tree_map(lambda *values: _put_together(values, places), *outputs)

    def __getattr__(self, name: str) -> Any:
        """Those of the module that is called, such as the weight, which some models look at."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "state" not in self.__dict__ or "copies" not in self._modules:  # not there yet
                raise
            return getattr(self.of(self.state.active), name)

    def of(self, name: str | None) -> nn.Module:
        """The copy of an adapter, or what all others use."""
        if name is None or name not in self.copies:
            return self.original_module
        return self.copies[name]


def _batch_of(arguments: Any, count: int) -> int:
    """The rows of the input: as many as have a name each, or several for each name."""
    tensors = [x for x in _pytree.tree_leaves(arguments) if isinstance(x, Tensor) and x.ndim]
    rows = next((x.shape[0] for x in tensors if x.shape[0] != 1), count)
    if rows % count:
        raise ValueError(
            f"VeraModel: adapter_names: expected a batch of {count} rows (or of several for each) "
            f"first in the input of every module that is trained whole, got {rows}"
        )
    return rows


def _rows_of(arguments: Any, indices: Tensor, batch: int) -> Any:
    """Of every tensor with a row for each of the batch, these; of one with a single row, all."""

    def own(value: Any) -> Any:
        is_batch = isinstance(value, Tensor) and value.ndim and value.shape[0] == batch
        return value[indices.to(value.device)] if is_batch else value

    return _pytree.tree_map(own, arguments)


def _put_together(values: tuple[Any, ...], places: list[Tensor]) -> Any:
    if not isinstance(values[0], Tensor):
        return values[0]
    parts = []
    for value, indices in zip(values, places, strict=True):
        if value.ndim and value.shape[0] == 1:  # of positions, say, that all rows have
            value = value.expand(len(indices), *value.shape[1:])
        if not value.ndim or value.shape[0] != len(indices):
            raise ValueError(
                "VeraModel: adapter_names: expected modules that are trained whole to give a row "
                f"for each row of the batch, got shape {tuple(value.shape)} for {len(indices)} rows"
            )
        parts.append(value)
    return torch.cat(parts)[torch.cat(places).argsort().to(parts[0].device)]
