"""The norms of the rows of W0 + ΔW, without W0 + ΔW.

With ΔW = diag(b) B diag(d) A and everything but d and b frozen,

    ν_i² = ‖W0_i‖² + 2 b_i (C d)_i + b_i² q_i,
    C = B ⊙ (W0 Aᵀ) (n, r),      q_i = ‖(B_i ⊙ d) A‖² = (B_i ⊙ d) A Aᵀ (B_i ⊙ d)ᵀ

C, ‖W0_i‖² and the product A Aᵀ (r, r) are constants. Of the two forms of q the one through the
smaller of r and m is taken.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fmkernels._autocast import product_dtype, without_autocast
from fmkernels.ops.vera_expand import check_vectors
from fmkernels.ops.vera_linear import check_layer


class DvoraNorms:
    """The row norms of a layer's adapted weight, computed again only when something changed.

    A change of the vectors is found by comparing them, so on a GPU the host waits for it; one of
    the matrices by PyTorch's count of changes, which misses those through ``.data``. In code that
    is compiled, and under ``torch.func``, the norms are computed in each call, from the matrices as
    they were at the last call outside of it, or when this object was made.

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
        check_layer("DvoraNorms", weight, weight, A, B)
        self.matrices = (weight, A, B)
        self._constants = constants(*self.matrices)
        self._states = tuple(map(_state, self.matrices))
        self._norms: _Norms | None = None

    def __call__(self, lambda_d: Tensor, lambda_b: Tensor) -> Tensor:
        """(r), (n) -> ν (n), in float32 (float64 for float64), without a gradient."""
        weight, A, _ = self.matrices
        check_vectors("DvoraNorms", lambda_d, lambda_b, A.shape[0], weight.shape[0], weight, None)
        if is_compiling() or torch._C._are_functorch_transforms_active():
            return row_norms(self._constants, lambda_d, lambda_b)  # values cannot be looked at
        states = tuple(map(_state, self.matrices))
        if states != self._states:
            self._constants, self._states = constants(*self.matrices), states
            self._norms = None
        if self._norms is None or not self._norms.are_of(lambda_d, lambda_b):
            self._norms = _Norms(self._constants, lambda_d, lambda_b)
        return self._norms.values


class _Norms:
    """Norms, and copies of the vectors that they were made of: r + n numbers.

    PyTorch's own count of changes misses those of fused optimizers and those through ``.data``.
    """

    def __init__(self, constants: Constants, lambda_d: Tensor, lambda_b: Tensor) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self.vectors = lambda_d.detach().clone(), lambda_b.detach().clone()
            self.values = row_norms(constants, *self.vectors)

    def are_of(self, lambda_d: Tensor, lambda_b: Tensor) -> bool:
        pairs = zip(self.vectors, (lambda_d, lambda_b), strict=True)
        return all(
            a.dtype == b.dtype and a.device == b.device and torch.equal(a, b.detach())
            for a, b in pairs
        )


def _state(tensor: Tensor) -> tuple[int, int]:
    """How often a matrix was changed; and where it lies, as ``tensor.data = …`` changes no more."""
    version = 0 if tensor.is_inference() else tensor._version
    return version, tensor.data_ptr()


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
    with torch.inference_mode(False), torch.no_grad(), without_autocast(weight):
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
