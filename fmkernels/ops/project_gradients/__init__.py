"""Projection of per-sample gradients of a linear layer, which are never built."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from fmkernels import _checks
from fmkernels._library import GpuKernel, Op
from fmkernels.ops.project_gradients import reference
from fmkernels.ops.project_gradients.count_sketch import CountSketch
from fmkernels.ops.project_gradients.gpu_config import limits
from fmkernels.ops.project_gradients.khatri_rao import KhatriRao
from fmkernels.ops.project_gradients.kronecker import Kronecker
from fmkernels.ops.project_gradients.projection import Projection
from fmkernels.ops.project_gradients.rademacher import Rademacher

__all__ = [
    "CountSketch",
    "KhatriRao",
    "Kronecker",
    "Projection",
    "Rademacher",
    "project",
    "project_gradients",
]

OP = "project_gradients"


@overload
def project_gradients(
    grad_output: Tensor, activation: Tensor, projection: Projection
) -> Tensor: ...
@overload
def project_gradients(
    grad_output: Sequence[Tensor], activation: Sequence[Tensor], projection: Projection
) -> list[Tensor]: ...


def project_gradients(
    grad_output: Tensor | Sequence[Tensor],
    activation: Tensor | Sequence[Tensor],
    projection: Projection,
) -> Tensor | list[Tensor]:
    """Project each sample's gradient of a linear layer to K numbers, without building it.

    With δ the gradient of a loss at the layer's output and a the layer's input, the gradient of
    sample b is a sum over its rows (views, tokens), and its projection is

        p_b = P vec(Σ_s δ_bs [a_bs; 1]ᵀ)

    where the last column, the gradient of the bias, is there if the projection has ``bias=True``.
    Neither the gradient (out × in) nor the matrix P (K, out · in) is ever in memory.

    Args:
        grad_output: δ: (B, S, out), or (B, out) for one row per sample; of any floating dtype and
            strides. For several losses at once a list of such tensors, whose B and S may differ.
        activation: a: (B, S, in) or (B, in), on the same device; or as long a list.
        projection: a :class:`~fmkernels.CountSketch`, :class:`~fmkernels.Rademacher`,
            :class:`~fmkernels.KhatriRao` or :class:`~fmkernels.Kronecker` for this layer.

    Returns:
        (B, K), float32; for lists a list of those, one for each pair, made in one pass over the
        random matrix. It is not differentiable. Samples without rows (S = 0) give zeros.

    Raises:
        TypeError: a tensor has the wrong dtype, or the projection is none.
        ValueError: an argument does not fit; the message names it.

    Numerics:
        Computed in float32; on a GPU products with signs take each entry as two numbers of
        float16, about one more rounding. Each sample's δ and a are first brought near 1 by powers
        of two, which are undone at the end, so that gradients of 1e-8 in float16 lose nothing and
        those of float64 may be of any size. A sample with a number that is not finite gives NaN,
        the others are not touched. Bitwise the same for any number of threads and any split of the
        batch.

    Source:
        Simoncini, Gidaris, Bursuc, Asano, *No Train, all Gain: Self-Supervised Gradients Improve
        Deep Frozen Representations*, NeurIPS 2024.

    Example:
        >>> import torch, fmkernels
        >>> grad_output, activation = torch.randn(5, 12), torch.randn(5, 8)
        >>> sketch = fmkernels.CountSketch(12, 8, dim=16)
        >>> features = fmkernels.project_gradients(grad_output, activation, sketch)
        >>> gradients = torch.einsum("bi,bj->bij", grad_output, activation)
        >>> gradients = torch.cat([gradients, grad_output.unsqueeze(2)], dim=2)
        >>> expected = gradients.flatten(1) @ sketch.materialize().mT
        >>> torch.allclose(features, expected, atol=1e-5)
        True
    """
    if not isinstance(projection, Projection):
        hint = "; of a matrix of ±1 make one with Rademacher.from_matrix"
        raise TypeError(
            f"{OP}: projection: expected a CountSketch, Rademacher, KhatriRao or Kronecker, "
            f"got {type(projection).__name__}{hint if isinstance(projection, Tensor) else ''}"
        )
    if isinstance(grad_output, Tensor) and isinstance(activation, Tensor):
        samples, rows = check_pair(OP, grad_output, activation, projection)
        if not rows:
            shape = (samples, projection.settings().dim)
            return grad_output.new_zeros(shape, dtype=torch.float32)
        projected: Tensor = project(
            grad_output.detach().reshape(-1, projection.out_features),
            activation.detach().reshape(-1, projection.in_features),
            None,
            rows,
            *projection.settings(),
        )
        return projected
    return _project_lists(grad_output, activation, projection)


def _project_lists(grad_outputs: Any, activations: Any, projection: Projection) -> list[Tensor]:
    """Several pairs as one: their rows behind one another, and where each sample's begin."""
    named = {"grad_output": grad_outputs, "activation": activations}
    for name, value in named.items():
        if isinstance(value, (list, tuple)):
            continue
        if not any(isinstance(other, (list, tuple)) for other in named.values()):
            _checks.floating_tensor(OP, name, value)  # which says how an array becomes one
            continue
        (other,) = named.keys() - {name}
        raise TypeError(
            f"{OP}: {name}: expected a list of tensors, as {other} is, got "
            f"{type(value).__name__}; for one pair pass two tensors"
        )
    if len(grad_outputs) != len(activations):
        raise ValueError(
            f"{OP}: activation: expected as many tensors as grad_output has, {len(grad_outputs)}, "
            f"got {len(activations)}"
        )
    if not grad_outputs:
        return []
    sizes = []
    for number, (delta, a) in enumerate(zip(grad_outputs, activations, strict=True)):
        sizes.append(check_pair(OP, delta, a, projection, f"[{number}]"))
        _checks.same_device(OP, f"grad_output[{number}]", delta, "grad_output[0]", grad_outputs[0])
    counts = [
        torch.full((samples,), rows, device=grad_outputs[0].device) for samples, rows in sizes
    ]
    offsets = torch.nn.functional.pad(torch.cat(counts).cumsum(0), (1, 0))
    projected = project(
        _joined(grad_outputs, projection.out_features),
        _joined(activations, projection.in_features),
        offsets,
        1,
        *projection.settings(),
    )
    return list(projected.split([samples for samples, _ in sizes]))


