"""Exact nearest neighbours: the k best rows of a bank for every query."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from fmkernels import _checks
from fmkernels._library import GpuKernel, Op
from fmkernels.ops.knn import cpp, reference
from fmkernels.ops.knn.gpu_config import limits
from fmkernels.ops.knn.reference import METRICS

PRECISIONS = ("exact", "fast")
PATHS = ("reference", "int8", "bfloat16", "float32", "a better one")


class KNNInfo(NamedTuple):
    """How :func:`fmkernels.knn` found what it returned; it would have found the same in any way."""

    candidates: Tensor
    """(…), int64: how many rows of the bank were scored in float64, per query."""
    paths: Tensor
    """(…), int64: for every query an index of ``PATHS``."""

    @property
    def path(self) -> str:
        """The product that told candidates from the rest, such as ``"bfloat16"``."""
        return PATHS[int(self.paths.min())] if self.paths.numel() else PATHS[0]

    @property
    def fallbacks(self) -> int:
        """Queries with so many candidates in a part of the bank that a better product followed."""
        return int((self.paths == reference.FELL_BACK).sum())


@overload
def knn(
    queries: Tensor,
    bank: Tensor,
    k: int,
    *,
    metric: str = ...,
    precision: str = ...,
    return_info: Literal[False] = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def knn(
    queries: Tensor,
    bank: Tensor,
    k: int,
    *,
    metric: str = ...,
    precision: str = ...,
    return_info: Literal[True],
) -> tuple[Tensor, Tensor, KNNInfo]: ...


def knn(
    queries: Tensor,
    bank: Tensor,
    k: int,
    *,
    metric: str = "cosine",
    precision: str = "exact",
    return_info: bool = False,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, KNNInfo]:
    """Find the k rows of a bank that are nearest to every query, exactly.

    The score of row b for query q is q·b / (‖q‖ ‖b‖) (``"cosine"``; 0 for a row of zeros), q·b
    (``"inner_product"``) or ‖q − b‖² (``"l2"``, where the smallest is best).

    Args:
        queries: (…, D), of any floating dtype and strides.
        bank: (M, D), on the same device; M may be 0. Its dtype may be another.
        k: how many, at least 1. Where the bank has fewer rows (or fewer whose score is not NaN),
            the index is −1 and the score the metric's worst: −inf, and +inf for ``"l2"``.
        metric: ``"cosine"``, ``"inner_product"`` or ``"l2"``.
        precision: ``"exact"``, or ``"fast"``, which takes the low-precision product for the score:
            it may return another row where two scores differ by less than that product's error
            (about 0.4 % of the norms with bfloat16), and a score that is off by as much.
        return_info: also return a :class:`KNNInfo`: candidates, fallbacks, the path taken.

    Returns:
        Scores (…, k), best first, in float32 (float64 if either input is), and indices (…, k) in
        int64. Equal scores are ordered by the lower index.

    Raises:
        TypeError: a tensor is not floating-point.
        ValueError: an argument does not fit; the message names it.

    Numerics:
        Rows are ordered by scores computed in float64 from the inputs as they are: those that a
        product in low precision cannot rule out, by the bound that is derived in
        ``fmkernels/ops/knn/reference.py``. So near ties are resolved, nothing overflows, and
        neither autocast nor ``torch.set_float32_matmul_precision`` changes the answer. Scores are
        differentiable with respect to queries and bank, for which the neighbours (…, k, D) are
        gathered in float64; the indices are constant.

    Source:
        Balažević et al., *Towards In-Context Scene Understanding*, NeurIPS 2023, is built on it.

    Example:
        >>> import torch, fmkernels
        >>> bank = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
        >>> scores, indices = fmkernels.knn(torch.tensor([[0.0, 2.0]]), bank, k=2)
        >>> indices
        tensor([[1, 2]])
        >>> scores
        tensor([[1.0000, 0.8000]])
    """
    k = check_arguments("knn", queries, bank, k, metric)
    _checks.choice("knn", "precision", precision, PRECISIONS)
    flat = queries.detach().reshape(-1, queries.shape[-1])
    found, indices, candidates, paths = search(flat, bank.detach(), k, metric, precision)
    scores = public_scores(found, queries, bank, metric)
    if torch.is_grad_enabled() and (queries.requires_grad or bank.requires_grad):
        again = _scores_of(queries.reshape(flat.shape), bank, indices, metric)
        scores = scores + (again - again.detach()).masked_fill(indices < 0, 0).to(scores.dtype)
    leading = queries.shape[:-1]
    scores, indices = scores.reshape(*leading, k), indices.reshape(*leading, k)
    if not return_info:
        return scores, indices
    return scores, indices, KNNInfo(candidates.reshape(leading), paths.reshape(leading))


def check_arguments(op: str, queries: Any, bank: Any, k: Any, metric: Any) -> int:
    """Refuse in words what does not fit; k as Python's integer."""
    _checks.floating_tensor(op, "queries", queries)
    _checks.floating_tensor(op, "bank", bank)
    _checks.dimensions(op, "bank", bank, "(M, D)")
    _checks.same_device(op, "bank", bank, "queries", queries)
    if queries.shape[-1] != bank.shape[-1]:
        raise ValueError(
            f"{op}: bank: expected rows of {queries.shape[-1]} numbers, as queries has, "
            f"got shape {_checks.shape(bank)}"
        )
    _checks.choice(op, "metric", metric, METRICS)
    return _checks.positive_integer(op, "k", k)


