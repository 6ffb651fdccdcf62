"""What the adapted layers of one model share: its adapters, and which of them a call takes."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, NoReturn, Protocol

import torch
from torch import Tensor
from torch.compiler import is_compiling
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


class Choice:
    """What a backward pass computes again with."""

    def __init__(self, active: str | None, rows: Rows | None) -> None:
        self.active = active
        self.rows = rows

    def end(self) -> None:
        """Nothing: who is to call this when the pass ends lets go of it then, or if it fails."""


class AdapterState:
    """One per model; every adapted layer refers to it.

    Args:
        adapters: name -> adapter.
        active: the adapter of all rows where ``rows`` is None; None for the base model.
        rows: an adapter for every row.
        is_disabled: whether the base model is wanted, whatever is active.
        merged: the adapter in the base weights.
        turn: held while the model is called: its layers ask here which adapter that is for.
        passes: number of a backward pass that is under way -> what is computed again in it.
        first: the adapter that the first call of the model took, by its ``id``.
        has_varied: whether another call took another, or an adapter for every row.
    """

    def __init__(self) -> None:
        self.adapters: dict[str, Adapter] = {}
        self.active: str | None = None
        self.rows: Rows | None = None
        self.is_disabled = False
        self.merged: str | None = None
        self.shared_input = SharedInput()
        self._start()

    def _start(self) -> None:
        """What neither a copy nor a pickle has."""
        self.turn = threading.RLock()
        self.passes: weakref.WeakValueDictionary[int, Choice] = weakref.WeakValueDictionary()
        self.first: int | None = None
        self.has_varied = False

    @property
    def chosen(self) -> str | None:
        """The adapter of all rows; None for the base model."""
        return None if self.is_disabled else self.active

    def name_of(self, name: str, adapter: Adapter) -> str:
        """What an adapter is called now: it may have another name than when it was chosen.

        Raises:
            ValueError: it cannot be applied any more.
        """
        if is_compiling():
            return name
        if self.merged is not None:
            raise ValueError(
                f"VeraModel: expected base weights as they were in forward, because backward "
                f"computes them again, got {self.merged!r} merged into them; unmerge() first"
            )
        if self.adapters.get(name) is adapter:
            return name
        for other, own in self.adapters.items():
            if own is adapter:
                return other
        raise ValueError(
            f"VeraModel: expected adapter {name!r}, because backward computes again with it, got a "
            "model from which it was deleted after forward"
        )

    @contextlib.contextmanager
    def using(self, rows: Rows | None) -> Iterator[tuple[str | None, Rows | None]]:
        """A call of the model: with an adapter for every row, or with what ``current`` says.

        Calls take turns. One within a backward pass is of an activation checkpoint around it.
        """
        with self.turn:
            active, rows = self.current() if rows is None else (None, rows)
            name = active if active in self.adapters else None
            taken = 0 if name is None else id(self.adapters[name])
            self.first = taken if self.first is None else self.first
            self.has_varied |= rows is not None or taken != self.first
            self.shared_input.forget()  # one call's graph may be freed before another's
            task = torch._C._current_graph_task_id()
            choice, before = Choice(active, rows), (self.rows, self.passes.get(task))
            self.rows = rows
            if task != -1:
                self.passes[task] = choice
            try:
                yield active, rows
            finally:
                self.rows = before[0]
                if before[1] is not None:
                    self.passes[task] = before[1]
                elif task != -1:
                    self.passes.pop(task, None)

    def current(self) -> tuple[str | None, Rows | None]:
        """The adapter of all rows, or that of every row, for whoever computes now.

        In a backward pass, where an activation checkpoint computes again, those of its own call.
        """
        if not is_compiling():
            task = torch._C._current_graph_task_id()
            under_way = [] if task == -1 else list(self.passes.values())
            choice = None if task == -1 else self.passes.get(task)
            if choice is None and len(under_way) == 1:
                choice = under_way[0]  # of the pass that this one, a reentrant checkpoint's, is in
            if choice is not None:
                return choice.active, choice.rows
            if task != -1 and self.has_varied:
                raise ValueError(
                    "VeraModel: expected a backward pass through what the model returned, because "
                    "an activation checkpoint computes again in it and calls of the model took "
                    "different adapters; got one through another tensor, such as a hook's"
                )
        return self.chosen, self.rows

    def __getstate__(self) -> dict[str, Any]:
        own = ("passes", "turn", "first", "has_varied")
        kept = {key: value for key, value in self.__dict__.items() if key not in own}
        return {**kept, "rows": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()


class Refused:
    """In the place of rows that cannot be applied: whoever asks is told why."""

    count = 0

    def __init__(self, why: str) -> None:
        self._why = why

    def groups(self, layer: Any) -> NoReturn:
        """Raises ValueError."""
        raise ValueError(self._why)

    def parts(self, names: Sequence[str]) -> NoReturn:
        """Raises ValueError."""
        raise ValueError(self._why)


def check_names(op: str, names: Any, inputs: Any) -> None:
    """Refuse what is no list of a name for every row of the inputs, where there are inputs."""
    is_list = isinstance(names, Sequence) and not isinstance(names, str) and len(names)
    if not is_list or not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"{op}: adapter_names: expected a name for every row, {BASE!r} for none, got {names!r}"
        )
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
        distinct = sorted(name for name in dict.fromkeys(names) if name != BASE)
        self._chosen = [(name, state.adapters[name]) for name in distinct]
        numbers = {name: i for i, name in enumerate(distinct)}
        self._ids = torch.tensor([numbers.get(name, -1) for name in names], device=device)

    @property
    def count(self) -> int:
        """The rows of the batch."""
        return len(self._ids)

    def _names(self) -> list[str]:
        """Of the adapters, in the order of their ids."""
        return [self._state.name_of(*chosen) for chosen in self._chosen]

    def groups(self, layer: Any) -> list[Group]:
        """Those of the named adapters that one layer has, by the matrices that they share."""
        members: dict[Any, list[str]] = {}
        known = self._names()
        for name in known:
            if name in layer.lambda_d:
                config, matrices = self._state.adapters[name]
                dropout = config.vera_dropout if layer.training else 0.0
                members.setdefault((id(matrices), config.use_dora, dropout), []).append(name)
        return [
            self._group(layer, names, self._numbered(known, names), key[2])
            for key, names in members.items()
        ]

    def _group(self, layer: Any, names: list[str], ids: Tensor, dropout: float) -> Group:
        config, matrices = self._state.adapters[names[0]]
        scales = [layer.dora_scale(name) for name in names] if config.use_dora else None
        return Group(
            matrices,
            torch.stack([layer.lambda_d[name] for name in names]),
            torch.stack([layer.lambda_b[name] for name in names]),
            None if scales is None else torch.stack(scales),
            ids,
            dropout,
        )

    def _numbered(self, known: Sequence[str], names: Sequence[str]) -> Tensor:
        """(batch): the position in ``names`` of every row's adapter, −1 for others."""
        if list(names) == list(known):
            return self._ids
        table = [names.index(name) if name in names else -1 for name in known]
        return torch.tensor([*table, -1], device=self._ids.device)[self._ids]  # [-1] is the last

    def parts(self, names: Sequence[str]) -> Iterator[tuple[str | None, Tensor]]:
        """(name, rows): which rows take which of these names, and None for all others."""
        known = self._names()
        own = [name for name in known if name in names]
        ids = self._numbered(known, own)
        for number, name in enumerate(own):
            yield name, (ids == number).nonzero().flatten()
        rest = (ids < 0).nonzero().flatten()
        if len(rest):
            yield None, rest
