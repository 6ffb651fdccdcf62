"""What the adapted layers of one model share: its adapters, and which of them a call takes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree

from .vera_config import VeraConfig
from .vera_shared import SharedInput, SharedMatrices

BASE = "__base__"
"""The name of no adapter, as in PEFT."""


class Adapter(NamedTuple):
    """One adapter; its vectors are in the layers."""

    config: VeraConfig
    matrices: SharedMatrices


class Group(NamedTuple):
    """Adapters of one layer that share their matrices, and which rows of the batch take which."""

    matrices: SharedMatrices
    lambda_d: Tensor
    """(N, r)"""
    lambda_b: Tensor
    """(N, n)"""
    scale: Tensor | None
    """Of DVoRA: magnitudes over norms, (N, n)."""
    ids: Tensor
    """(batch), from −1, which is none of these, to N − 1."""
    dropout: float


class Rows(Protocol):
    """An adapter for every row of a batch."""

    def groups(self, layer: Any) -> list[Group]:
        """Those that one layer applies."""

    def parts(self, names: Sequence[str]) -> Iterator[tuple[str | None, Tensor]]:
        """(name, rows): which rows take which of these names, and None for all others."""

    @property
    def count(self) -> int:
        """The rows of the batch."""


class AdapterState:
    """One per model; every adapted layer refers to it.

    Args:
        adapters: name -> adapter.
        active: the adapter of all rows where ``rows`` is None; None for the base model.
        rows: an adapter for every row.
    """

    def __init__(self) -> None:
        self.adapters: dict[str, Adapter] = {}
        self.active: str | None = None
        self.rows: Rows | None = None
        self.shared_input = SharedInput()

    @contextlib.contextmanager
    def using(self, active: str | None, rows: Rows | None) -> Iterator[None]:
        """Another choice, for the calls within."""
        before = self.active, self.rows
        self.active, self.rows = active, rows
        try:
            yield
        finally:
            self.active, self.rows = before

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "rows": None}


def check_names(op: str, names: Any, inputs: Any) -> None:
    """Refuse what is no list of a name for every row of the inputs, where there are inputs."""
    is_list = isinstance(names, Sequence) and not isinstance(names, str) and len(names)
    if not is_list or not all(isinstance(name, str) for name in names):
        raise TypeError(f"{op}: adapter_names: expected a name for every row, got {names!r}")
    tensors = [x for x in _pytree.tree_leaves(inputs) if isinstance(x, Tensor) and x.ndim]
    if tensors and all(x.shape[0] != len(names) for x in tensors):
        raise ValueError(
            f"{op}: adapter_names: expected a name for every row, {tensors[0].shape[0]} of them, "
            f"got {len(names)}"
        )


class NamedRows:
    """The names that ``adapter_names`` gives, for the adapters of the model.

    Args:
        names: for every row the name of an adapter or ``"__base__"``.
        state: the model's.
        device: where the ids go.
    """

    def __init__(self, names: Sequence[str], state: AdapterState, device: torch.device) -> None:
        self._state = state
        self._distinct = [name for name in dict.fromkeys(names) if name != BASE]
        numbers = {name: i for i, name in enumerate(self._distinct)}
        self._ids = torch.tensor([numbers.get(name, -1) for name in names], device=device)

    @property
    def count(self) -> int:
        """The rows of the batch."""
        return len(self._ids)

    def groups(self, layer: Any) -> list[Group]:
        """Those of the named adapters that one layer has, by the matrices that they share."""
        members: dict[Any, list[str]] = {}
        for name in self._distinct:
            if name in layer.lambda_d:
                config, matrices = self._state.adapters[name]
                dropout = config.vera_dropout if layer.training else 0.0
                members.setdefault((id(matrices), config.use_dora, dropout), []).append(name)
        return [self._group(layer, names, key[2]) for key, names in members.items()]

    def _group(self, layer: Any, names: list[str], dropout: float) -> Group:
        config, matrices = self._state.adapters[names[0]]
        scales = [layer.dora_scale(name) for name in names] if config.use_dora else None
        return Group(
            matrices,
            torch.stack([layer.lambda_d[name] for name in names]),
            torch.stack([layer.lambda_b[name] for name in names]),
            None if scales is None else torch.stack(scales),
            self._numbered(names),
            dropout,
        )

    def _numbered(self, names: Sequence[str]) -> Tensor:
        """(batch): the position in ``names`` of every row's adapter, −1 for others."""
        if list(names) == self._distinct:
            return self._ids
        table = [names.index(name) if name in names else -1 for name in self._distinct]
        return torch.tensor([*table, -1], device=self._ids.device)[self._ids]  # [-1] is the last

    def parts(self, names: Sequence[str]) -> Iterator[tuple[str | None, Tensor]]:
        """(name, rows): which rows take which of these names, and None for all others."""
        ids = self._numbered([name for name in self._distinct if name in names])
        for number, name in enumerate(name for name in self._distinct if name in names):
            yield name, (ids == number).nonzero().flatten()
        rest = (ids < 0).nonzero().flatten()
        if len(rest):
            yield None, rest