def public_scores(found: Tensor, queries: Tensor, bank: Tensor, metric: str) -> Tensor:
    """The op's scores (float64, larger is better) as the public functions return them."""
    dtype = torch.promote_types(queries.dtype, bank.dtype)
    result = torch.float64 if dtype == torch.float64 else torch.float32
    return (-found if metric == "l2" else found).to(result)


def _scores_of(queries: Tensor, bank: Tensor, indices: Tensor, metric: str) -> Tensor:
    """(Q, D), (M, D), (Q, k) -> (Q, k), by PyTorch's differentiable functions."""
    if not len(bank):
        return indices.double()
    rows = bank[indices.clamp(min=0)].double()  # (Q, k, D)
    queries = queries.double().unsqueeze(1)
    if metric == "cosine":  # whose value no scale changes, and squares of float64 leave its range
        queries, rows = _near_one(queries), _near_one(rows)
    if metric == "l2":
        return (queries - rows).square().sum(dim=-1)
    products = (queries * rows).sum(dim=-1)
    if metric == "inner_product":
        return products
    tiny = torch.finfo(torch.float64).tiny
    norms: Tensor = queries.norm(dim=-1).clamp(min=tiny) * rows.norm(dim=-1).clamp(min=tiny)
    return products / norms


def _near_one(rows: Tensor) -> Tensor:
    largest = rows.detach().abs().amax(dim=-1, keepdim=True)
    return rows / torch.where(largest > 0, largest, 1)


def _fake(queries: Tensor, bank: Tensor, k: int, *_: Any) -> tuple[Tensor, ...]:
    shape = (queries.shape[0], k)
    counts = queries.new_empty(shape[:1], dtype=torch.int64)
    scores = queries.new_empty(shape, dtype=torch.float64)
    indices = queries.new_empty(shape, dtype=torch.int64)
    return scores, indices, counts, counts.new_empty(shape[:1])


search = Op(
    "knn",
    '(Tensor queries, Tensor bank, int k, str metric="cosine", str precision="exact",'
    " Tensor? floor=None, Tensor? shadow=None, Tensor? norms=None, Tensor? residuals=None,"
    " Tensor? scales=None)"
    " -> (Tensor scores, Tensor indices, Tensor candidates, Tensor paths)",
    reference=reference.knn,
    fake=_fake,
    cpu=cpp.knn,
    gpu=(GpuKernel("triton", "fmkernels.ops.knn.gpu", limits),),
)
"""(Q, D), (M, D) -> scores (Q, k) in float64, larger is better, indices, candidates (Q), paths (Q).

Rows whose score does not exceed ``floor`` (Q) may be left out. ``shadow`` and what follows are
those of a prepared bank (``fmkernels/ops/knn/bank.py``); the result does not depend on them.
"""
