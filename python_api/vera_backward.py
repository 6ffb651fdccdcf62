"""The adapters of a call, for what is computed again in its backward pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from .vera_state import AdapterState, Refused, Rows


def remember(output: Any, state: AdapterState, active: str | None, rows: Rows | None) -> None:
    """Let backward see the adapters of its own call: activation checkpoints compute again there."""
    if torch._C._are_functorch_transforms_active():
        return
    is_chosen = active is not None and rows is None and state.merged is None
    adapter = state.adapters[active] if is_chosen and active is not None else None

    def choose(_: Tensor) -> None:
        task = torch._C._current_graph_task_id()
        if task not in state.passes:
            state.passes[task] = ending = _Ending(state)
            torch.autograd.Variable._execution_engine.queue_callback(ending)
        state.active, state.rows = active, rows
        if active is not None and adapter is not None:
            try:
                state.active = state.name_of(active, adapter)
            except ValueError as error:  # no matter, unless something is computed again
                state.rows = Refused(str(error))

    for value in _tensors(output):
        if value.grad_fn is not None:
            value.register_hook(choose)


def _tensors(output: Any) -> Iterator[Tensor]:
    for value in _pytree.tree_leaves(output):
        if isinstance(value, Tensor):
            yield value
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            yield from _tensors([getattr(value, f.name) for f in dataclasses.fields(value)])


class _Ending:
    """Puts back what a backward pass found. One that fails calls nothing, but lets go of this."""

    def __init__(self, state: AdapterState) -> None:
        self._state = state
        self._before: Any = (state.active, state.rows)

    def __call__(self) -> None:
        if self._before is not None:
            (self._state.active, self._state.rows), self._before = self._before, None

    __del__ = __call__
