"""The projections of FUNGI's three losses at the sizes of vision transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from workload import INPUT_SETS, Device, Workload, in_turn, normal

from fungi import e2e, parity
from fungi.providers import PROVIDERS

DELTA = 1e-8
"""The size of KL's gradients."""


@dataclass(frozen=True)
class Projecting(Workload):
    """``samples`` gradients of a layer with a bias, each the sum of ``rows`` outer products."""

    samples: int
    rows: int = 1
    out: int = 768
    into: int = 768
    dim: int = 768

    @property
    def entries(self) -> int:
        return self.out * (self.into + 1)

    def inputs(self, seed: int, device: Device = "cpu") -> tuple[Tensor, Tensor]:
        delta = DELTA * normal(2 * seed, self.samples, self.rows, self.out)
        return delta.to(device), normal(2 * seed + 1, self.samples, self.rows, self.into).to(device)

    def step(
        self, provider: str, dtype: torch.dtype = torch.float32, device: Device = "cpu"
    ) -> Callable[[], Any]:
        who = PROVIDERS[provider]
        project = who.make(self.out, self.into, self.dim)
        pairs = [self.inputs(seed, device) for seed in range(INPUT_SETS)]
        sets = [who.prepare(delta.to(dtype), a.to(dtype)) for delta, a in pairs]
        return in_turn(lambda pair: project(*pair), sets)

    def check(self, peer: str, device: Device = "cpu", ours: str = "fmkernels") -> dict[str, Any]:
        return parity.check(self, peer, device, ours)

    def operations(self) -> int:
        """A product and a sum for every entry of every outer product: a count sketch's."""
        return 2 * self.samples * self.rows * self.entries

    def bytes_moved(self) -> int:
        return 4 * self.samples * (self.rows * (self.out + self.into) + self.dim)

    def tiny(self) -> Projecting:
        return replace(self, samples=3, rows=min(self.rows, 2), out=5, into=6, dim=8)


def vit(width: int, samples: int, rows: int = 1, dim: int | None = None) -> Projecting:
    """``attn.proj`` of a vision transformer, to the size of its embedding."""
    return Projecting(samples, rows, width, width, dim or width)


KL: dict[str, Workload] = {
    f"fungi-kl-{name}-{samples}": vit(width, samples)
    for name, width in (("s", 384), ("b", 768), ("l", 1024))
    for samples in (1, 64, 1024)
}
"""ViT-S, B and L; one row for every sample."""

WORKLOADS: dict[str, Workload] = {
    **KL,
    "fungi-kl-b-4096-1": vit(768, 1, dim=4096),
    "fungi-kl-b-4096-64": vit(768, 64, dim=4096),
    "fungi-simclr-4": vit(384, 4, rows=49),
    "fungi-simclr-32": vit(384, 32, rows=49),
    "fungi-tokens": vit(384, 4096),
    **e2e.WORKLOADS,
}
