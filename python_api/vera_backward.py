"""The adapters of a call, for what is computed again in its backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from .vera_state import AdapterState, Rows


def remember(output: Any, state: AdapterState, active: str | None, rows: Rows | None) -> None:
    """Let backward see the adapters of its own call: activation checkpoints compute again there."""
    if torch._C._are_functorch_transforms_active():
        return

    def restore(_: Tensor) -> None:
        before = state.active, state.rows
        state.active, state.rows = active, rows

        def after() -> None:
            state.active, state.rows = before

        torch.autograd.Variable._execution_engine.queue_callback(after)  # type: ignore[attr-defined]

    for value in _pytree.tree_leaves(output):
        if isinstance(value, Tensor) and value.grad_fn is not None:
            value.register_hook(restore)
