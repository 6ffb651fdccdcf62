"""Differentiable sorting: the sorted values and the relaxed permutation matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fmkernels import _checks
from fmkernels._autocast import autocasts
from fmkernels._library import GpuKernel, Op
from fmkernels.ops.soft_sort import reference
from fmkernels.ops.soft_sort.config import MAX_CUDA_SIZE, MAX_TRITON_SIZE
from fmkernels.ops.soft_sort.networks import NETWORKS, sorts
from fmkernels.ops.soft_sort.reference import DISTRIBUTIONS

MAX_KERNEL_SIZE = 1024
"""Rows longer than this are sorted by the reference."""


MAX_DECIDED = 1536
"""Up to here it takes seconds to find out whether ``bitonic`` sorts; soon after that, minutes."""


def soft_sort(
    scores: Tensor,
    *,
    steepness: float = 100.0,
    network: str = "bitonic",
    distribution: str = "cauchy",
    art_lambda: float = 0.25,
) -> tuple[Tensor, Tensor]:
    """Sort every row ascending with a relaxed sorting network, differentiably.

    A comparator on wires (lo, hi) of the network, with Δ = x_hi − x_lo, replaces the two values by

        x_lo ← k·x_lo + c·x_hi,   x_hi ← c·x_lo + k·x_hi,   k = f(steepness·Δ),  c = 1 − k

    and the permutation matrix P records the mixture: ``values = scores @ P``. For steepness → ∞
    it becomes the hard sort (of rows without ties).

    Args:
        scores: (…, n), any floating dtype, strides and device; n ≥ 1.
        steepness: s ≥ 0, per unit of score: scores 1/s apart are clearly ordered.
        network: ``"bitonic"`` (diffsort's; not every n), ``"reflected_bitonic"``,
            ``"odd_even_merge"`` or ``"odd_even"``. The result depends on the choice.
        distribution: f, a cumulative distribution function: ``"cauchy"``, ``"reciprocal"``,
            ``"optimal"`` (slow tails), ``"logistic"``, ``"logistic_phi"``, ``"gaussian"``.
        art_lambda: exponent λ of ``logistic_phi``, from 0 to 1: f(s·Δ/(|Δ| + 1e-10)^λ).

    Returns:
        ``values`` (…, n), ascending up to the relaxation, and ``permutation`` (…, n, n) with
        ``permutation[..., i, j]`` the weight of input i in slot j; rows and columns sum to 1.
        Both in the dtype of ``scores``.

    Raises:
        TypeError: ``scores`` is not a floating-point tensor, or a number is expected.
        ValueError: an unknown network or distribution, a negative or non-finite steepness, an
            ``art_lambda`` that is not from 0 to 1, or a ``bitonic`` of a size at which diffsort's
            wiring does not sort (22, 38, 42, …).
        NotImplementedError: under ``vmap``. Double backward raises ``RuntimeError``.

    Numerics:
        Computed in float32 (float64 for float64). Every entry of P is a sum of products of
        positive weights, so it keeps its relative precision down to the smallest normal number.
        The kernels also carry what rounding takes from the values.

    Source:
        Petersen et al., *Monotonic differentiable sorting networks*, ICLR 2022.

    Example:
        >>> import torch, fmkernels
        >>> values, permutation = fmkernels.soft_sort(torch.tensor([0.9, 0.1, 0.5]))
        >>> permutation.argmax(dim=-1).tolist()  # 0.9 goes to the last slot, 0.1 to the first
        [2, 0, 1]
        >>> torch.allclose(values, torch.tensor([0.9, 0.1, 0.5]) @ permutation)
        True
    """
    settings = (steepness, network, distribution, art_lambda)
    if is_compiling():
        _check(scores, *settings)
        half = scores.dtype in HALF
    else:
        half, settings = _checks.once(_checked, settings, scores)
    if half and autocasts(scores):
        scores = scores.float()
    return SOFT_SORT(scores, *settings)  # type: ignore[no-any-return]


HALF = (torch.float16, torch.bfloat16)


def _check(scores: Tensor, *settings: Any) -> None:
    _checks.floating_tensor("soft_sort", "scores", scores)
    check_settings("soft_sort", *settings)


def _checked(scores: Tensor, *settings: Any) -> tuple[bool, tuple[Any, ...]]:
    """Whether it is a narrow dtype, and the settings for the op."""
    _check(scores, *settings)
    check_sorts("soft_sort", settings[1], scores.shape[-1])
    return scores.dtype in HALF, SOFT_SORT.without_defaults(*_checks.plain(settings))


def check_settings(
    op: str, steepness: float, network: str, distribution: str, art_lambda: float
) -> None:
    """The checks that every op on a sorting network shares."""
    _checks.non_negative(op, "steepness", steepness)
    _checks.non_negative(op, "art_lambda", art_lambda)
    if art_lambda > 1:  # close scores would then be told apart better than distant ones
        raise ValueError(f"{op}: art_lambda: expected a number from 0 to 1, got {art_lambda}")
    _checks.choice(op, "network", network, NETWORKS)
    _checks.choice(op, "distribution", distribution, DISTRIBUTIONS)


def check_sorts(op: str, network: str, n: int) -> None:
    """Refuse a wiring that leaves some inputs unsorted."""
    if network == "bitonic" and n > MAX_DECIDED and n & (n - 1):
        raise ValueError(
            f"{op}: network: expected one that is known to sort {n} values; {network!r} leaves "
            f"some sizes unsorted: decided up to {MAX_DECIDED} and for powers of two; use another"
        )
    if network == "bitonic" and not sorts(network, int(n)):
        alternatives = ", ".join(repr(name) for name in NETWORKS if name != network)
        raise ValueError(
            f"{op}: network: expected one that sorts {n} values; {network!r} (diffsort's wiring) "
            f"does not for this size; use one of {alternatives}"
        )


def _fake(scores: Tensor, steepness: float = 100.0, network: str = "bitonic", *_: Any) -> Any:
    n = scores.shape[-1]
    check_sorts("soft_sort", network, n)
    return scores.new_empty(scores.shape), scores.new_empty((*scores.shape, n))


def size_limit(scores: Tensor, *_: Any) -> str | None:
    """Why the compiled kernels refuse these scores, or None."""
    n = scores.shape[-1]
    return None if n <= MAX_KERNEL_SIZE else f"rows of {n} values exceed {MAX_KERNEL_SIZE}"


def triton_limit(scores: Tensor, *_: Any) -> str | None:
    """Why the Triton kernels refuse these scores, or None."""
    n = scores.shape[-1]
    if scores.dtype == torch.float64:
        return "computes in float32, got float64"
    return None if n <= MAX_TRITON_SIZE else f"rows of {n} values exceed {MAX_TRITON_SIZE}"


def cuda_limit(with_teacher: bool, with_grad: bool) -> Callable[..., str | None]:
    """Why the CUDA kernels refuse scores, as a function of them, steepness, network."""

    def limit(
        scores: Tensor, steepness: float = 100.0, network: str = "bitonic", *_: Any
    ) -> str | None:
        n = scores.shape[-1]
        if scores.dtype == torch.float64:
            return "computes in float32, got float64"
        if n > MAX_CUDA_SIZE:
            return f"rows of {n} values exceed {MAX_CUDA_SIZE}"
        if not scores.is_cuda:
            return None
        from fmkernels.ops.soft_sort.cuda import plan

        queries = max(1, scores.numel() // n)
        if plan(queries, n, network, scores.device, with_teacher, with_grad) is None:
            return f"rows of {n} values need more shared memory than a block has"
        return None

    return limit


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    scores, *ctx.settings = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(scores)


def _backward(
    ctx: Any, on_reference: bool, grad_values: Tensor | None, grad_permutation: Tensor | None
) -> Tensor | None:
    if grad_values is None and grad_permutation is None:
        return None
    (scores,) = ctx.saved_tensors
    grad_scores: Tensor = SOFT_SORT_BACKWARD.run(
        on_reference, grad_values, grad_permutation, scores, *ctx.settings
    )
    return grad_scores


def _without_grads(limit: Callable[..., str | None]) -> Callable[..., str | None]:
    return lambda grad_values, grad_permutation, *args: limit(*args)


SETTINGS = (
    'float steepness=100.0, str network="bitonic", str distribution="cauchy", float art_lambda=0.25'
)

HERE = "fmkernels.ops.soft_sort"

SOFT_SORT = Op(
    "soft_sort",
    f"(Tensor scores, {SETTINGS}) -> (Tensor values, Tensor permutation)",
    reference=reference.soft_sort,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    limits=size_limit,
    gpu=(
        GpuKernel("cuda", f"{HERE}.cuda", cuda_limit(with_teacher=False, with_grad=False)),
        GpuKernel("triton", f"{HERE}.triton", triton_limit),
    ),
)

SOFT_SORT_BACKWARD = Op(
    "soft_sort_backward",
    f"(Tensor? grad_values, Tensor? grad_permutation, Tensor scores, {SETTINGS}) -> Tensor",
    reference=reference.soft_sort_backward,
    fake=lambda grad_values, grad_permutation, scores, *_: scores.new_empty(scores.shape),
    limits=_without_grads(size_limit),
    gpu=(
        GpuKernel(
            "cuda", f"{HERE}.cuda", _without_grads(cuda_limit(with_teacher=False, with_grad=True))
        ),
        GpuKernel("triton", f"{HERE}.triton", _without_grads(triton_limit)),
    ),
)
