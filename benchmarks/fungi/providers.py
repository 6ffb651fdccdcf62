"""Who projects gradients: our projections, and the published product with a stored matrix."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import fmkernels
from fmkernels import Projection

Project = Callable[[Tensor, Tensor], Tensor]
"""δ (B, S, out) and a (B, S, in) -> (B, K)."""

GATHERED = 2**28
"""Numbers of gradients that the published steps build at a time: those of some samples."""


@functools.lru_cache(maxsize=1)
def stored_matrix(dim: int, entries: int) -> Tensor:
    """Random signs, as fungivision draws them; the next size's takes its place."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (dim, entries), generator=generator, dtype=torch.int8)
    return signs.float().mul_(2).sub_(1)


def build(delta: Tensor, a: Tensor) -> Tensor:
    """(B, out · (in + 1)): the gradients, the bias as the last column."""
    weight = torch.einsum("bsi,bsj->bij", delta, a)
    return torch.cat([weight, delta.sum(dim=1).unsqueeze(2)], dim=2).flatten(1)


def published(dtype: torch.dtype, out: int, into: int, dim: int) -> Project:
    """fungivision's arithmetic: all gradients, then one product with the matrix, in ``dtype``."""
    entries = out * (into + 1)
    matrix = stored_matrix(dim, entries).to(dtype)

    def project(delta: Tensor, a: Tensor) -> Tensor:
        parts = zip(delta.split(GATHERED // entries), a.split(GATHERED // entries), strict=True)
        return torch.cat([(matrix @ build(*part).to(dtype).T).T.float() for part in parts])

    return project


TOKENS = 197
"""Of a view: a vision transformer's, of which the loss sees the first."""


def with_tokens(delta: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """(B, S, n) -> (B, S, tokens, n): what hooks on the layer record; δ is 0 at other tokens."""
    others = a.unsqueeze(2).repeat(1, 1, TOKENS, 1)
    return F.pad(delta.unsqueeze(2), (0, 0, 0, TOKENS - 1)), others


def fungivision(out: int, into: int, dim: int) -> Project:
    """All of its steps: every token of every view, the gradients of views stored and then added."""
    matrix = stored_matrix(dim, out * (into + 1))

    def project(delta: Tensor, a: Tensor) -> Tensor:
        samples, views = delta.shape[:2]
        of_views = torch.einsum("nti,ntj->nij", delta.flatten(0, 1), a.flatten(0, 1))
        weight = of_views.reshape(samples, views, out, into).sum(dim=1)
        bias = delta.sum(dim=2).sum(dim=1).unsqueeze(2)
        return (matrix @ torch.cat([weight, bias], dim=2).flatten(1).T).T

    return project


def ours(make: Callable[[int, int, int], Projection], out: int, into: int, dim: int) -> Project:
    projection = make(out, into, dim)
    return lambda delta, a: fmkernels.project_gradients(delta, a, projection)


def packed(out: int, into: int, dim: int) -> Projection:
    """The very matrix of the published steps."""
    return fmkernels.Rademacher.from_matrix(stored_matrix(dim, out * (into + 1)), out, into)


class Provider(NamedTuple):
    """``make`` takes the layer's outputs and inputs, and K; what it does is not timed."""

    make: Callable[[int, int, int], Project]
    stores: bool = False
    """Whether it multiplies with the stored matrix: such providers must agree."""
    prepare: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda delta, a: (delta, a)
    """What is done to the inputs, not timed."""
    error: float = 2.0**-18
    """That its results may have, relative to their size."""


PROVIDERS: dict[str, Provider] = {
    "fmkernels": Provider(functools.partial(ours, fmkernels.CountSketch)),
    "fmkernels-packed": Provider(functools.partial(ours, packed), stores=True),
    "fmkernels-seeded": Provider(functools.partial(ours, fmkernels.Rademacher)),
    "fmkernels-khatri-rao": Provider(functools.partial(ours, fmkernels.KhatriRao)),
    "fmkernels-kronecker": Provider(functools.partial(ours, fmkernels.Kronecker)),
    # 590,592 products in a sum were seen to err by 7e-6
    "float32": Provider(functools.partial(published, torch.float32), stores=True, error=2.0**-16),
    "fungivision": Provider(fungivision, stores=True, prepare=with_tokens, error=2.0**-16),
    # each factor is off by 2⁻⁹, and the result is rounded once more
    "bfloat16": Provider(functools.partial(published, torch.bfloat16), stores=True, error=2.0**-6),
}
