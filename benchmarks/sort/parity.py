"""How right a gradient is, and the logarithm of a permutation matrix."""

from __future__ import annotations

import functools

import measure
import torch
from workload import Device, Workload

from fmkernels.testing import assert_parity

YARDSTICKS = {"torchsort": "diffsort"}
"""Who judges our result beside a peer that computes something else."""


@functools.cache
def exact_gradient(workload: Workload, device: Device) -> torch.Tensor:
    return workload.step("reference", torch.float64, device)()


def check(
    workload: Workload, peer: str, device: Device = "cpu", ours: str = "fmkernels"
) -> dict[str, int]:
    """Fail unless our gradient errs at most twice as much as the peer's, both in float32.

    Returns:
        For the results: how many elements of the peer's gradient are not finite, if any are. Such a
        gradient allows nothing; our own reference in float32 then takes its place.
    """
    peer = YARDSTICKS.get(peer, peer)
    theirs = workload.step(peer, device=device)()
    broken = int((~theirs.isfinite()).sum())
    yardstick = workload.step("reference", device=device)() if broken else theirs
    gradient = workload.step(ours, device=device)()
    exact = exact_gradient(workload, device)
    assert_parity(gradient, yardstick, exact, name=f"gradient beside {peer}")
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
