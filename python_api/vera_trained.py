"""Modules that an adapter trains whole, such as a classifier: a copy for each adapter."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from .vera_state import AdapterState, Rows

Get = Callable[[nn.Module], Any]


def trained_copy(
    path: str, module: nn.Module, tensors: Mapping[str, Tensor] | None = None
) -> nn.Module:
    """What a new adapter trains: a copy of the module as it is, or with these tensors.

    Raises:
        ValueError: it cannot be copied.
    """
    original = module.original_module if isinstance(module, TrainedModule) else module
    try:
        own = copy.deepcopy(original).requires_grad_(True)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            "VeraModel: modules_to_save: expected modules that can be copied and trained, got "
            f"{path} ({type(original).__name__}): {error}"
        ) from error
    if tensors is not None:
        own.load_state_dict(tensors)
    return own


class TrainedModule(nn.Module):
    """Stands in the place of a module, which it holds, and calls the active adapter's copy of it.

    With an adapter for each row, what is called is called for the rows of each, parts and methods
    of the module too; a weight that is read instead is refused, because the rows have several.

    Args:
        original_module: what all others use.
        state: that of the model.
    """

    def __init__(self, original_module: nn.Module, state: AdapterState) -> None:
        super().__init__()
        self.original_module = original_module
        self.copies = nn.ModuleDict()
        self.state = state

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
        return self._call(lambda module: module, *args, **kwargs)

    def _call(self, get: Get, /, *args: Any, **kwargs: Any) -> Any:
        """Call the module, or what ``get`` gives of it."""
        rows, parts = self._parts()
        if rows is None or len(parts) == 1:
            return get(self.of(parts[0][0]))(*args, **kwargs)
        batch = _batch_of((args, kwargs), rows.count)
        outputs, places = [], []
        for name, indices in parts:
            # beams of one sequence lie side by side
            of_all = torch.arange(batch, device=indices.device).view(rows.count, -1)
            places.append(of_all[indices].flatten())
            own = _rows_of((args, kwargs), places[-1], batch)
            outputs.append(get(self.of(name))(*own[0], **own[1]))
        return _pytree.tree_map(lambda *values: _put_together(values, places), *outputs)

    def _parts(self) -> tuple[Rows | None, list[tuple[str | None, Any]]]:
        """What says which rows take which adapter, if any does, and (adapter, rows) of all."""
        active, rows = self.state.current()
        if rows is None:
            return None, [(active, None)]
        return rows, list(rows.parts(list(self.copies)))

    def of(self, name: str | None) -> nn.Module:
        """The copy of an adapter, or what all others use."""
        if name is None or name not in self.copies:
            return self.original_module
        return self.copies[name]

    # what models look at

    def __getattr__(self, name: str) -> Any:
        """Those of the module that is called, such as the weight, which some models look at."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            is_there = "state" in self.__dict__ and "copies" in self._modules
            if not is_there or name.startswith("__"):
                raise
            return self._read(name, lambda module: getattr(module, name))

    def __getitem__(self, key: Any) -> Any:
        """Of a sequence of modules."""
        return self._read(f"[{key}]", lambda module: module[key])  # type: ignore[index]

    def __iter__(self) -> Iterator[Any]:
        """Of a sequence of modules."""
        for i in range(len(self)):
            yield self._read(f"[{i}]", lambda module, i=i: list(module)[i])  # type: ignore[misc]

    def __len__(self) -> int:
        """Of a sequence of modules."""
        return len(self.original_module)  # type: ignore[arg-type]

    def __bool__(self) -> bool:
        """As the module: not all have a length."""
        return bool(self.original_module)

    def _read(self, what: str, get: Get) -> Any:
        _, parts = self._parts()
        value = get(self.of(parts[0][0] if parts else None))
        if len(parts) <= 1:
            return value
        if isinstance(value, nn.Module):
            part = TrainedModule(get(self.original_module), self.state)
            part.copies.update({name: get(own) for name, own in self.copies.items()})
            return part
        if inspect.ismethod(value):
            return functools.partial(self._call, get)
        # PyTorch's encoder layer asks whether there is one before all else
        is_asked = what == "in_proj_bias" and isinstance(
            self.original_module, nn.MultiheadAttention
        )
        if isinstance(value, Tensor) and not is_asked:
            raise ValueError(
                "VeraModel: adapter_names: expected modules that are trained whole to be called, "
                f"because the rows of the batch have a weight each, got a model that reads {what} "
                f"of a {type(self.original_module).__name__}; call it for each adapter by itself"
            )
        return value


def _batch_of(arguments: Any, count: int) -> int:
    """The rows of the input: as many as have a name each, or several for each name.

    The first tensor has them, but for those with a single row, such as positions. In another tensor
    of as many rows they may be something else, positions of a mask, where the first has as many of
    these as rows.
    """
    tensors = [x for x in _pytree.tree_leaves(arguments) if isinstance(x, Tensor) and x.ndim]
    first = next((x for x in tensors if x.shape[0] != 1), None)
    if first is None:
        return count
    rows = first.shape[0]
    if rows % count or first.ndim < 2:
        raise ValueError(
            f"VeraModel: adapter_names: expected a batch of {count} rows (or of several for each) "
            "first in the input of every module that is trained whole, and another dimension, got "
            f"shape {tuple(first.shape)}"
        )
    for other in tensors:
        is_either = other.shape[0] == rows and other.ndim <= 2
        if other is not first and is_either and rows in first.shape[1:]:
            raise ValueError(
                "VeraModel: adapter_names: expected inputs of modules that are trained whole whose "
                f"rows cannot be mistaken for something else, got shape {tuple(other.shape)} "
                f"beside {tuple(first.shape)}; call with another number of rows, or for each "
                "adapter by itself"
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
        # of positions, say, that all rows have
        if value.ndim and value.shape[0] == 1:
            value = value.expand(len(indices), *value.shape[1:])
        if not value.ndim or value.shape[0] != len(indices):
            raise ValueError(
                "VeraModel: adapter_names: expected modules that are trained whole to give a row "
                f"for each row of the batch, got shape {tuple(value.shape)} for {len(indices)} rows"
            )
        parts.append(value)
    return torch.cat(parts)[torch.cat(places).argsort().to(parts[0].device)]
