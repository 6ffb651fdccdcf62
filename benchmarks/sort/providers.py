"""Who computes the sort: fmkernels, its reference, and the packages that a user would install."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from workload import Device

import fmkernels
from fmkernels.api import NeCoLoss
from fmkernels.api.roi_align import roi_align

STEEPNESS = 100.0


class Provider(NamedTuple):
    """What fmkernels calls these functions, bitonic, cauchy, steepness 100; None: has no such."""

    soft_sort: Callable[[Tensor], tuple[Tensor, ...]]
    soft_sort_cross_entropy: Callable[[Tensor, Tensor], Tensor] | None = None
    patch_neighbor_loss: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    neco_loss: Callable[..., Tensor] | None = None


def ours(n: int, device: Device = "cpu") -> Provider:
    names = Provider._fields[:3]
    return Provider(
        *(functools.partial(getattr(fmkernels, name), steepness=STEEPNESS) for name in names),
        functools.partial(fused_neco_loss, math.isqrt(n)),
    )


def fused_neco_loss(
    grid_size: int, student: list[Tensor], teacher: list[Tensor], boxes: Any, references: Tensor
) -> Tensor:
    criterion = NeCoLoss(grid_size, queue_size=None, steepness=STEEPNESS)
    return criterion(student, teacher, boxes, references=references)


def reference(n: int, device: Device = "cpu") -> Provider:
    def on_reference(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            with fmkernels.backend("reference"):
                return function(*arguments)

        return run

    return Provider(*map(on_reference, ours(n)))


def diffsort(n: int, device: Device = "cpu", *, compiled: bool = False) -> Provider:
    from diffsort import DiffSortNet

    sort = DiffSortNet("bitonic", n, str(device), steepness=STEEPNESS, distribution="cauchy")
    if compiled:
        sort = torch.compile(sort, dynamic=False)

    def cross_entropy(student: Tensor, teacher: Tensor) -> Tensor:
        _, p = sort(student)
        with torch.no_grad():
            _, q = sort(teacher)
        return -(q * p.log()).sum(dim=-1).mean()

    def neighbor_loss(student: Tensor, teacher: Tensor, references: Tensor) -> Tensor:
        references = F.normalize(references, dim=-1)

        def similarities(patches: Tensor) -> Tensor:
            patches = F.normalize(patches, dim=-1)
            return torch.einsum("bnd,brd->bnr", patches, references).flatten(0, 1)

        return cross_entropy(similarities(student), similarities(teacher))

    def neco_loss(
        student: list[Tensor], teacher: list[Tensor], boxes: Any, references: Tensor
    ) -> Tensor:
        """As NeCo's code has it, a pair of crops at a time, with our alignment of boxes."""
        grid_size, losses = math.isqrt(n), []
        for g in range(len(teacher)):
            for v in range(len(student)):
                if v != g:
                    theirs = roi_align(teacher[g], boxes[0][:, g, [v]], grid_size)[:, 0]
                    own = roi_align(student[v], boxes[1][:, v, [g]], grid_size)[:, 0]
                    losses.append(neighbor_loss(own, theirs, references[len(losses)]))
        return torch.stack(losses).mean()

    return Provider(sort, cross_entropy, neighbor_loss, neco_loss)


def torchsort(n: int, device: Device = "cpu") -> Provider:
    """Another relaxation, which has no permutation matrix.

    At its default strength scores with a spread of 0.15 are hardly pooled: its cheapest case.
    """
    import torchsort

    return Provider(lambda scores: (torchsort.soft_sort(scores),))


PROVIDERS: dict[str, Callable[..., Provider]] = {
    "fmkernels": ours,
    "reference": reference,
    "diffsort": functools.cache(diffsort),
    "diffsort-compiled": functools.cache(functools.partial(diffsort, compiled=True)),
    "torchsort": torchsort,
}
"""Provider of rows of n on a device, by name. diffsort's are kept: to make its matrices, or to
compile them, takes longer than to use them."""
