"""A student network learns the teacher's order of neighbours from ``patch_neighbor_loss`` alone.

The teacher is a fixed descriptor (colour, layout and edge directions of a patch). The student sees
8 × 8 pixels and starts untrained. As in NeCo, both order the same references, which are teacher
features of the batch's own patches in a random order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fmkernels
from fmkernels import _library
from fmkernels.demo import photographs

BATCH = 16
BATCH_WITHOUT_KERNELS = 3
"""The reference takes about 0.1 s an image, a hundred times as long as the kernels."""
REFERENCES = 49
QUERIES = 200
STEEPNESS = 100.0
FEATURES = 20


def describe(patches: Tensor) -> Tensor:
    """(…, 3, PATCH, PATCH) -> (…, 20): colours of the four quarters, and eight edge directions."""
    images = patches.flatten(0, -4)
    red, green, blue = images.unbind(dim=1)
    brightness = images.mean(dim=1)
    colours = torch.stack([3 * brightness, 6 * (red - green), 3 * (red + green) - 6 * blue], dim=1)
    layout = F.adaptive_avg_pool2d(colours, 2).flatten(1)

    dy, dx = torch.gradient(F.avg_pool2d(brightness, 2), dim=(1, 2))
    centres = torch.arange(8, device=images.device).view(-1, 1, 1, 1) * math.pi / 8
    angle = (torch.atan2(dy, dx) - centres + math.pi / 2) % math.pi - math.pi / 2
    votes = torch.hypot(dx, dy) * (1 - angle.abs() * 8 / math.pi).clamp_min(0)
    edges = votes.mean(dim=(2, 3)).sqrt().T  # (M, 8)
    return torch.cat([layout, 3 * edges], dim=1).reshape(*patches.shape[:-3], FEATURES)


class Whitening:
    """Centres features and evens out their directions in part, so that cosines spread."""

    def __init__(self, features: Tensor) -> None:
        self.centre = features.mean(dim=0)
        variance, directions = torch.linalg.eigh(torch.cov(features.T))
        self.matrix = directions * variance.clamp_min(1e-4).pow(-0.2)

    def __call__(self, features: Tensor) -> Tensor:
        """(…, D) -> (…, D)"""
        whitened: Tensor = (features - self.centre) @ self.matrix
        return whitened


@dataclass(frozen=True)
class Evaluation:
    """How well the student orders the references for held-out patches, held against the teacher."""

    loss: float
    floor: float
    """The loss of a student that equals the teacher: the entropy of the relaxed order."""
    spearman: float
    top5: float


class Experiment:
    """Photographs, teacher, student and optimiser."""

    def __init__(self, photos: dict[str, Tensor], steps: int) -> None:
        self.photos = photos
        self.batch = BATCH if _library.native is not None else BATCH_WITHOUT_KERNELS
        held_out = [photographs.held_out(photo).flatten(0, 1) for photo in photos.values()]
        seen = torch.cat(
            [photographs.for_training(photo).flatten(0, 1) for photo in photos.values()]
        )
        self.whiten = Whitening(describe(seen))
        self.references = self._references()
        self.test = torch.cat(held_out)[torch.randperm(sum(map(len, held_out)))[:QUERIES]]
        self.student = nn.Sequential(
            nn.AdaptiveAvgPool2d(8),
            nn.Flatten(),
            nn.Linear(3 * 8 * 8, 256),
            nn.GELU(),
            nn.Linear(256, FEATURES),
        )
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=3e-3)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)

    def _references(self) -> Tensor:
        """As many training patches of every photograph, (REFERENCES, 3, PATCH, PATCH)."""
        grids = [photographs.for_training(photo).flatten(0, 1) for photo in self.photos.values()]
        grids = [grid[torch.randperm(len(grid))] for grid in grids]
        turns = [grid[turn] for turn in range(REFERENCES) for grid in grids]
        return torch.stack(turns[:REFERENCES])

    def teacher(self, patches: Tensor) -> Tensor:
        """(…, 3, PATCH, PATCH) -> (…, D)"""
        return self.whiten(describe(patches))

    def step(self) -> float:
        """One gradient step on a batch of crops; returns the loss."""
        photos = list(self.photos.values())
        chosen = torch.randint(len(photos), (self.batch,)).tolist()
        crops = torch.stack([photographs.random_crop(photos[i]) for i in chosen])
        teacher = self.teacher(crops)  # (B, N, D)
        student = self.student(crops.flatten(0, 1)).view_as(teacher)
        shuffled = torch.randperm(self.batch * REFERENCES)
        references = teacher.flatten(0, 1)[shuffled].view_as(teacher)
        loss = fmkernels.patch_neighbor_loss(student, teacher, references, steepness=STEEPNESS)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return loss.item()

    @torch.no_grad()
    def scores(self, patches: Tensor, *, teacher: bool = False) -> Tensor:
        """(M, 3, PATCH, PATCH) -> (M, REFERENCES): cosine similarities to the references."""
        features = self.teacher(patches) if teacher else self.student(patches)
        return F.normalize(features, dim=-1) @ F.normalize(self.teacher(self.references), dim=-1).T

    def evaluate(self) -> Evaluation:
        """Student against teacher on patches that are in no training crop."""
        from scipy.stats import spearmanr

        student, teacher = self.scores(self.test), self.scores(self.test, teacher=True)
        nearest = [scores.topk(5).indices.tolist() for scores in (student, teacher)]
        shared = [len({*a} & {*b}) / 5 for a, b in zip(*nearest, strict=True)]
        ranks = [spearmanr(a, b).statistic for a, b in zip(student, teacher, strict=True)]

        def loss(scores: Tensor) -> float:
            return fmkernels.soft_sort_cross_entropy(scores, teacher, steepness=STEEPNESS).item()

        return Evaluation(
            loss(student), loss(teacher), float(np.mean(ranks)), float(np.mean(shared))
        )

    def order(self, patches: Tensor, *, teacher: bool = False) -> Tensor:
        """(M, 3, PATCH, PATCH) -> (M, REFERENCES, REFERENCES): relaxed permutation matrices."""
        return fmkernels.soft_sort(self.scores(patches, teacher=teacher), steepness=STEEPNESS)[1]
