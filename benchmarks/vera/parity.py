"""Whether a layer with an adapter is right: y and all gradients, beside float64's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vera.providers import PROVIDERS, Layer, stepping

if TYPE_CHECKING:
    from vera.workloads import Adapted

RESULTS = ("y", "the gradient of x", "that of lambda_d", "that of lambda_b")
ERRORS = {torch.float32: 2.0**-17, torch.bfloat16: 2.0**-5}
"""That results may have, relative to their size: a few roundings of every factor."""


def exact(problem: Adapted, ids: bool) -> list[Tensor]:
    """By the formula in float64."""
    layer = Layer(problem)
    x, grad = problem.inputs(0)
    wide = [t.detach().double() for t in (layer.weight, layer.bias, layer.A, layer.B)]
    vectors = (layer.many_d, layer.many_b) if ids else (layer.lambda_d, layer.lambda_b)
    d, b = (v.detach().double().requires_grad_() for v in vectors)

    def forward(x: Tensor) -> Tensor:
        rows = layer.ids if ids else slice(None)
        of_rows = (d[rows], b[rows]) if ids else (d, b)
        base = torch.nn.functional.linear(x, wide[0], wide[1])
        return base + of_rows[1] * ((x @ wide[2].mT * of_rows[0]) @ wide[3].mT)

    return stepping(forward, d, b)(x.detach().double().requires_grad_(), grad.double())


def check(problem: Adapted, peer: str, ours: str) -> dict[str, Any]:
    """Fail unless ours is right, and the peer too.

    Returns:
        Bytes that ours and the peer keep for backward.
    """
    kept = {}
    for who in (ours, peer):
        layer = Layer(problem)
        run, pair = PROVIDERS[who](layer), problem.inputs(0)
        found = run(*pair)
        if who not in ("base", "lora"):  # other functions
            expected = exact(problem, ids=who in ("fmkernels-mixed", "looped"))
            for name, a, right in zip(RESULTS, found, expected, strict=True):
                error = ((a.double() - right).norm() / right.norm()).item()
                allowed = ERRORS[problem.dtype if a.dtype == problem.dtype else torch.bfloat16]
                allowed = allowed if who != "fmkernels-merged" else 4 * allowed
                assert error <= allowed, f"{who}: {name} errs by {error:.3g} of its size"
        kept[who] = bytes_kept(layer, lambda run=run, pair=pair: run(*pair), pair[0])
    return {"kept_bytes": kept}


def bytes_kept(layer: Layer, step: Any, x: Tensor) -> int:
    """What autograd keeps during a step, but for x, the layer's own matrices and the vectors.

    A dense form keeps x, which whoever made it may not have kept: it counts there.
    """
    known = {
        t.untyped_storage().data_ptr()
        for t in (
            layer.weight, layer.bias, layer.A, layer.B, layer.lambda_d, layer.lambda_b,
            layer.many_d, layer.many_b, layer.ids, layer.peft.vera_A["default"],
            layer.peft.vera_B["default"],
        )
    }  # fmt: skip
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(kept.values())
