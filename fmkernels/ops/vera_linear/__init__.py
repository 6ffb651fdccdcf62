"""A linear layer with a VeRA adapter, by whichever form is the cheapest at its sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import functional as F

from fmkernels import _checks
from fmkernels._autocast import lower_precision
from fmkernels.ops.vera_dropout import vera_dropout
from fmkernels.ops.vera_expand import check_ids, check_vectors, vera_expand
from fmkernels.ops.vera_expand.config import by_matrix
from fmkernels.ops.vera_linear.dense import VERA_DENSE
from fmkernels.ops.vera_linear.formulation import DENSE, Formulation, formulation
from fmkernels.ops.vera_linear.products import VERA_EXPANDED, VERA_PRODUCTS
from fmkernels.ops.vera_shrink import check_frozen, check_shared, vera_shrink

NAME = "vera_linear"

EXACT = (torch.float32, torch.float64)
"""In which W0 + ΔW loses nothing that a user would miss."""


def vera_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    lambda_d: Tensor,
    lambda_b: Tensor,
    *,
    adapter_ids: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = False,
    seed: int | None = None,
    merge: bool | None = None,
    u: Tensor | None = None,
) -> Tensor:
    """A linear layer with a VeRA adapter: Y = X W0ᵀ + bias + b ⊙ (((X Aᵀ) ⊙ d) Bᵀ).

    Of the forms that compute it, the one with the fewest multiplications at these sizes is taken
    (``fmkernels.ops.vera_linear.formulation``): two products through the rank; for many rows or
    large ranks the update ΔW = diag(b) B diag(d) A as a matrix, folded into the weight or apart.

    Args:
        x: (…, m), of any floating dtype and strides.
        weight: W0, (n, m), taken in x's dtype, as A and B are. If it or ``bias`` requires a
            gradient, it gets one.
        bias: (n), or None.
        A: (r, ≥ m), frozen; the first m columns count.
        B: (≥ n, r), frozen; the first n rows count.
        lambda_d: d, (r), or (N, r) for several adapters; of any floating dtype.
        lambda_b: b, (n) or (N, n).
        adapter_ids: (…), integers from −1 (no adapter) to N − 1: that of every row of x.
        dropout_p: the share of x's numbers that the adapter does not see; the others are divided
            by 1 − p.
        training: whether to drop any: hand over ``module.training``.
        seed: which are dropped, from 0 to 2**63 − 1; drawn from PyTorch's generator if None.
        merge: whether Y may be that of W0 + ΔW in the weight's dtype, which over bfloat16 and
            float16 rounds small updates away, as PEFT's merge does. By default only in float32 and
            float64.
        u: U = X Aᵀ (…, r), from :func:`fmkernels.vera_shrink`, if another layer needs it too: then
            it is not computed again. If it requires a gradient, the adapter's part of x's goes
            through it, once for all layers; of :func:`fmkernels.vera_shrink` of ``x.detach()`` it
            does not, and each layer gives x all of it, which is cheaper for many rows.

    Returns:
        Y, (…, n), in x's dtype, or in that of autocast where it is on.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument does not fit; the message names it.

    Numerics:
        Products in the dtype of the result; the vectors multiply, and their gradients are summed,
        in float32 (float64 for float64). Backward keeps U (…, r) and the vectors; for large ranks
        X and ΔW (n, m) instead. For many rows x's gradient is that of W0 + ΔW in the weight's
        dtype. What is dropped is made again from the seed.

    Source:
        Kopiczko, Blankevoort, Asano, *VeRA: Vector-based Random Matrix Adaptation*, ICLR 2024.

    Example:
        >>> import torch, fmkernels
        >>> x, weight = torch.randn(5, 12), torch.randn(8, 12)
        >>> A, B = torch.randn(4, 12), torch.randn(8, 4)
        >>> d, b = torch.full((4,), 0.1, requires_grad=True), torch.ones(8, requires_grad=True)
        >>> y = fmkernels.vera_linear(x, weight, None, A, B, d, b)
        >>> expected = x @ weight.mT + b * ((x @ A.mT * d) @ B.mT)
        >>> torch.allclose(y, expected, atol=1e-5)
        True
    """
    several = adapter_ids is not None
    count = _checks.at_call(_check, (several,), x, weight, A, B, lambda_d, lambda_b)
    _check_rest(x, weight, bias, A, B, adapter_ids, count, dropout_p, training)
    drops = training and dropout_p > 0
    _check_merge(merge, weight, bias, adapter_ids, drops)
    if seed is not None and not (is_compiling() and isinstance(seed, int)):
        seed = _checks.integer_below(NAME, "seed", seed, 63)
    if u is not None:
        _check_u(u, x, A, drops)
    x = lower_precision(x)
    one = adapter_ids is None and not drops and not (u is not None and u.requires_grad)
    form = form_of(x, weight, bias, A, one=one, merge=merge, keeps_x=u is None)
    if form == "refolded" and u is None and not _is_differentiated(x, lambda_d, lambda_b):
        form = "merged"  # the same Y; U is for gradients
    if form in DENSE:
        y: Tensor = VERA_DENSE(
            x.reshape(-1, x.shape[-1]),
            weight.to(x.dtype),
            None if bias is None else bias.to(x.dtype),
            A,
            B,
            lambda_d.reshape(1, -1),
            lambda_b.reshape(1, -1),
            form == "merged",
        )
        return y.reshape(*x.shape[:-1], y.shape[1])
    layer = x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if drops or _is_trained(weight, bias):
        if u is None or (_is_differentiated(x) and not u.requires_grad):
            u = vera_shrink(vera_dropout(x, dropout_p, seed=seed) if drops else x, A)
        base = F.linear(*layer)
        return vera_expand(base, u, lambda_d, lambda_b, B, adapter_ids=adapter_ids)
    flat, (width, rank) = x.reshape(-1, x.shape[-1]), (weight.shape[0], A.shape[0])
    vectors = lambda_d.reshape(-1, rank), lambda_b.reshape(-1, width)
    ids = None if adapter_ids is None else adapter_ids.reshape(-1).long()
    folds = form == "refolded", form != "products"
    matrix = ids is None and by_matrix(len(flat), width, rank)
    if u is None:
        y = VERA_PRODUCTS(flat, *layer[1:], A, B, *vectors, ids, matrix, *folds)
    else:
        own_u = u.reshape(-1, rank).to(x.dtype)
        y = VERA_EXPANDED(flat, *layer[1:], own_u, A, B, *vectors, ids, matrix, *folds)
    return y.reshape(*x.shape[:-1], width)


def form_of(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    *,
    one: bool = True,
    merge: bool | None = None,
    keeps_x: bool = True,
    readers: int = 1,
) -> Formulation:
    """The form for x in the dtype of the products.

    Args:
        x: (…, m).
        weight: (n, m).
        bias: (n), or None.
        A: (r, ≥ m).
        one: whether there is one adapter, which sees all of x and hands its gradient to x itself.
        merge: as in :func:`vera_linear`.
        keeps_x: whether a form that makes no U will do.
        readers: how many layers share U.
    """
    exact = x.dtype in EXACT
    return formulation(
        x.shape[:-1].numel(),
        x.shape[-1],
        weight.shape[0],
        A.shape[0],
        builds=one and not _is_trained(weight, bias),
        merge=exact if merge is None else merge,
        keeps_x=keeps_x,
        readers=readers,
        parts=1 if exact else 2,
    )


def _is_differentiated(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _is_trained(weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the layer itself is: then it needs its own product, and no ΔW is built."""
    return weight.requires_grad or (bias is not None and bias.requires_grad)


