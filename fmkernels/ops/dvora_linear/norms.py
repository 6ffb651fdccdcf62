"""The norms of the rows of W0 + ΔW, without W0 + ΔW.

With ΔW = diag(b) B diag(d) A and everything but d and b frozen,

    ν_i² = ‖W0_i‖² + 2 b_i (C d)_i + b_i² q_i,
    C = B ⊙ (W0 Aᵀ) (n, r),      q_i = (B_i ⊙ d) A Aᵀ (B_i ⊙ d)ᵀ

C, ‖W0_i‖² and A Aᵀ (r, r) are constants: n r² multiplications are left, of the 2 n m r + m r that a
product with an identity matrix, as in PEFT's DoRA, takes to build ΔW. From r = m on, B ⊙ d times A
is the smaller product, and W0 + ΔW is built of it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fmkernels import _checks
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
        _checks.floating_tensor("DvoraNorms", "weight", weight)
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


class Factored(NamedTuple):
    """What does not depend on the vectors, where r < m."""

    B: Tensor
    """(n, r)"""
    C: Tensor
    """B ⊙ (W0 Aᵀ), (n, r)"""
    squares: Tensor
    """‖W0_i‖², (n)"""
    inner: Tensor
    """A Aᵀ, (r, r)"""


class Whole(NamedTuple):
    """The matrices themselves, where they are no larger than what could be made of them."""

    B: Tensor
    """(n, r)"""
    weight: Tensor
    """(n, m)"""
    A: Tensor
    """(r, m)"""


Constants = Factored | Whole


def constants(weight: Tensor, A: Tensor, B: Tensor) -> Constants:
    """(n, m), (r, ≥ m), (≥ n, r)."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    with torch.inference_mode(False), torch.no_grad(), without_autocast(weight):
        weight, B = weight.to(dtype), B[: len(weight)].to(dtype)
        A = A[:, : weight.shape[1]].to(dtype)
        if A.shape[0] >= A.shape[1]:
            return Whole(B, weight, A)
        squares = weight.square().sum(dim=1)
        return Factored(B, B * _product(weight, A.mT), squares, _product(A, A.mT))


def row_norms(constants: Constants, lambda_d: Tensor, lambda_b: Tensor) -> Tensor:
    """ν (n)."""
    B = constants.B
    with torch.no_grad(), without_autocast(B):
        d, b = lambda_d.to(B.dtype).flatten(), lambda_b.to(B.dtype).flatten()
        scaled = B * d
        if isinstance(constants, Whole):
            adapted = _product(scaled, constants.A).mul_(b.unsqueeze(1)).add_(constants.weight)
            built: Tensor = torch.linalg.vector_norm(adapted, dim=1)
            return built
        q = (_product(scaled, constants.inner) * scaled).sum(dim=1)
        squares = constants.squares + 2 * b * (constants.C @ d) + b.square() * q
        return squares.clamp(min=0).sqrt()


def _product(a: Tensor, b: Tensor) -> Tensor:
    """In the full precision of its dtype."""
    dtype = product_dtype(a)
    return (a.to(dtype) @ b.to(dtype)).to(a.dtype)
