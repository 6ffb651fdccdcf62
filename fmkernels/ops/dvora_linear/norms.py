"""The norms of the rows of W0 + ΔW, without W0 + ΔW.

With ΔW = diag(b) B diag(d) A, everything but d and b frozen, and A = L Q, the rows of Q (k, m)
orthonormal, L (r, k) lower trapezoidal, k = min(r, m),

    ν_i² = ρ_i² + ‖P_i + b_i (B_i ⊙ d) L‖²,     P = W0 Qᵀ (n, k),     ρ_i = ‖W0_i − P_i Q‖

because Q keeps lengths, and what it does not reach of W0 is not adapted (nothing, from r = m on).
L, P and ρ are constants. Of the 2 n m r + m r multiplications by which a product with an identity
matrix, as in PEFT's DoRA, builds ΔW, about n k (r − k/2) are left: L is zero above its diagonal.
This is a sum of squares, and loses no more digits than W0 + ΔW does.
"""

from __future__ import annotations

from collections.abc import Iterator
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
        # once read: another thread may put norms of other vectors there
        norms = self._norms
        if norms is None or not norms.are_of(lambda_d, lambda_b):
            norms = self._norms = _Norms(self._constants, lambda_d, lambda_b)
        return norms.values


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
    """How often a matrix was changed; and in which storage it lies, as ``tensor.data = …`` changes
    no more. That of FSDP is freed and filled again with the same, elsewhere, in each step.
    """
    version = 0 if tensor.is_inference() else tensor._version
    return version, tensor.untyped_storage()._cdata


class Constants(NamedTuple):
    """What does not depend on the vectors."""

    B: Tensor
    """(n, r)"""
    L: tuple[Tensor, ...]
    """(r, k), in blocks of columns, each from its first row that is not zero on"""
    P: Tensor
    """(n, k)"""
    rho: Tensor
    """(n)"""


BLOCKS, LEAST_WIDTH, MULTIPLE = 4, 64, 16
"""So many blocks, of a multiple of so many columns, and no narrower than that.

What is multiplied although it is zero falls with their number; what each call costs, and B that is
read again, rises. Products alone, n = 1,024, r = 256, in ms on two threads: one block 0.66, two
0.54, three 0.51, four 0.50, eight 0.55; of 43 columns, which is no multiple, 1.4 × as long.
"""


def constants(weight: Tensor, A: Tensor, B: Tensor) -> Constants:
    """(n, m), (r, ≥ m), (≥ n, r)."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    with torch.inference_mode(False), torch.no_grad(), without_autocast(weight):
        # In float64: 29 ms for (256, 4096), where the two products with W0 take 130.
        Qt, R = torch.linalg.qr(A[:, : weight.shape[1]].mT.double())
        weight, B, Qt, L = (x.to(dtype) for x in (weight, B[: len(weight)], Qt, R.mT))
        P = _product(weight, Qt)
        rho = torch.linalg.vector_norm(weight - _product(P, Qt.mT), dim=1)
        return Constants(B, tuple(_triangle(L)), P, rho)


def _triangle(L: Tensor) -> Iterator[Tensor]:
    """Its blocks."""
    quarter = -(-L.shape[1] // (BLOCKS * MULTIPLE)) * MULTIPLE
    start = 0
    for block in L.split(max(quarter, LEAST_WIDTH), dim=1):
        yield block[start:].contiguous()
        start += block.shape[1]


def row_norms(constants: Constants, lambda_d: Tensor, lambda_b: Tensor) -> Tensor:
    """ν (n)."""
    B, L, P, rho = constants
    with torch.no_grad(), without_autocast(B):
        d, b = lambda_d.to(B.dtype).flatten(), lambda_b.to(B.dtype).reshape(-1, 1)
        scaled = (d * b).mul_(B).to(product_dtype(B))
        # Under vmap this is batched as the vectors are; a clone of P would not be.
        rows = torch.empty_like(scaled[:, : P.shape[1]]).copy_(P)
        start = 0
        for block in L:
            into = rows[:, start : start + block.shape[1]]
            into.addmm_(scaled[:, start:], block.to(scaled.dtype))
            start += block.shape[1]
        return torch.hypot(rho, torch.linalg.vector_norm(rows, dim=1).to(rho.dtype))


def built_norms(weight: Tensor, A: Tensor, B: Tensor, lambda_d: Tensor, lambda_b: Tensor) -> Tensor:
    """ν (n) of W0 + ΔW itself, for once: the constants alone would take longer."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    with torch.no_grad(), without_autocast(weight):
        d, b = lambda_d.to(dtype).flatten(), lambda_b.to(dtype).reshape(-1, 1)
        scaled, A = d * b * B[: len(weight)].to(dtype), A[:, : weight.shape[1]].to(dtype)
        exact = product_dtype(scaled)
        adapted = torch.addmm(weight.to(exact), scaled.to(exact), A.to(exact))
        norms: Tensor = torch.linalg.vector_norm(adapted, dim=1).to(dtype)
        return norms


def _product(a: Tensor, b: Tensor) -> Tensor:
    """In the full precision of its dtype."""
    dtype = product_dtype(a)
    return (a.to(dtype) @ b.to(dtype)).to(a.dtype)
