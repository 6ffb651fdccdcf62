"""The adapters of a call, for what is computed again in its backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from .vera_state import AdapterState, Choice, Refused, Rows

DEPTH = 3
"""Of objects in objects, in which tensors of an output are looked for."""


def remember(output: Any, state: AdapterState, active: str | None, rows: Rows | None) -> None:
    """Let backward see the adapters of its own call: activation checkpoints compute again there."""
    if torch._C._are_functorch_transforms_active():
        return
    is_chosen = active is not None and rows is None and state.merged is None
    adapter = state.adapters[active] if is_chosen and active is not None else None

    def choose(_: Tensor) -> None:
        task = torch._C._current_graph_task_id()
        choice = state.passes.get(task)
        if choice is None:
            state.passes[task] = choice = Choice(active, rows)
            torch.autograd.Variable._execution_engine.queue_callback(choice.end)
        choice.active, choice.rows = active, rows
        if active is not None and adapter is not None:
            try:
                choice.active = state.name_of(active, adapter)
            except ValueError as error:  # no matter, unless something is computed again
                choice.rows = Refused(str(error))

    for value in _tensors(output, DEPTH):
        if value.grad_fn is not None:
            value.register_hook(choose)


def _tensors(output: Any, depth: int) -> Iterator[Tensor]:
    """Those in containers, and in the attributes of other objects."""
    for value in _pytree.tree_leaves(output):
        if isinstance(value, Tensor):
            yield value
        elif depth and not isinstance(value, (type, nn.Module)):
            yield from _tensors(dict(getattr(value, "__dict__", {})), depth - 1)
