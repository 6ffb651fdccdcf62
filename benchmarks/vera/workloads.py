"""Layers of transformers with a VeRA adapter, and the norms that DVoRA needs of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from workload import INPUT_SETS, Device, Workload, in_turn, normal

from vera import models, parity
from vera.floor import fewest
from vera.norms import NORMS
from vera.providers import PROVIDERS, Layer


@dataclass(frozen=True)
class Adapted(Workload):
    """Forward and backward of a layer, whose input needs a gradient, too."""

    into: int
    out: int
    rank: int
    tokens: int
    dtype: torch.dtype = torch.bfloat16
    adapters: int = 64
    """Where every token has one of its own."""

    def inputs(self, seed: int) -> tuple[Tensor, Tensor]:
        x = normal(2 * seed, self.tokens, self.into).to(self.dtype).requires_grad_()
        return x, normal(2 * seed + 1, self.tokens, self.out).to(self.dtype)

    def step(
        self, provider: str, dtype: torch.dtype = torch.float32, device: Device = "cpu"
    ) -> Callable[[], list[Tensor]]:
        run = PROVIDERS[provider](Layer(self))
        return in_turn(lambda pair: run(*pair), [self.inputs(seed) for seed in range(INPUT_SETS)])

    def check(self, peer: str, device: Device = "cpu", ours: str = "fmkernels") -> dict[str, Any]:
        return parity.check(self, peer, ours)

    def operations(self) -> int:
        """Of the base layer, and of the adapter's products in the form with the fewest."""
        sizes = (self.tokens, self.into, self.out, self.rank)
        adapter = fewest(*sizes, exact=self.dtype == torch.float32)
        return 4 * self.tokens * self.into * self.out + 2 * adapter

    def bytes_moved(self) -> int:
        rows = 2 * self.tokens * (self.into + self.out)
        matrices = self.into * self.out + self.rank * (self.into + self.out)
        return self.dtype.itemsize * (rows + matrices)

    def tiny(self) -> Adapted:
        return replace(self, into=6, out=5, rank=4, tokens=9, adapters=3)


@dataclass(frozen=True)
class Norms(Workload):
    """The norms of the rows of W0 + ΔW, in float32, after the vectors have changed."""

    into: int
    out: int
    rank: int

    def step(
        self, provider: str, dtype: torch.dtype = torch.float32, device: Device = "cpu"
    ) -> Callable[[], Tensor]:
        weight = normal(1, self.out, self.into) / self.into**0.5
        A, B = normal(2, self.rank, self.into), normal(3, self.out, self.rank)
        vectors = [
            (normal(2 * seed + 4, self.rank), normal(2 * seed + 5, self.out))
            for seed in range(INPUT_SETS)
        ]
        run = NORMS[provider](weight, A / self.rank**0.5, B / self.into**0.5)
        return in_turn(lambda pair: run(*pair), vectors)

    def check(self, peer: str, device: Device = "cpu", ours: str = "fmkernels") -> dict[str, Any]:
        found, expected = self.step(ours)(), self.step(peer)()
        error = ((found - expected).abs() / expected).max().item()
        assert error <= 2.0**-18, f"{ours}: norms differ by {error:.3g} of {peer}'s"
        return {}

    def operations(self) -> int:
        inner = min(self.rank, self.into)
        triangle = inner * (2 * self.rank - inner + 1)
        return self.out * (triangle + 2 * self.rank + 2 * inner)

    def bytes_moved(self) -> int:
        inner = min(self.rank, self.into)
        triangle = inner * (2 * self.rank - inner + 1) // 2
        return 4 * (self.out * (self.rank + inner) + triangle)

    def tiny(self) -> Norms:
        return replace(self, into=6, out=5, rank=4)


SHAPES = {
    "vera-roberta": Adapted(768, 768, 1024, 2048),
    "vera-vit-l": Adapted(1024, 1024, 256, 2048),
    "vera-llama-q": Adapted(4096, 4096, 256, 512),
}

WORKLOADS: dict[str, Workload] = {
    **SHAPES,
    **{f"{name}-float32": replace(it, dtype=torch.float32) for name, it in SHAPES.items()},
    **{
        name.replace("vera", "dvora-norm"): Norms(it.into, it.out, it.rank)
        for name, it in SHAPES.items()
    },
    **models.WORKLOADS,
}