def _joined(tensors: Sequence[Tensor], features: int) -> Tensor:
    dtypes = {tensor.dtype for tensor in tensors}
    wide = torch.float64 if torch.float64 in dtypes else torch.float32
    dtype = dtypes.pop() if len(dtypes) == 1 else wide  # two half types have no common one
    return torch.cat([x.detach().to(dtype).reshape(-1, features) for x in tensors])


def check_pair(
    op: str, grad_output: Any, activation: Any, projection: Projection, which: str = ""
) -> tuple[int, int]:
    """Refuse in words what does not fit; the samples and the rows of each."""
    names = f"grad_output{which}", f"activation{which}"
    samples, rows = check_shapes(op, names, grad_output, activation)
    layer = (grad_output.shape[-1], activation.shape[-1])
    if layer != (projection.out_features, projection.in_features):
        made = f"{projection.out_features} outputs and {projection.in_features} inputs"
        raise ValueError(
            f"{op}: projection: expected one for a layer of {layer[0]} outputs and {layer[1]} "
            f"inputs, as {names[0]} and {names[1]} have, got one for {made}"
        )
    device = projection.device
    if device is not None and device != grad_output.device:
        raise ValueError(
            f"{op}: projection: expected its bits on the device of {names[0]}, "
            f"{grad_output.device}, got {device}; use projection.to({str(grad_output.device)!r})"
        )
    return samples, rows


def check_shapes(
    op: str, names: tuple[str, str], grad_output: Any, activation: Any
) -> tuple[int, int]:
    """A gradient and an activation of the same samples and rows: how many of each."""
    for name, value in zip(names, (grad_output, activation), strict=True):
        _checks.floating_tensor(op, name, value)
        if value.ndim not in (2, 3):
            raise ValueError(
                f"{op}: {name}: expected shape (B, S, features), or (B, features) for one row per "
                f"sample, got {_checks.shape(value)}"
            )
    _checks.same_device(op, names[1], activation, names[0], grad_output)
    if activation.shape[:-1] != grad_output.shape[:-1]:
        leading = ", ".join(map(str, grad_output.shape[:-1]))
        raise ValueError(
            f"{op}: {names[1]}: expected shape ({leading}, features), the rows of {names[0]}, "
            f"got {_checks.shape(activation)}"
        )
    return grad_output.shape[0], grad_output.shape[1] if grad_output.ndim == 3 else 1


def _fake(
    grad_output: Tensor,
    activation: Tensor,
    offsets: Tensor | None,
    rows: int,
    signs: Tensor | None,
    kind: str,
    dim: int,
    *_: Any,
) -> Tensor:
    samples = grad_output.shape[0] // rows if offsets is None else offsets.shape[0] - 1
    return grad_output.new_empty((samples, dim), dtype=torch.float32)


project = Op(
    OP,
    "(Tensor grad_output, Tensor activation, Tensor? offsets, SymInt rows, Tensor? signs,"
    " str kind, int dim, bool bias, float scale, int seed=0, int layer=0, int repeats=1,"
    " int left=0) -> Tensor",
    reference=reference.project_gradients,
    fake=_fake,
    gpu=(GpuKernel("triton", "fmkernels.ops.project_gradients.gpu", limits),),
)
"""(P, out), (P, in) -> (B, dim), float32: P rows, of which sample b has ``rows``, or those from
``offsets[b]`` to ``offsets[b + 1]``, int64 on the same device; then :class:`Settings`.
"""
