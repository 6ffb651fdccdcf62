"""The norms of the rows of W0 + ΔW, without W0 + ΔW.

With ΔW = diag(b) B diag(d) A and everything but d and b frozen,

    ν_i² = ‖W0_i‖² + 2 b_i (C d)_i + b_i² q_i,
    C = B ⊙ (W0 Aᵀ) (n, r),      q_i = ‖(B_i ⊙ d) A‖² = (B_i ⊙ d) A Aᵀ (B_i ⊙ d)ᵀ

C, ‖W0_i‖² and the product A Aᵀ (r, r) are constants. Of the two forms of q the one through the
smaller of r and m is taken.
"""

from __future__ import annotations

from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fmkernels._autocast import product_dtype, without_autocast

T = TypeVar("T")


class DvoraNorms:
    """The row norms of a layer's adapted weight, computed again only when something changed.

    In compiled code they are computed in each call, and the matrices count as constants.

    Args:
        weight: W0, (n, m).
        A: (r, ≥ m).
        B: (≥ n, r).

    Example:
        >>> import torch, fmkernels
        >>> weight, A, B = torch.randn(8, 12), torch.randn(4, 12), torch.randn(8, 4)
        >>> d, b = torch.randn(4), torch.randn(8)
        >>> adapted = weight + fmkernels.vera_delta_weight(A, B, d, b)
        >>> torch.allclose(fmkernels.DvoraNorms(weight, A, B)(d, b), adapted.norm(dim=1), atol=1e-4)
        True
    """

    def __init__(self, weight: Tensor, A: Tensor, B: Tensor) -> None:
        self.matrices = (weight, A, B)
        self._constants = _Made(constants(*self.matrices), *self.matrices)
        self._norms: _Made[Tensor] | None = None

    def __call__(self, lambda_d: Tensor, lambda_b: Tensor) -> Tensor:
        """(r), (n) -> ν (n), in float32 (float64 for float64), without a gradient."""
        if is_compiling():  # whether something changed cannot be traced
            return row_norms(self._constants.value, lambda_d, lambda_b)
        if self._constants.is_stale(*self.matrices):
            self._constants = _Made(constants(*self.matrices), *self.matrices)
            self._norms = None
        if self._norms is None or self._norms.is_stale(lambda_d, lambda_b):
            found = row_norms(self._constants.value, lambda_d, lambda_b)
            self._norms = _Made(found, lambda_d, lambda_b)
        return self._norms.value


class _Made(Generic[T]):
    """A value, and the tensors that it was made of; they live as long: none takes their place."""

    def __init__(self, value: T, *tensors: Tensor) -> None:
        self.value, self.tensors = value, tensors
        self.states = tuple(map(_state, tensors))

    def is_stale(self, *tensors: Tensor) -> bool:
        same = all(a is b for a, b in zip(tensors, self.tensors, strict=True))
        return not same or tuple(map(_state, tensors)) != self.states


def _state(tensor: Tensor) -> tuple[int, int]:
    """How often it was changed; and where it lies, for ``tensor.data = …`` changes no more."""
    return tensor._version, tensor.data_ptr()


class Constants(NamedTuple):
    """What does not depend on the vectors."""

    B: Tensor
    """(n, r)"""
    C: Tensor
    """(n, r)"""
    squares: Tensor
    """‖W0_i‖², (n)"""
    inner: Tensor
    """A Aᵀ (r, r), or A (r, m)."""
    by_inner_products: bool
    """Whether it is the former."""


def constants(weight: Tensor, A: Tensor, B: Tensor) -> Constants:
    """(n, m), (r, ≥ m), (≥ n, r)."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    with torch.no_grad(), without_autocast(weight):
        weight, B = weight.to(dtype), B[: len(weight)].to(dtype)
        A = A[:, : weight.shape[1]].to(dtype)
        narrow = A.shape[0] < A.shape[1]
        inner = _product(A, A.mT) if narrow else A
        return Constants(B, B * _product(weight, A.mT), weight.square().sum(dim=1), inner, narrow)


def row_norms(constants: Constants, lambda_d: Tensor, lambda_b: Tensor) -> Tensor:
    """ν (n)."""
    B, C, squares, inner, by_inner_products = constants
    with torch.no_grad(), without_autocast(B):
        d, b = lambda_d.to(B.dtype).flatten(), lambda_b.to(B.dtype).flatten()
        scaled = B * d
        product = _product(scaled, inner)
        q = (product * (scaled if by_inner_products else product)).sum(dim=1)
        return (squares + 2 * b * (C @ d) + b.square() * q).clamp(min=0).sqrt()


def _product(a: Tensor, b: Tensor) -> Tensor:
    """In the full precision of its dtype."""
    dtype = product_dtype(a)
    return (a.to(dtype) @ b.to(dtype)).to(a.dtype)
