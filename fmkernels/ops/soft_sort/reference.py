"""Relaxed sorting networks in PyTorch: the definition that every kernel is held against.

One comparator on wires (lo, hi) with difference Δ = x_hi − x_lo keeps each value with weight
k = f(s·Δ) and swaps it with weight c = f(−s·Δ) = 1 − k, where s is the steepness:

    x_lo ← k·x_lo + c·x_hi          x_hi ← c·x_lo + k·x_hi

The same k and c mix the columns of X, which starts as the identity and ends as the permutation
matrix P (weight of input i in slot j); so sorted = x @ P, and the rows of X are independent of
each other once the k are known. Both weights are computed from the tail that is small, so no
weight is a difference of larger numbers and every entry of P keeps its relative precision.

Backward, layer by layer from the last, with states before the layer, g the gradient after it,
e = g_lo − g_hi and d = X_lo − X_hi:

    dk = Σ over rows of X of e·d                    (what the permutation's gradient says)
    g  ← the same mix of g                          (a comparator is its own transpose)
    dΔ = dk·(∂k/∂Δ) − e_x·(Δ·∂k/∂Δ)                 (e_x: e of the value chain, whose d is −Δ)
    gx_lo −= dΔ,  gx_hi += dΔ

Δ·∂k/∂Δ is bounded for every distribution and is computed as such: the product of e_x·Δ, which
may overflow, with ∂k/∂Δ, which may be 0, never appears.

Source: Petersen, Borgelt, Kuehne, Deussen, *Monotonic differentiable sorting networks*, ICLR
2022, and the diffsort package; the formulas of the distributions are diffsort's.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fmkernels.ops.soft_sort.kept import kept
from fmkernels.ops.soft_sort.networks import layers

DISTRIBUTIONS = ("logistic", "logistic_phi", "gaussian", "reciprocal", "cauchy", "optimal")

ROW_CHUNK_ELEMENTS = 2**22
"""Rows of X are taken in chunks of about this many saved elements, to bound the memory."""


class Swap(NamedTuple):
    """The weights of one layer's comparators for every row, each of shape (rows, comparators)."""

    lo: Tensor
    hi: Tensor
    keep: Tensor
    swap: Tensor
    slope: Tensor
    """∂keep/∂Δ"""
    elastic: Tensor
    """Δ·∂keep/∂Δ"""


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 in float64; everything narrower in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def soft_swap(
    delta: Tensor, steepness: float, distribution: str, art_lambda: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """keep, swap, ∂keep/∂Δ and Δ·∂keep/∂Δ of a comparator with difference ``delta``.

    ``tail`` below is the smaller of the two weights, ``density`` is f'(v) at v = s·Δ.
    """
    v = steepness * delta
    a = v.abs()
    if distribution == "cauchy":
        tail = torch.atan2(torch.ones_like(a), a) / math.pi
        density = 1 / (math.pi * (1 + a * a))
        v_density = 1 / (math.pi * (a + 1 / a)) * torch.sign(v)
    elif distribution == "reciprocal":
        tail = 1 / (2 + a)
        density = tail * tail
        v_density = v * tail * tail
    elif distribution == "optimal":
        far = a > 0.25
        tail = torch.where(far, 1 / (16 * a), 0.5 - a)
        density = torch.where(far, 1 / (16 * a * a), 1.0)
        v_density = torch.where(far, tail.copysign(v), v)
    elif distribution == "gaussian":
        tail = 0.5 * torch.special.erfc(a / math.sqrt(2))
        density = torch.exp(-0.5 * a * a) / math.sqrt(2 * math.pi)
        v_density = v * density
    elif distribution == "logistic":
        tail = torch.sigmoid(-a)
        density = tail * torch.sigmoid(a)
        v_density = v * density
    elif distribution == "logistic_phi":
        distance = delta.abs() + 1e-10
        sharpness = distance.pow(-art_lambda)  # v is s·Δ·sharpness
        tail = torch.sigmoid(-a * sharpness)
        bend = 1 - art_lambda * (delta.abs() / distance)
        density = tail * torch.sigmoid(a * sharpness) * sharpness * bend
        v_density = v * density
    else:
        raise ValueError(f"unknown distribution {distribution!r}")
    keep = torch.where(v < 0, tail, 1 - tail)
    swap = torch.where(v < 0, 1 - tail, tail)
    return keep, swap, steepness * density, v_density


def mix(state: Tensor, layer: Swap) -> Tensor:
    """One layer applied to ``state`` (rows, …, n): values, rows of X, or a gradient."""
    shape = (len(state), *(1,) * (state.ndim - 2), layer.keep.shape[-1])
    keep, swap = layer.keep.view(shape), layer.swap.view(shape)
    lo, hi = state[..., layer.lo], state[..., layer.hi]
    mixed = state.clone()
    mixed[..., layer.lo] = keep * lo + swap * hi
    mixed[..., layer.hi] = swap * lo + keep * hi
    return mixed


def difference(state: Tensor, layer: Swap) -> Tensor:
    """state_lo − state_hi of every comparator of the layer."""
    return state[..., layer.lo] - state[..., layer.hi]


@kept
def wires_on(network: str, n: int, device: torch.device) -> list[Tensor]:
    """The lo and hi wires of every layer, each (2, comparators)."""
    return [torch.tensor(wires, device=device) for wires in layers(network, n)]


def sort_values(
    scores: Tensor, steepness: float, network: str, distribution: str, art_lambda: float
) -> tuple[Tensor, list[Swap]]:
    """The soft-sorted values (rows, n) and every layer's weights."""
    values, trace = scores, []
    for lo, hi in wires_on(network, scores.shape[-1], scores.device):
        delta = values[:, hi] - values[:, lo]
        layer = Swap(lo, hi, *soft_swap(delta, steepness, distribution, art_lambda))
        trace.append(layer)
        values = mix(values, layer)
    return values, trace


def sort_values_backward(grad_values: Tensor, grad_keep: list[Tensor], trace: list[Swap]) -> Tensor:
    """Gradient of the scores (rows, n), given those of the sorted values and of every ``keep``."""
    grad = grad_values
    for layer, dk in zip(reversed(trace), reversed(grad_keep), strict=True):
        d_delta = dk * layer.slope - difference(grad, layer) * layer.elastic
        grad = mix(grad, layer)
        grad[:, layer.lo] -= d_delta
        grad[:, layer.hi] += d_delta
    return grad


def identity_rows(scores: Tensor, rows: slice) -> Tensor:
    """Rows of the identity, (batch, rows, n): the state in which X starts."""
    batch, n = scores.shape
    return torch.eye(n, dtype=scores.dtype, device=scores.device)[rows].repeat(batch, 1, 1)


def sort_rows(state: Tensor, trace: list[Swap]) -> tuple[Tensor, list[Tensor]]:
    """Rows of X through the network; also each layer's differences d, for the backward pass."""
    differences = []
    for layer in trace:
        differences.append(difference(state, layer))
        state = mix(state, layer)
    return state, differences


def add_keep_gradient(
    grad_keep: list[Tensor], grad: Tensor, differences: list[Tensor], trace: list[Swap]
) -> None:
    """Add Σ e·d of these rows of X to every layer's gradient of ``keep``, last layer first."""
    for index in reversed(range(len(trace))):
        layer = trace[index]
        grad_keep[index] += (difference(grad, layer) * differences[index]).sum(dim=1)
        grad = mix(grad, layer)


def row_chunks(scores: Tensor, trace: list[Swap]) -> list[slice]:
    """Slices of the n rows of X that keep the saved differences within bounds."""
    batch, n = scores.shape
    comparators = sum(len(layer.lo) for layer in trace)
    rows = max(1, ROW_CHUNK_ELEMENTS // max(1, batch * (comparators + n)))
    return [slice(first, min(first + rows, n)) for first in range(0, n, rows)]


def soft_sort(
    scores: Tensor,
    steepness: float = 100.0,
    network: str = "bitonic",
    distribution: str = "cauchy",
    art_lambda: float = 0.25,
) -> tuple[Tensor, Tensor]:
    """(…, n) -> sorted values (…, n) and permutation (…, n, n)."""
    n = scores.shape[-1]
    x = scores.reshape(-1, n).to(compute_dtype(scores.dtype), copy=True)
    values, trace = sort_values(x, steepness, network, distribution, art_lambda)
    permutation, _ = sort_rows(identity_rows(x, slice(0, n)), trace)
    return (
        values.to(scores.dtype).reshape(scores.shape),
        permutation.to(scores.dtype).reshape(*scores.shape, n),
    )


def soft_sort_backward(
    grad_values: Tensor | None,
    grad_permutation: Tensor | None,
    scores: Tensor,
    steepness: float = 100.0,
    network: str = "bitonic",
    distribution: str = "cauchy",
    art_lambda: float = 0.25,
) -> Tensor:
    """Gradient of the scores; the network is run again rather than kept."""
    n = scores.shape[-1]
    x = scores.reshape(-1, n).to(compute_dtype(scores.dtype))
    _, trace = sort_values(x, steepness, network, distribution, art_lambda)
    grad_keep = [torch.zeros_like(layer.keep) for layer in trace]
    if grad_permutation is not None:
        grad = grad_permutation.reshape(-1, n, n).to(x.dtype)
        for rows in row_chunks(x, trace):
            _, differences = sort_rows(identity_rows(x, rows), trace)
            add_keep_gradient(grad_keep, grad[:, rows], differences, trace)
    grad_sorted = (
        torch.zeros_like(x) if grad_values is None else grad_values.reshape(-1, n).to(x.dtype)
    )
    grad_scores = sort_values_backward(grad_sorted.clone(), grad_keep, trace)
    return grad_scores.to(scores.dtype).reshape(scores.shape)
