"""``fungi-e2e``: from pictures to FUNGI features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from workload import INPUT_SETS, Device, Workload, in_turn

from fmkernels.ops.knn.config import has_fast_bfloat16
from fungi.e2e_providers import OBJECTIVES, PROVIDERS, VIEWS, same_views, wrapper

AGREES = 1 - 1e-5
"""Cosine of the same features by two programs in float32."""
KEPT = 0.99
"""Cosine of a feature in bfloat16 to that in float32, at least."""


@dataclass(frozen=True)
class Extracting(Workload):
    """The features of some pictures by some objectives, and their embeddings; a ViT-S/16."""

    pictures: int
    objectives: tuple[str, ...]
    patch: int = 16
    width: int = 384
    depth: int = 12
    heads: int = 6
    sides: tuple[int, int] = (375, 500)

    @property
    def target_layer(self) -> str:
        """The output projection of the last attention."""
        return f"blocks.{self.depth - 1}.attn.proj"

    @property
    def views(self) -> int:
        """That go through the model; the embedding's is KL's, too."""
        kinds = {"plain", *(OBJECTIVES[name].view for name in self.objectives)}
        return self.pictures * sum(VIEWS.counts[kind] for kind in kinds)

    def inputs(self, seed: int) -> list[Any]:
        """PIL's images of random regions, each another one."""
        from PIL import Image

        draw = torch.Generator().manual_seed(seed)
        coarse = torch.rand(self.pictures, 3, 12, 16, generator=draw)
        fine = F.interpolate(coarse, self.sides, mode="bicubic").clamp(0, 1)
        fine = (fine + 0.05 * torch.rand(fine.shape, generator=draw)).mul(242).byte()
        return [Image.fromarray(picture.numpy()) for picture in fine.permute(0, 2, 3, 1)]

    def step(
        self, provider: str, dtype: torch.dtype = torch.float32, device: Device = "cpu"
    ) -> Callable[[], Tensor]:
        """Features (pictures, (1 + objectives) · width)."""
        return in_turn(PROVIDERS[provider](self), [self.inputs(seed) for seed in range(INPUT_SETS)])

    def check(self, peer: str, device: Device = "cpu", ours: str = "fmkernels") -> dict[str, Any]:
        """Fail unless the peer's features are ours in float32, given one set of views, heads and
        matrix, and ours in another dtype are close to those.

        Returns:
            The least cosine of an embedding or a gradient to that in float32, and whether this CPU
            multiplies bfloat16 itself.
        """
        exact = PROVIDERS["fmkernels"](self)(self.inputs(0))
        if peer == "fungivision":
            agree("gradients", *same_views(wrapper(self), self))
        else:
            agree("embeddings", PROVIDERS[peer](self)(self.inputs(0)), exact[:, : self.width])
        found = PROVIDERS[ours](self)(self.inputs(0))
        cosines = F.cosine_similarity(
            *(x.unflatten(1, (-1, self.width)) for x in (found, exact)), 2
        )
        worst = cosines.min().item()
        assert worst >= KEPT, f"{ours}: cosine {worst} to float32, expected at least {KEPT}"
        return {"cosine": round(worst, 5), "native_bfloat16": has_fast_bfloat16()}

    def operations(self) -> int:
        """Of the forward passes."""
        tokens = (VIEWS.size // self.patch) ** 2
        linear = 12 * self.depth * self.width**2 + 3 * self.patch**2 * self.width
        attention = 2 * self.depth * tokens * self.width
        return 2 * self.views * tokens * (linear + attention)

    def bytes_moved(self) -> int:
        """Pictures and weights in, features out."""
        weights = 12 * self.depth * self.width**2
        features = self.pictures * (1 + len(self.objectives)) * self.width
        return 3 * self.pictures * self.sides[0] * self.sides[1] + 4 * (weights + features)

    def tiny(self) -> Extracting:
        return replace(self, pictures=1, patch=56, width=24, depth=2, heads=2, sides=(40, 50))


def agree(what: str, theirs: Tensor, ours: Tensor) -> None:
    """Fail unless they point the same way."""
    worst = F.cosine_similarity(theirs.double(), ours.double(), dim=1).min().item()
    assert worst >= AGREES, f"{what}: cosine {worst} to the peer's, expected {AGREES}"


def measurement(peer: str, ours: str = "fmkernels") -> str:
    """The key of a ratio in the results."""
    return f"end to end, {peer}" + ("" if ours == "fmkernels" else f", {ours}")


WORKLOADS: dict[str, Workload] = {
    "fungi-e2e-kl": Extracting(16, ("KL",)),
    "fungi-e2e-dino": Extracting(4, ("DINO",)),
    "fungi-e2e-simclr": Extracting(2, ("SimCLR",)),
    "fungi-e2e-all": Extracting(2, ("KL", "DINO", "SimCLR")),
}
