"""Per-sample gradients that are built, and matrices that are: what the projections are held against."""

from __future__ import annotations

import torch

import fmkernels


def projections(out, into, dim, bias=True, **settings):
    """Every kind of projection for one layer."""
    entries = out * (into + bias)
    generator = torch.Generator().manual_seed(7)
    matrix = torch.randint(0, 2, (dim, entries), generator=generator) * 2 - 1
    layer = (out, into, dim)
    return {
        "count_sketch": fmkernels.CountSketch(*layer, bias=bias, **settings),
        "count_sketch-repeats": fmkernels.CountSketch(*layer, bias=bias, repeats=3, **settings),
        "rademacher": fmkernels.Rademacher(*layer, bias=bias, **settings),
        "from_matrix": fmkernels.Rademacher.from_matrix(matrix, out, into, bias=bias),
        "khatri_rao": fmkernels.KhatriRao(*layer, bias=bias, **settings),
        "kronecker": fmkernels.Kronecker(*layer, bias=bias, **settings),
    }


KINDS = tuple(projections(1, 1, 1))


def gradients(grad_output, activation, bias=True):
    """(B, S, out), (B, S, in) -> (B, out · (in + bias)), in the dtype of the inputs."""
    if grad_output.ndim == 2:
        grad_output, activation = grad_output.unsqueeze(1), activation.unsqueeze(1)
    built = torch.einsum("bsi,bsj->bij", grad_output, activation)
    if bias:
        built = torch.cat([built, grad_output.sum(dim=1).unsqueeze(2)], dim=2)
    return built.flatten(1)


def materialized(grad_output, activation, projection, dtype):
    """The same as fmkernels.project_gradients, by a product with the whole matrix."""
    bias = projection.columns > projection.in_features
    built = gradients(grad_output.to(dtype), activation.to(dtype), bias)
    return built @ matrix(projection).to(dtype).mT


def matrix(projection):
    """The materialised matrix in float64: integers times the scale, which float32 rounds."""
    scale = projection.settings().scale
    return (projection.materialize().double() / scale).round() * scale


def pair(samples, rows, out, into, dtype=torch.float32, size=1.0):
    """Random δ of a size, and a, of float64's numbers rounded to a dtype."""
    shape = (samples,) if rows is None else (samples, rows)
    delta = size * torch.randn(*shape, out, dtype=torch.float64)
    return delta.to(dtype), torch.randn(*shape, into, dtype=torch.float64).to(dtype)
