"""The canonical problems of NeCo's sort: their inputs, their work, and anyone's step on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from workload import INPUT_SETS, Device, Workload, in_turn, normal, on_device

from fmkernels.api import intersection_boxes
from fmkernels.ops.soft_sort.networks import layers
from sort import parity
from sort.providers import PROVIDERS, Provider


class SortWorkload(Workload):
    """``rows`` of ``n`` to be sorted, differentiated with respect to its first input."""

    rows: int
    n: int

    def inputs(self, seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        """The first requires a gradient. Those of float64 are those of float32, widened."""
        raise NotImplementedError

    def output(self, provider: Provider, *inputs: Tensor) -> Tensor:
        raise NotImplementedError

    def arriving(self, seed: int, dtype: torch.dtype = torch.float32) -> Tensor | None:
        """The gradient of the output; None where that is a scalar."""
        return None

    def forward(self, provider: str, inputs: tuple[Tensor, ...]) -> Callable[[], Tensor]:
        functions = PROVIDERS[provider](self.n, inputs[0].device)
        return lambda: self.output(functions, *inputs)

    def step(
        self, provider: str, dtype: torch.dtype = torch.float32, device: Device = "cpu"
    ) -> Callable[[], Tensor]:
        """Forward and backward; returns the gradient."""
        functions = PROVIDERS[provider](self.n, device)
        sets = [
            (on_device(self.inputs(i, dtype), device), on_device(self.arriving(i, dtype), device))
            for i in range(INPUT_SETS)
        ]

        def gradient(given: tuple[tuple[Tensor, ...], Tensor | None]) -> Tensor:
            inputs, arriving = given
            return torch.autograd.grad(self.output(functions, *inputs), inputs[0], arriving)[0]

        return in_turn(gradient, sets)

    def check(self, peer: str, device: Device = "cpu", ours: str = "fmkernels") -> dict[str, int]:
        return parity.check(self, peer, device, ours)


@dataclass(frozen=True)
class Sorting(SortWorkload):
    """Scores with a spread of 0.15.

    ``result`` is what is differentiated: ``"loss"`` between two sorts, or the permutation
    ``"matrix"`` or the sorted ``"values"`` of one.
    """

    rows: int
    n: int
    result: str = "loss"

    def inputs(self, seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        student, teacher = (0.15 * normal(seed, 2, self.rows, self.n)).to(dtype)
        return (student.requires_grad_(), teacher)[: 2 if self.result == "loss" else 1]

    def output(self, provider: Provider, *inputs: Tensor) -> Tensor:
        if self.result == "loss":
            return provider.soft_sort_cross_entropy(*inputs)
        return provider.soft_sort(*inputs)[self.result == "matrix"]

    def arriving(self, seed: int, dtype: torch.dtype = torch.float32) -> Tensor | None:
        if self.result == "loss":
            return None
        shape = (self.rows, self.n, self.n)[: 3 if self.result == "matrix" else 2]
        return normal(INPUT_SETS + seed, *shape).to(dtype)

    OPERATIONS: ClassVar = (6, 7, 7)
    """Per comparator and row: to mix (the teacher's, or the forward pass of one), to mix and keep
    the difference, to go back."""

    def operations(self) -> int:
        return self.rows * self.comparators_met() * sum(self.OPERATIONS)

    def comparators_met(self) -> int:
        """By the rows of X, in their support only; by the row of values for ``"values"``."""
        everything = set(range(self.n))
        rows = [everything] if self.result == "values" else [{row} for row in everything]
        reached_pairs = 0
        for reached in rows:
            for lo, hi in layers("bitonic", self.n):
                touched = [pair for pair in zip(lo, hi, strict=True) if reached & set(pair)]
                reached.update(wire for pair in touched for wire in pair)
                reached_pairs += len(touched)
        return reached_pairs

    def bytes_moved(self) -> int:
        """Scores, gradient, and P with its gradient where it is asked for."""
        per_row = {"loss": 3, "matrix": 2 + 2 * self.n, "values": 4}[self.result]
        return 4 * self.rows * self.n * per_row

    def tiny(self) -> Sorting:
        return replace(self, rows=4, n=4)


@dataclass(frozen=True)
class Features(SortWorkload):
    """patch_neighbor_loss of ``batch`` images with ``n`` patches each, and as many references."""

    batch: int
    n: int = 49
    dim: int = 256

    @property
    def rows(self) -> int:
        return self.batch * self.n

    def inputs(self, seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        student, teacher, references = normal(seed, 3, self.batch, self.n, self.dim).to(dtype)
        return student.requires_grad_(), teacher, references

    def output(self, provider: Provider, *inputs: Tensor) -> Tensor:
        return provider.patch_neighbor_loss(*inputs)

    def operations(self) -> int:
        """The sort, and the products of the student, the teacher and the student's gradient."""
        return Sorting(self.rows, self.n).operations() + products(self.rows, self.n, self.dim)

    def bytes_moved(self) -> int:
        return 4 * 4 * self.rows * self.dim

    def tiny(self) -> Features:
        return Features(batch=2, n=4, dim=8)


@dataclass(frozen=True)
class TrainingLoss(SortWorkload):
    """NeCoLoss of ``batch`` images: two global crops, four local ones, ten pairs, from their maps.

    A row is a patch of a pair; the boxes are everywhere the same.
    """

    batch: int
    n: int = 49
    dim: int = 256
    sides: tuple[int, ...] = (16, 16, 7, 7, 7, 7)

    @property
    def rows(self) -> int:
        return self.batch * 2 * (len(self.sides) - 1) * self.n

    def inputs(self, seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        """All crops' tokens in a row, (B, D, tokens), and the references."""
        tokens = sum(side**2 for side in self.sides)
        student, teacher = normal(seed, 2, self.batch, self.dim, tokens).to(dtype)
        pairs = 2 * (len(self.sides) - 1)
        references = normal(INPUT_SETS + seed, pairs, self.batch, self.n, self.dim).to(dtype)
        return student.requires_grad_(), teacher, references

    def output(self, provider: Provider, *inputs: Tensor) -> Tensor:
        student, teacher, references = inputs
        lengths = [side**2 for side in self.sides]
        maps, targets = (
            [
                part.unflatten(-1, (side, side))
                for part, side in zip(tokens.split(lengths, -1), self.sides, strict=True)
            ]
            for tokens in (student, teacher)
        )
        return provider.neco_loss(maps, targets[:2], self.boxes(student), references)

    def boxes(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Global crops of 200 pixels, local ones of 70 in their intersection."""
        corners = [(0, 0), (60, 40), *((60 + 20 * k, 50 + 15 * k) for k in range(4))]
        sizes = [200, 200, *[70] * 4]
        crops = [
            (x, y, x + size, y + size)
            for (x, y), size in list(zip(corners, sizes, strict=True))[: len(self.sides)]
        ]
        crops = torch.tensor([crops] * self.batch, dtype=like.dtype, device=like.device)
        return intersection_boxes(crops, [(side, side) for side in self.sides])

    def operations(self) -> int:
        return Sorting(self.rows, self.n).operations() + products(self.rows, self.n, self.dim)

    def bytes_moved(self) -> int:
        """Maps and their gradient, references."""
        tokens = sum(side**2 for side in self.sides)
        return 4 * self.dim * (self.batch * 3 * tokens + self.rows)

    def tiny(self) -> TrainingLoss:
        return TrainingLoss(batch=1, n=4, dim=8, sides=(5, 5, 3))


def products(rows: int, n: int, dim: int) -> int:
    """Of the similarities of student and teacher, and of the student's gradient."""
    return 3 * 2 * rows * n * dim


WORKLOADS: dict[str, SortWorkload] = {
    "neco-step": Sorting(392, 49),
    "neco-196": Sorting(196, 196),
    "neco-196-small": Sorting(4, 196),
    "neco-features": Features(64),
    "neco-features-8": Features(8),
    "neco-loss": TrainingLoss(2),
    "neco-loss-14": TrainingLoss(4, n=196),
    "soft-sort-matrix": Sorting(3136, 49, "matrix"),
    "soft-sort-matrix-392": Sorting(392, 49, "matrix"),
    "soft-sort-matrix-16": Sorting(3136, 16, "matrix"),
    "soft-sort-matrix-64": Sorting(392, 64, "matrix"),
    "soft-sort-matrix-256": Sorting(8, 256, "matrix"),
    "soft-sort-values": Sorting(3136, 49, "values"),
}

TOO_LARGE: dict[str, SortWorkload] = {"neco-loss-14": TrainingLoss(1, n=196, sides=(16, 16))}
"""diffsort would keep more than this memory holds, and the reference take minutes: results are
checked on these instead."""
