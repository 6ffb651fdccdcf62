"""The vectors of thousands of adapters for one layer, a row for each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from .vera_base import base_device
from .vera_config import VeraConfig
from .vera_keys import vector_sizes
from .vera_targets import base_of

Row: TypeAlias = tuple[Tensor | None, ...]
"""What one adapter has in the tables of one layer."""


class Tables(NamedTuple):
    """Row i of each is adapter i's."""

    lambda_d: Tensor
    """(capacity, r)"""
    lambda_b: Tensor
    """(capacity, n)"""
    scale: Tensor | None
    """Magnitudes over norms, (capacity, n)."""

    @classmethod
    def of(cls, config: VeraConfig, target: nn.Module, capacity: int, dtype: torch.dtype) -> Tables:
        """Of adapters that change nothing."""
        sizes = vector_sizes(config, target)
        options: Any = {"dtype": dtype, "device": base_device(base_of(target))}
        return cls(
            torch.zeros(capacity, sizes["lambda_d"], **options),
            torch.zeros(capacity, sizes["lambda_b"], **options),
            torch.ones(capacity, sizes["magnitude"], **options) if config.use_dora else None,
        )

    def padded(self, row: Mapping[str, Tensor]) -> Row:
        """A row of each; zeros for no update, and ones for no scale."""
        return tuple(
            None
            if table is None
            else row[key].to(table.dtype)
            if key in row
            else table.new_full(table.shape[1:], 1.0 if key == "scale" else 0.0)
            for key, table in zip(self._fields, self, strict=True)
        )

    def row(self, slot: int) -> Row:
        """A copy."""
        return tuple(None if table is None else table[slot].clone() for table in self)

    def write(self, slot: int, row: Row) -> None:
        """A row of each."""
        for table, values in zip(self, row, strict=True):
            if table is not None and values is not None:
                table[slot] = values
