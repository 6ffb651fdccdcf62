"""Who computes DVoRA's norms: ours from what is kept, and the ways that build the update."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import fmkernels

Make = Callable[[Tensor, Tensor, Tensor], Callable[[Tensor, Tensor], Tensor]]
"""W0, A and B -> a function of d and b."""


def materialized(weight: Tensor, A: Tensor, B: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The update is built, added, and its rows measured."""
    return lambda d, b: (weight + (b.unsqueeze(1) * B) @ (d.unsqueeze(1) * A)).norm(dim=1)


def peft_dora(weight: Tensor, A: Tensor, B: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """As PEFT's DoRA does it, with its own code: an identity matrix goes through the adapter."""
    from peft.tuners.lora.dora import DoraLinearLayer

    dora = DoraLinearLayer(fan_in_fan_out=False)

    @torch.no_grad()
    def run(d: Tensor, b: Tensor) -> Tensor:
        identity = torch.eye(A.shape[1])
        inner = nn.functional.linear(identity, d.unsqueeze(1) * A)
        update = nn.functional.linear(inner, b.unsqueeze(1) * B).T
        norms: Tensor = dora.get_weight_norm(weight, update.detach(), 1.0)
        return norms

    return run


NORMS: dict[str, Make] = {
    "fmkernels": fmkernels.DvoraNorms,
    "materialized": materialized,
    "peft-dora": peft_dora,
}