def check_layer(op: str, x: Any, weight: Any, A: Any, B: Any) -> None:
    """A layer's input and weight, and shared matrices that are large enough for it."""
    _checks.floating_tensor(op, "x", x)
    _checks.floating_tensor(op, "weight", weight)
    _checks.same_device(op, "weight", weight, "x", x)
    if weight.ndim != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"{op}: weight: expected shape (n, {x.shape[-1]}), the inputs of x, "
            f"got {_checks.shape(weight)}"
        )
    check_shared(op, "A", A, x, x.shape[-1], dim=1)
    check_shared(op, "B", B, x, weight.shape[0], dim=0)
    if B.shape[1] != A.shape[0]:
        raise ValueError(f"{op}: B: expected {A.shape[0]} columns, the rank of A, got {B.shape[1]}")


def check_bias(op: str, bias: Any, weight: Tensor) -> None:
    """None, or one number for every output."""
    if bias is None:
        return
    _checks.floating_tensor(op, "bias", bias)
    _checks.same_device(op, "bias", bias, "weight", weight)
    if _checks.shape(bias) != (weight.shape[0],):
        raise ValueError(
            f"{op}: bias: expected shape ({weight.shape[0]},), got {_checks.shape(bias)}"
        )


def _check(
    x: Tensor, weight: Tensor, A: Tensor, B: Tensor, lambda_d: Tensor, lambda_b: Tensor,
    several: bool,
) -> int:  # fmt: skip
    check_layer(NAME, x, weight, A, B)
    return check_vectors(NAME, lambda_d, lambda_b, A.shape[0], weight.shape[0], x, several)


def _check_rest(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor,
    adapter_ids: Tensor | None, count: int, dropout_p: float, training: Any,
) -> None:  # fmt: skip
    check_bias(NAME, bias, weight)
    check_frozen(NAME, "A", A)
    check_frozen(NAME, "B", B)
    if adapter_ids is not None:
        check_ids(NAME, adapter_ids, tuple(x.shape[:-1]), count, x)
    if not isinstance(training, bool):
        raise TypeError(f"{NAME}: training: expected True or False, got {training!r}")
    _checks.non_negative(NAME, "dropout_p", dropout_p)
    if dropout_p > 1:
        raise ValueError(f"{NAME}: dropout_p: expected a share from 0 to 1, got {dropout_p}")


def _check_u(u: Any, x: Tensor, A: Tensor, drops: bool) -> None:
    """X Aᵀ, where that is what the adapter multiplies by."""
    _checks.floating_tensor(NAME, "u", u)
    _checks.same_device(NAME, "u", u, "x", x)
    expected = (*x.shape[:-1], A.shape[0])
    if _checks.shape(u) != tuple(expected):
        raise ValueError(f"{NAME}: u: expected shape {tuple(expected)}, got {_checks.shape(u)}")
    if drops:
        raise ValueError(f"{NAME}: u: expected None with dropout, got a tensor")


def _check_merge(
    merge: Any, weight: Tensor, bias: Tensor | None, adapter_ids: Tensor | None, drops: bool
) -> None:
    """None or a truth value; True only where ΔW may be built."""
    if merge is None or merge is False:
        return
    if merge is not True:
        raise TypeError(f"{NAME}: merge: expected None, True or False, got {merge!r}")
    reasons = {
        "adapter_ids": adapter_ids is not None,
        "dropout": drops,
        "a weight or bias that requires a gradient": _is_trained(weight, bias),
    }
    for what, holds in reasons.items():
        if holds:
            raise ValueError(f"{NAME}: merge: expected None or False with {what}, got True")
