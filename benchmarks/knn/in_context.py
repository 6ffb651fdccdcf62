"""Dense retrieval at the size of Pascal VOC: labelling patches, and building the memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from workload import INPUT_SETS, Device, Workload, in_turn, normal

from fmkernels.ops.knn.reference import unit
from fmkernels.testing import assert_parity
from knn.in_context_providers import IGNORED, PROVIDERS, TEMPERATURE, K, Memory

PATCH = 14
"""Pixels, each way."""
CHECKED = 128
"""Patches whose labels are computed in float64."""


def integers(seed: int, largest: int, *shape: int) -> Tensor:
    """From 0 to ``largest``, that one included."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(largest + 1, shape, generator=generator)


@dataclass(frozen=True)
class Labelling(Workload):
    """The labels of all patches of some images, from a memory of features with pixel counts."""

    images: int = 4
    side: int = 36
    rows: int = 102_400
    dim: int = 384
    classes: int = 21

    def inputs(self, seed: int) -> Tensor:
        """Features (images, patches, D)."""
        return normal(1 + seed, self.images, self.side**2, self.dim)

    def memory(self) -> Memory:
        """Every patch has pixels of two classes."""
        counts = torch.zeros(self.rows, self.classes, dtype=torch.uint8)
        first = integers(0, PATCH**2, self.rows, 1)
        pair = integers(1, self.classes - 1, self.rows, 2)
        counts.scatter_add_(1, pair, torch.cat([first, PATCH**2 - first], dim=1).byte())
        return F.normalize(normal(0, self.rows, self.dim), dim=1), counts

    def step(
        self, provider: str, dtype: torch.dtype = torch.float32, device: Device = "cpu"
    ) -> Callable[[], Any]:
        """Labels (patches, C)."""
        label = PROVIDERS[provider].labeller(self.memory())
        return in_turn(label, [self.inputs(seed) for seed in range(INPUT_SETS)])

    def check(self, peer: str, device: Device = "cpu", ours: str = "fmkernels") -> dict[str, Any]:
        """Fail unless our labels err at most twice as much as the peer's, against float64."""
        labels, theirs = self.step(ours)(), self.step(peer)()
        picked = slice(0, None, -(-len(labels) // CHECKED))
        assert_parity(labels[picked], theirs[picked], self.exact(picked), name=f"beside {peer}")
        return {}

    def exact(self, picked: slice) -> Tensor:
        """The labels of some of the patches of the first inputs, in float64."""
        features, counts = self.memory()
        queries = unit(self.inputs(0).flatten(0, 1)[picked].double())
        cosines, indices = (queries @ unit(features.double()).mT).topk(K)
        shares = (cosines / TEMPERATURE).softmax(dim=1)
        labels = counts[indices].double()
        return (shares.unsqueeze(-1) * labels / labels.sum(dim=-1, keepdim=True)).sum(dim=1)

    def operations(self) -> int:
        return 2 * self.images * self.side**2 * self.rows * self.dim

    def bytes_moved(self) -> int:
        """The rows in bfloat16, once; features and labels of the patches."""
        return 2 * self.rows * self.dim + 4 * self.images * self.side**2 * (self.dim + self.classes)

    def tiny(self) -> Labelling:
        return replace(self, images=2, side=6, rows=100, dim=8, classes=3)


@dataclass(frozen=True)
class Building(Workload):
    """A memory of some patches of every image, from the features of all and the masks."""

    images: int = 16
    side: int = 36
    kept: int = 1024
    dim: int = 384
    classes: int = 21
    batch: int = 4

    def inputs(self, seed: int) -> tuple[Tensor, Tensor]:
        """Features (images, patches, D), masks (images, H, W): mostly background, regions of the
        other classes that do not begin where patches do, outlines that are ignored."""
        features = normal(seed, self.images, self.side**2, self.dim)
        regions = integers(seed, 2 * self.classes - 2, self.images, 9, 9)
        regions[regions >= self.classes] = 0
        pixels = self.side * PATCH
        masks = F.interpolate(regions[:, None].double(), (pixels, pixels)).long()[:, 0]
        masks = masks.roll((5, 9), (1, 2))
        outline = (masks != masks.roll(2, 1)) | (masks != masks.roll(2, 2))
        return features, masks.masked_fill(outline, IGNORED)

    def step(
        self, provider: str, dtype: torch.dtype = torch.float32, device: Device = "cpu"
    ) -> Callable[[], Memory]:
        build = PROVIDERS[provider].builder
        sets = [self.inputs(seed) for seed in range(INPUT_SETS)]
        sets = [(features.to(dtype), masks) for features, masks in sets]
        return in_turn(lambda given: build(*given, self.classes, self.kept, self.batch), sets)

    def check(self, peer: str, device: Device = "cpu", ours: str = "fmkernels") -> dict[str, Any]:
        """Fail unless the same patches were kept, and features and labels err at most twice as
        much as the peer's, against its own steps in float64."""
        (features, counts), theirs = self.step(ours)(), self.step(peer)()
        exact = self.step("published", torch.float64)()
        assert_parity(features, theirs[0], exact[0], name=f"features beside {peer}")
        labels = counts.float() / counts.sum(dim=1, keepdim=True)
        assert_parity(labels, theirs[1], exact[1], name=f"labels beside {peer}")
        return {}

    def operations(self) -> int:
        """To normalise what is kept, and to count the pixels."""
        return self.images * (3 * self.kept * self.dim + (self.side * PATCH) ** 2)

    def bytes_moved(self) -> int:
        """Masks, and the features that are kept, in and out, with their counts."""
        kept = self.kept * (8 * self.dim + self.classes)
        return self.images * (8 * (self.side * PATCH) ** 2 + kept)

    def tiny(self) -> Building:
        return replace(self, images=4, side=9, kept=40, dim=8, classes=5, batch=2)


WORKLOADS: dict[str, Workload] = {
    "hummingbird-voc": Labelling(),
    "hummingbird-voc-memory": Building(),
}
