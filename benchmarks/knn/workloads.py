"""Exact search at the canonical size and at the shapes around it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from workload import INPUT_SETS, Device, Workload, in_turn, normal

from knn import parity
from knn.in_context import WORKLOADS as IN_CONTEXT
from knn.providers import PROVIDERS


@dataclass(frozen=True)
class Search(Workload):
    """The k rows of a bank with the largest cosine, for every query; random normal numbers."""

    queries: int
    rows: int = 100_000
    dim: int = 384
    k: int = 30

    def inputs(self, seed: int, device: Device = "cpu") -> Tensor:
        return normal(1 + seed, self.queries, self.dim).to(device)

    def bank(self, device: Device = "cpu") -> Tensor:
        return random_bank(self.rows, self.dim).to(device)

    def step(
        self, provider: str, dtype: torch.dtype = torch.float32, device: Device = "cpu"
    ) -> Callable[..., Any]:
        """Cosines and indices; takes the options of our searches."""
        who = PROVIDERS[provider]
        search = who.searcher(self.bank(device).to(dtype), self.k)
        sets = [self.inputs(seed, device).to(dtype) for seed in range(INPUT_SETS)]
        if who.unit_queries:
            sets = [F.normalize(queries, dim=1) for queries in sets]
        return in_turn(search, sets)

    def check(self, peer: str, device: Device = "cpu", ours: str = "fmkernels") -> dict[str, Any]:
        return parity.check(self, peer, device, ours)

    def operations(self) -> int:
        return 2 * self.queries * self.rows * self.dim

    def bytes_moved(self) -> int:
        """The rows in bfloat16, once; queries, cosines and indices."""
        return 2 * self.rows * self.dim + self.queries * (4 * self.dim + 12 * self.k)

    def tiny(self) -> Search:
        return replace(self, queries=3, rows=50, dim=8, k=min(self.k, 4))


@functools.lru_cache(maxsize=1)
def random_bank(rows: int, dim: int) -> Tensor:
    """All providers of a workload search the same; the next workload's takes its place."""
    return normal(0, rows, dim)


SHAPES: dict[str, Search] = {
    "knn-100k": Search(2048),
    "knn-q2048-k1": Search(2048, k=1),
    "knn-q2048-k1024": Search(2048, k=1024),
    "knn-q16-k1": Search(16, k=1),
    "knn-q16-k30": Search(16),
    "knn-q16-k1024": Search(16, k=1024),
    "knn-q1-k1": Search(1, k=1),
    "knn-q1-k30": Search(1),
    "knn-q1-k1024": Search(1, k=1024),
    "knn-q8192-k30": Search(8192),
    "knn-q2048-d64": Search(2048, dim=64),
    "knn-q16-d64": Search(16, dim=64),
    "knn-q1-d64": Search(1, dim=64),
    "knn-q2048-d768": Search(2048, dim=768),
    "knn-q16-d768": Search(16, dim=768),
    "knn-q1-d768": Search(1, dim=768),
}
"""In which an exact search must not be slower than faiss: queries, k, dimensions."""

WORKLOADS: dict[str, Workload] = {
    **SHAPES,
    "knn-400k": Search(2048, rows=400_000),
    **IN_CONTEXT,
}
