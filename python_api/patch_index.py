"""A bank of patches in memory: rows are added, searched, removed, saved."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from fmkernels import _checks
from fmkernels.ops.knn import bank, search
from fmkernels.ops.knn.reference import METRICS

from .arrays import Array, tensor_of
from .bank import Bank, Found

QUERIES = 1024
"""Searched between two updates of a progress bar."""


class PatchIndex(Bank):
    """Rows to be searched (work in progress)."""

    def __init__(
        self,
        dim: int,
        *,
        metric: str = "cosine",
        engine: str = "exact",
        factory: str | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.dim = _checks.positive_integer("PatchIndex", "dim", dim)
        _checks.choice("PatchIndex", "metric", metric, METRICS)
        self.metric, self.dtype, self.device = metric, dtype, torch.device(device)
        self._blocks: list[Tensor] = []
        self._ready: bank.PreparedRows | None = None
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return sum(map(len, self._blocks))

    def add(self, features: Array) -> None:
        """Add rows (M, D)."""
        rows = tensor_of("PatchIndex.add", "features", features, "(M, D)")
        if rows.shape[1] != self.dim:
            raise ValueError(
                f"PatchIndex.add: features: expected rows of {self.dim} numbers, "
                f"got shape {_checks.shape(rows)}"
            )
        with self._lock:
            self._blocks.append(rows.to(self.device, self.dtype).contiguous())
            self._ready = None

    @property
    def features(self) -> Tensor:
        """(M, D)."""
        return self._prepared().rows

    def _device(self) -> torch.device:
        return self.device

    def _prepared(self) -> bank.PreparedRows:
        with self._lock:
            if self._ready is None:
                empty = torch.empty(0, self.dim, dtype=self.dtype, device=self.device)
                rows = (
                    self._blocks[0] if len(self._blocks) == 1 else torch.cat([empty, *self._blocks])
                )
                self._blocks = [rows]
                self._ready = bank.prepare(rows)
            return self._ready

    def _find(self, queries: Tensor, k: int, progress: bool = False) -> Found:
        rows, *prepared = self._prepared()
        return Found(*search(queries, rows, k, self.metric, "exact", None, *prepared))

    def save(self, path: Any) -> None:
        """Save."""
        import safetensors.torch

        safetensors.torch.save_file({"features": self.features}, path, {"metric": self.metric})

    @classmethod
    def load(cls, path: Any) -> PatchIndex:
        """Load."""
        import safetensors

        with safetensors.safe_open(path, "pt") as file:
            rows, metric = file.get_tensor("features"), file.metadata()["metric"]
        index = cls(rows.shape[1], metric=metric, dtype=rows.dtype)
        index.add(rows)
        return index
