"""Only the time of a right result is reported; and how right it is."""

from __future__ import annotations

import functools

import measure
import torch
from workloads import Workload

from fmkernels.testing import assert_parity


@functools.cache
def exact_gradient(workload: Workload, device: torch.device | str) -> torch.Tensor:
    return workload.step("reference", torch.float64, device)()


def check(workload: Workload, peer: str, device: torch.device | str = "cpu") -> dict[str, int]:
    """Fail unless our gradient errs at most twice as much as the peer's, both in float32.

    Returns:
        For the results: how many elements of the peer's gradient are not finite, if any are. Such a
        gradient allows nothing; our own reference in float32 then takes its place.
    """
    theirs = workload.step(peer, device=device)()
    broken = int((~theirs.isfinite()).sum())
    yardstick = workload.step("reference", device=device)() if broken else theirs
    ours = workload.step("fmkernels", device=device)()
    exact = exact_gradient(workload, device)
    assert_parity(ours, yardstick, exact, name=f"gradient beside {peer}")
    return {"peer_not_finite": broken} if broken else {}


def log_errors(permutation: torch.Tensor, exact: torch.Tensor) -> dict[str, float]:
    """Of log P, in nats, where P > 2⁻¹⁰⁰ in float64, which is also the least P of the loss."""
    floor = 2.0**-100
    counted = exact > floor
    errors = permutation[counted].double().clamp_min(floor).log() - exact[counted].log()
    return {
        "mean": measure.digits(errors.abs().mean().item()),
        "largest": measure.digits(errors.abs().max().item()),
    }
