"""Only the time of a right result is reported; and how right it is."""

from __future__ import annotations

from typing import Any

from workload import Device, Workload


def check(
    workload: Workload, peer: str, device: Device = "cpu", ours: str = "fmkernels"
) -> dict[str, Any]:
    """Fail unless our result is right, beside the peer's and beside float64; facts for the results.

    What is right depends on the problem: see ``check`` of the workloads.
    """
    return workload.check(peer, device, ours)
