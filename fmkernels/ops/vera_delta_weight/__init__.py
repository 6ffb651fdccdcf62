"""The update of a weight that a VeRA adapter is, as a matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from fmkernels import _checks
from fmkernels._autocast import without_autocast
from fmkernels.ops.vera_expand import check_vectors
from fmkernels.ops.vera_shrink import check_shared

NAME = "vera_delta_weight"


def vera_delta_weight(A: Tensor, B: Tensor, lambda_d: Tensor, lambda_b: Tensor) -> Tensor:
    """The update of a layer's weight: ΔW = diag(b) B diag(d) A.

    Args:
        A: (r, m): of a shared matrix the layer's own columns, ``A[:, :in_features]``.
        B: (≥ n, r); the first n rows count.
        lambda_d: d, (r), of any floating dtype.
        lambda_b: b, (n).

    Returns:
        ΔW, (n, m), in A's dtype; differentiable in all arguments.

    Raises:
        TypeError: an argument is not floating-point.
        ValueError: an argument does not fit; the message names it.

    Numerics:
        Computed in float32 (float64 for float64), untouched by autocast, and rounded once.

    Source:
        Kopiczko, Blankevoort, Asano, *VeRA: Vector-based Random Matrix Adaptation*, ICLR 2024.

    Example:
        >>> import torch, fmkernels
        >>> A, B, d, b = torch.randn(4, 12), torch.randn(8, 4), torch.randn(4), torch.randn(8)
        >>> update = fmkernels.vera_delta_weight(A, B, d, b)
        >>> torch.allclose(update, b.diag() @ B @ d.diag() @ A, atol=1e-5)
        True
    """
    _checks.floating_tensor(NAME, "A", A)
    _checks.floating_tensor(NAME, "lambda_b", lambda_b)
    check_shared(NAME, "A", A, A, A.shape[-1], dim=1)
    check_shared(NAME, "B", B, A, lambda_b.shape[-1], dim=0)
    if B.shape[1] != A.shape[0]:
        raise ValueError(
            f"{NAME}: B: expected {A.shape[0]} columns, the rank of A, got {B.shape[1]}"
        )
    check_vectors(NAME, lambda_d, lambda_b, A.shape[0], lambda_b.shape[-1], A, None)
    wide = torch.promote_types(A.dtype, torch.float32)
    with without_autocast(A):
        left = lambda_b.to(wide).unsqueeze(1) * B[: len(lambda_b)].to(wide) * lambda_d.to(wide)
        return (left @ A.to(wide)).to(A.dtype)
