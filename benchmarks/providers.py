"""Who computes the sort: fmkernels, its reference, and the packages that a user would install."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from diffsort import DiffSortNet
from torch import Tensor
from torch.nn import functional as F

import fmkernels

STEEPNESS = 100.0


class Provider(NamedTuple):
    """What fmkernels calls these functions, bitonic, cauchy, steepness 100; None: has no such."""

    soft_sort: Callable[[Tensor], tuple[Tensor, ...]]
    soft_sort_cross_entropy: Callable[[Tensor, Tensor], Tensor] | None = None
    patch_neighbor_loss: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None


def ours(n: int) -> Provider:
    functions = (getattr(fmkernels, name) for name in Provider._fields)
    return Provider(*(functools.partial(function, steepness=STEEPNESS) for function in functions))


def reference(n: int) -> Provider:
    def on_reference(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*tensors: Tensor) -> Any:
            with fmkernels.backend("reference"):
                return function(*tensors)

        return run

    return Provider(*map(on_reference, ours(n)))


def diffsort(n: int, *, compiled: bool = False) -> Provider:
    sort = DiffSortNet("bitonic", n, steepness=STEEPNESS, distribution="cauchy")
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

    return Provider(sort, cross_entropy, neighbor_loss)


def torchsort(n: int) -> Provider:
    """Another relaxation, which has no permutation matrix.

    At its default strength scores with a spread of 0.15 are hardly pooled: its cheapest case.
    """
    import torchsort

    return Provider(lambda scores: (torchsort.soft_sort(scores),))


PROVIDERS: dict[str, Callable[[int], Provider]] = {
    "fmkernels": ours,
    "reference": reference,
    "diffsort": functools.cache(diffsort),
    "diffsort-compiled": functools.cache(functools.partial(diffsort, compiled=True)),
    "torchsort": torchsort,
}
"""Provider of rows of n, by name. diffsort's are kept: to make its matrices, or to compile them,
takes longer than to use them."""
