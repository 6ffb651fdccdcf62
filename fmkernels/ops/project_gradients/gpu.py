"""project_gradients on NVIDIA GPUs: in which order the kernels of ``triton.py`` run.

All rows are brought near 1 first. Then, for as many rows as there is room for their parts: the
parts, and what they add to the samples.

**Memory** beside the result: the rows in float32, 4 bytes for each number of δ and a; the parts of
a pass, 64 MiB at most or those of one row; the sums in float64, 8 bytes for each number of the
result. None of it grows with out · in, nor with K · out · in. The host never waits for the device,
so that a call can be captured in a graph.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fmkernels.ops.project_gradients import gpu_launch, philox
from fmkernels.ops.project_gradients.gpu_config import (
    pairs_of_a_pass,
    signs_plan,
    sketch_plan,
)
from fmkernels.ops.project_gradients.gpu_launch import Matrix, Samples


def project_gradients(
    grad_output: Tensor,
    activation: Tensor,
    offsets: Tensor | None,
    rows: int,
    signs: Tensor | None,
    kind: str,
    dim: int,
    bias: bool,
    scale: float,
    seed: int = 0,
    layer: int = 0,
    repeats: int = 1,
    left: int = 0,
) -> Tensor:
    """(P, out), (P, in) -> (B, dim) float32; see ``fmkernels.ops.project_gradients.project``."""
    count = len(grad_output) // rows if offsets is None else len(offsets) - 1
    result = torch.zeros(count, dim, dtype=torch.float32, device=grad_output.device)
    if not len(grad_output):
        return result
    samples = Samples(offsets, rows, count)
    delta, delta_exponent = gpu_launch.prepare(grad_output, samples, bias=False)
    a, a_exponent = gpu_launch.prepare(activation, samples, bias)
    if kind == "count_sketch":
        numbers, project = _sketch(delta, a, bias, dim, seed, layer, repeats)
    elif kind == "rademacher":
        numbers, project = _dense(delta, a, bias, signs, dim, seed, layer)
    else:
        numbers, project = _factored(delta, a, bias, dim, seed, layer, left)
    sums = torch.empty(count, dim, dtype=torch.float64, device=grad_output.device)
    step = pairs_of_a_pass(len(delta), numbers)
    for first in range(0, len(delta), step):
        parts, right = project(slice(first, first + step))
        gpu_launch.finish(
            parts, right, samples, (delta_exponent, a_exponent), sums, result, first, scale
        )
    return result


Pass = Callable[[slice], tuple[Tensor, Tensor | None]]
"""Some rows -> their parts; or their left and their right factors."""


def _sketch(
    delta: Tensor, a: Tensor, bias: bool, dim: int, seed: int, layer: int, repeats: int
) -> tuple[int, Pass]:
    """(P, out + 1), (P, in + 1), as ``prepare`` makes them; so for the others, too."""
    out_features, in_features = delta.shape[1] - 1, a.shape[1] - 1
    plan = sketch_plan(len(delta), out_features, in_features, bias, dim)

    def project(some: slice) -> tuple[Tensor, None]:
        parts = a.new_empty(plan.parts, len(a[some]), dim)
        gpu_launch.sketch(delta[some], a[some], parts, bias, seed, layer, repeats, plan)
        return parts, None

    return plan.parts * dim, project


def _dense(
    delta: Tensor, a: Tensor, bias: bool, packed: Tensor | None, dim: int, seed: int, layer: int
) -> tuple[int, Pass]:
    out_features, in_features = delta.shape[1] - 1, a.shape[1] - 1
    stream = philox.DENSE * philox.LAYERS + layer
    weight_words = out_features * -(-in_features // 32)
    weight = Matrix(seed, stream, 0, packed)
    of_bias = Matrix(seed, stream, out_features, packed, weight_words)
    plan, bias_plan = signs_plan(out_features, in_features), signs_plan(1, out_features)
    count = plan.parts + bias * bias_plan.parts

    def project(some: slice) -> tuple[Tensor, None]:
        coefficients, x, ones = delta[some, :-1], a[some, :-1], a[some, -1:]
        parts = a.new_empty(count, len(x), dim)
        gpu_launch.signs(x, coefficients, out_features, weight, parts, 0, plan)
        if bias:
            gpu_launch.signs(coefficients, ones, 1, of_bias, parts, plan.parts, bias_plan)
        return parts, None

    return count * dim, project


def _factored(
    delta: Tensor, a: Tensor, bias: bool, dim: int, seed: int, layer: int, left: int
) -> tuple[int, Pass]:
    """KhatriRao, or with ``left`` rows Kronecker."""
    left_dim, right_dim = (left, dim // left) if left else (dim, dim)

    def factor(x: Tensor, stream: int, count: int) -> Tensor:
        sums = x.new_empty(1, len(x), count)
        plan = signs_plan(1, x.shape[1], parts=1)
        matrix = Matrix(seed, stream * philox.LAYERS + layer)
        gpu_launch.signs(x, None, 1, matrix, sums, 0, plan)
        return sums

    def project(some: slice) -> tuple[Tensor, Tensor]:
        right = a[some] if bias else a[some, :-1]
        return (
            factor(delta[some, :-1], philox.LEFT, left_dim),
            factor(right, philox.RIGHT, right_dim),
        )

    return left_dim + right_dim, project
