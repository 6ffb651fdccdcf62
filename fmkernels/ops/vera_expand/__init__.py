"""VeRA's second half: the adapter's vectors and B, added to what the base layer gives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fmkernels import _checks
from fmkernels._autocast import lower_precision
from fmkernels._library import GpuKernel, Op
from fmkernels.ops.vera_expand import cpp, reference
from fmkernels.ops.vera_expand.config import by_matrix
from fmkernels.ops.vera_shrink import check_frozen, check_shared
from fmkernels.ops.vera_shrink.gpu_config import limits

NAME = "vera_expand"


def vera_expand(
    base: Tensor,
    u: Tensor,
    lambda_d: Tensor,
    lambda_b: Tensor,
    B: Tensor,
    *,
    adapter_ids: Tensor | None = None,
) -> Tensor:
    """Add an adapter's update to the output of its base layer: Y = base + b ⊙ ((U ⊙ d) Bᵀ).

    Every row may have an adapter of its own: with N of them in ``lambda_d`` and ``lambda_b``, row t
    takes those of ``adapter_ids[t]``, in whatever order they come, and −1 is none.

    Args:
        base: (…, n), what the base layer gives; it is not changed.
        u: (…, r), from :func:`fmkernels.vera_shrink`.
        lambda_d: d, (r), or (N, r) for several adapters; of any floating dtype.
        lambda_b: b, (n) or (N, n).
        B: (≥ n, r), frozen: a layer of n outputs takes the first n rows.
        adapter_ids: (…), integers from −1 to N − 1; None if there is one adapter for all.

    Returns:
        Y, (…, n), in base's dtype. It is differentiable in base, u, lambda_d and lambda_b.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument does not fit; the message names it.

    Numerics:
        Products in u's dtype; the vectors multiply, and their gradients are summed, in float32
        (float64 for float64). Backward keeps u, the vectors and B, and neither Z nor V. Rows of no
        adapter are the base's, bit for bit. Gradients of the vectors are in their dtype.

    Source:
        Kopiczko, Blankevoort, Asano, *VeRA: Vector-based Random Matrix Adaptation*, ICLR 2024.

    Example:
        >>> import torch, fmkernels
        >>> base, u, B = torch.zeros(3, 8), torch.randn(3, 4), torch.randn(8, 4)
        >>> d, b = torch.full((2, 4), 0.1), torch.ones(2, 8)  # two adapters
        >>> y = fmkernels.vera_expand(base, u, d, b, B, adapter_ids=torch.tensor([1, -1, 0]))
        >>> bool((y[1] == 0).all()), torch.allclose(y[0], 0.1 * u[0] @ B.mT)
        (True, True)
    """
    if adapter_ids is None:
        _checks.at_call(_check, (), base, u, lambda_d, lambda_b, B)
    else:
        _check(base, u, lambda_d, lambda_b, B, adapter_ids)
    check_frozen(NAME, "B", B)
    u = lower_precision(u)
    rank, width = u.shape[-1], base.shape[-1]
    ids = None if adapter_ids is None else adapter_ids.reshape(-1).long()
    flat = base.reshape(-1, width)
    y: Tensor = VERA_EXPAND(
        flat,
        u.reshape(-1, rank),
        lambda_d.reshape(-1, rank),
        lambda_b.reshape(-1, width),
        B,
        ids,
        ids is None and by_matrix(len(flat), width, rank),
    )
    return y.reshape(base.shape)


def check_vectors(
    op: str, lambda_d: Any, lambda_b: Any, rank: int, width: int, x: Tensor, several: bool | None
) -> int:
    """The vectors of one adapter, or of ``several`` with ids; how many there are.

    None: the op has no ids.
    """
    for name, value, size in (("lambda_d", lambda_d, rank), ("lambda_b", lambda_b, width)):
        _checks.floating_tensor(op, name, value)
        _checks.same_device(op, name, value, "the input", x)
        if value.shape[-1] != size or value.ndim > (1 if several is None else 2) or not len(value):
            many = "" if several is None else f", or (N, {size}) for N >= 1 adapters"
            raise ValueError(
                f"{op}: {name}: expected shape ({size},){many}, got {_checks.shape(value)}"
            )
        if value.ndim == 2 and not several:
            raise ValueError(
                f"{op}: adapter_ids: expected the adapter of each row, because {name} holds "
                f"{value.shape[0]}, got None; for one adapter {name} has shape ({size},)"
            )
    counts = [value.shape[0] if value.ndim == 2 else 1 for value in (lambda_d, lambda_b)]
    if counts[0] != counts[1]:
        raise ValueError(
            f"{op}: lambda_b: expected as many adapters as lambda_d {_checks.shape(lambda_d)} "
            f"holds, got shape {_checks.shape(lambda_b)}"
        )
    return int(counts[0])


def check_ids(op: str, ids: Any, leading: tuple[int, ...], count: int, x: Tensor) -> None:
    """Integers from −1 to ``count`` − 1, one for every row; on a GPU without waiting for it."""
    if not isinstance(ids, Tensor):
        raise _checks.no_tensor(op, "adapter_ids", ids)
    if ids.dtype not in (torch.int8, torch.int16, torch.int32, torch.int64):
        raise TypeError(f"{op}: adapter_ids: expected integers with a sign, got {ids.dtype}")
    _checks.same_device(op, "adapter_ids", ids, "the input", x)
    if _checks.shape(ids) != leading:
        hint = ""
        if ids.ndim < len(leading) and _checks.shape(ids) == leading[: ids.ndim]:
            axes = ", None" * (len(leading) - ids.ndim)
            hint = f"; for one per sequence use adapter_ids[...{axes}].expand{leading}"
        raise ValueError(
            f"{op}: adapter_ids: expected one per row, shape {leading}, "
            f"got {_checks.shape(ids)}{hint}"
        )
    if is_compiling() or ids.is_meta or not ids.numel():
        return
    inside = ((ids >= -1) & (ids < count)).all()
    message = f"{op}: adapter_ids: expected integers from -1 to {count - 1}"
    if ids.is_cuda:
        torch._assert_async(inside, message)
    elif not inside:
        raise ValueError(f"{message}, got {int(ids.min())} to {int(ids.max())}")


def _check(
    base: Tensor,
    u: Tensor,
    lambda_d: Tensor,
    lambda_b: Tensor,
    B: Tensor,
    adapter_ids: Tensor | None = None,
) -> bool:
    _checks.floating_tensor(NAME, "base", base)
    _checks.floating_tensor(NAME, "u", u)
    _checks.same_device(NAME, "u", u, "base", base)
    if u.shape[:-1] != base.shape[:-1]:
        leading = ", ".join([*map(str, base.shape[:-1]), "r"])
        raise ValueError(
            f"{NAME}: u: expected shape ({leading}), the rows of base, got {_checks.shape(u)}"
        )
    check_shared(NAME, "B", B, base, base.shape[-1], dim=0)
    if B.shape[1] != u.shape[-1]:
        raise ValueError(
            f"{NAME}: B: expected {u.shape[-1]} columns, the rank of u, got {B.shape[1]}"
        )
    several = adapter_ids is not None
    count = check_vectors(NAME, lambda_d, lambda_b, u.shape[-1], base.shape[-1], base, several)
    if several:
        check_ids(NAME, adapter_ids, tuple(base.shape[:-1]), count, base)
    return True


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    base, u, lambda_d, lambda_b, B, adapter_ids, matrix = inputs
    ctx.matrix = matrix
    ctx.base_dtype = base.dtype
    ctx.save_for_backward(u, lambda_d, lambda_b, B, adapter_ids)


def _backward(ctx: Any, on_reference: bool, grad: Tensor) -> tuple[Tensor | None, ...]:
    of_base, of_u, of_d, of_b = ctx.needs_input_grad[:4]
    grad_base = grad if of_base else None
    if not (of_u or of_d or of_b):
        return (grad_base,)
    grad_u, grad_d, grad_b = VERA_EXPAND_BACKWARD.run(
        on_reference, grad, *ctx.saved_tensors, ctx.matrix, of_u, of_d or of_b
    )
    return (
        grad_base,
        grad_u if of_u else None,
        grad_d if of_d else None,
        grad_b if of_b else None,
    )


def _fake_backward(
    grad: Tensor, u: Tensor, lambda_d: Tensor, lambda_b: Tensor, B: Tensor, ids: Tensor | None,
    matrix: bool, of_u: bool, of_vectors: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    vectors = (torch.empty_like(x) if of_vectors else x.new_empty(0) for x in (lambda_d, lambda_b))
    return u.new_empty(u.shape if of_u else 0), *vectors  # type: ignore[return-value]


_VECTORS = "Tensor lambda_d, Tensor lambda_b, Tensor B, Tensor? adapter_ids, bool by_matrix"

_GPU = (GpuKernel("triton", "fmkernels.ops.vera_expand.gpu", limits),)

VERA_EXPAND = Op(
    NAME,
    f"(Tensor base, Tensor u, {_VECTORS}) -> Tensor",
    reference=reference.vera_expand,
    cpu=cpp.vera_expand,
    fake=lambda base, *_: base.new_empty(base.shape),
    setup_context=_setup_context,
    backward=_backward,
    gpu=_GPU,
)
"""(T, n), (T, r), (N, r), (N, n), (≥ n, r), (T) int64 -> (T, n)."""

VERA_EXPAND_BACKWARD = Op(
    f"{NAME}_backward",
    f"(Tensor grad, Tensor u, {_VECTORS}, bool of_u, bool of_vectors) -> (Tensor, Tensor, Tensor)",
    reference=reference.vera_expand_backward,
    cpu=cpp.vera_expand_backward,
    fake=_fake_backward,
    gpu=_GPU,
)
"""Gradients of u, lambda_d and lambda_b; empty for what is not asked for."""
