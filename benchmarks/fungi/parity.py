"""Whether projections are right: in float64, for some samples and some of their numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from workload import Device

import fmkernels
from fungi.providers import PROVIDERS, build, stored_matrix

if TYPE_CHECKING:
    from fungi.workloads import Projecting

SAMPLES = 2
OUTPUTS = 8
"""Numbers of a result that are compared, spread over it: those side by side of a Kronecker product
have one factor in common, which may be near 0."""


def some(values: Tensor, dim: int) -> Tensor:
    """OUTPUTS of what lies along a dimension."""
    return values.index_select(dim, torch.linspace(0, values.shape[dim] - 1, OUTPUTS).long())


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Of the samples' sets of numbers, the worst."""
    found, exact = found.double(), exact.double()
    return ((found - exact).norm(dim=1) / exact.norm(dim=1)).max().item()


def expected(problem: Projecting, provider: str, delta: Tensor, a: Tensor) -> Tensor:
    """(samples, some outputs): with the stored matrix in float64, or by our reference."""
    if PROVIDERS[provider].stores:
        matrix = some(stored_matrix(problem.dim, problem.entries), 0).double()
        return build(delta.double(), a.double()) @ matrix.mT
    with fmkernels.backend("reference"):
        found = PROVIDERS[provider].make(problem.out, problem.into, problem.dim)
        return some(found(delta.double(), a.double()), 1)


def check(problem: Projecting, peer: str, device: Device, ours: str) -> dict[str, Any]:
    """Fail unless ours and the peer's are right, each with its own matrix.

    Returns:
        Nothing to record: all that is asked of a result is in the rounding.
    """
    delta, a = (x[:SAMPLES] for x in problem.inputs(0, device))
    for provider in (ours, peer):
        found = some(problem.step(provider, device=device)()[:SAMPLES], 1)
        error = relative_error(found, expected(problem, provider, delta, a))
        allowed = PROVIDERS[provider].error
        assert error <= allowed, (
            f"{provider} errs by {error:.3g} of its result, expected at most {allowed:.3g}"
        )
    return {}
