"""The canonical problems of NeCo's sort, and every provider's step on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from diffsort import DiffSortNet
from torch import Tensor
from torch.nn import functional as F

import fmkernels
from fmkernels.ops.soft_sort.networks import layers

STEEPNESS = 100.0


@dataclass
class Sorting:
    """Rows of n scores with a spread of 0.15, bitonic, cauchy, steepness 100.

    ``loss`` says whether the step is forward + backward of the cross entropy between two sorts, or
    of the permutation matrix of one.
    """

    rows: int
    n: int
    loss: bool = True
    cache: dict[str, object] = field(default_factory=dict)

    def operations(self) -> int:
        """Multiplications and additions of the fused step, rows of X in their support only.

        Per comparator and row of X: 6 to mix (the teacher's, or the forward pass of the matrix), 7
        to mix and keep the difference, 7 to go back.
        """
        reached_pairs = 0
        for row in range(self.n):
            reached = {row}
            for lo, hi in layers("bitonic", self.n):
                touched = [pair for pair in zip(lo, hi, strict=True) if reached & set(pair)]
                reached.update(wire for pair in touched for wire in pair)
                reached_pairs += len(touched)
        return self.rows * reached_pairs * (6 + 7 + 7)

    def bytes_moved(self) -> int:
        """What must be read and written at least: scores, gradient, and P where it is asked for."""
        return 4 * self.rows * self.n * (3 if self.loss else 2 + 2 * self.n)

    def inputs(self) -> tuple[Tensor, Tensor]:
        if "inputs" not in self.cache:
            generator = torch.Generator().manual_seed(0)
            student, teacher = 0.15 * torch.randn(2, self.rows, self.n, generator=generator)
            self.cache["inputs"] = student.requires_grad_(), teacher
        return self.cache["inputs"]  # type: ignore[return-value]

    def forward(self, provider: str) -> Callable[[], Tensor]:
        student, teacher = self.inputs()
        if provider in ("fmkernels", "reference"):
            backend = "auto" if provider == "fmkernels" else "reference"

            def run() -> Tensor:
                with fmkernels.backend(backend):
                    if self.loss:
                        return fmkernels.soft_sort_cross_entropy(
                            student, teacher, steepness=STEEPNESS
                        )
                    return fmkernels.soft_sort(student, steepness=STEEPNESS)[1]

            return run
        sorter = DiffSortNet("bitonic", self.n, steepness=STEEPNESS, distribution="cauchy")
        sort = torch.compile(sorter) if provider == "diffsort-compiled" else sorter

        def peer() -> Tensor:
            _, p = sort(student)
            if not self.loss:
                return p
            with torch.no_grad():
                _, q = sort(teacher)
            return -(q * p.log()).sum(dim=-1).mean()

        return peer

    def step(self, provider: str) -> Callable[[], Tensor]:
        """Forward and backward; returns the gradient of the scores."""
        forward, (student, _) = self.forward(provider), self.inputs()
        arriving = None if self.loss else self.arriving()

        def run() -> Tensor:
            output = forward()
            return torch.autograd.grad(output, student, arriving)[0]

        return run

    def arriving(self) -> Tensor:
        if "arriving" not in self.cache:
            generator = torch.Generator().manual_seed(1)
            self.cache["arriving"] = torch.randn(self.rows, self.n, self.n, generator=generator)
        return self.cache["arriving"]  # type: ignore[return-value]


@dataclass
class Features:
    """patch_neighbor_loss from features (batch, patches, dim), as many references."""

    batch: int
    patches: int = 49
    dim: int = 256

    def step(self, provider: str) -> Callable[[], Tensor]:
        generator = torch.Generator().manual_seed(0)
        shape = (3, self.batch, self.patches, self.dim)
        student, teacher, references = torch.randn(shape, generator=generator).unbind()
        student.requires_grad_()
        sorter = DiffSortNet("bitonic", self.patches, steepness=STEEPNESS)

        def similarities(patches: Tensor) -> Tensor:
            patches, others = F.normalize(patches, dim=-1), F.normalize(references, dim=-1)
            return torch.einsum("bnd,brd->bnr", patches, others).flatten(0, 1)

        def run() -> Tensor:
            if provider == "fmkernels":
                loss = fmkernels.patch_neighbor_loss(student, teacher, references)
            else:
                _, p = sorter(similarities(student))
                with torch.no_grad():
                    _, q = sorter(similarities(teacher))
                loss = -(q * p.log()).sum(dim=-1).mean()
            return torch.autograd.grad(loss, student)[0]

        return run


WORKLOADS: dict[str, Sorting | Features] = {
    "warm-up": Sorting(4, 4),
    "neco-step": Sorting(392, 49),
    "neco-196": Sorting(196, 196),
    "neco-196-small": Sorting(4, 196),
    "neco-features": Features(8),
    "soft-sort-matrix": Sorting(392, 49, loss=False),
    "soft-sort-matrix-16": Sorting(3136, 16, loss=False),
    "soft-sort-matrix-64": Sorting(392, 64, loss=False),
    "soft-sort-matrix-256": Sorting(8, 256, loss=False),
}
