"""Who finds the nearest rows: fmkernels in three ways, faiss, and PyTorch's product and topk."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import measure
import torch
from torch import Tensor
from torch.nn import functional as F

import fmkernels
from fmkernels.api import PatchIndex
from fmkernels.ops.knn import config

Search = Callable[..., Any]
"""Queries (Q, D) -> cosines, best first, and indices, (Q, k) each."""


class Provider(NamedTuple):
    """``searcher`` takes a bank (M, D) and k; what it does before it returns is not timed."""

    searcher: Callable[[Tensor, int], Search]
    error: Callable[[int], float] = lambda dim: 2.0**-24
    """How far a cosine of rows of D numbers may be off; by default, its rounding to float32."""
    unit_queries: bool = False
    """Whether queries come normalised, and that is not timed, either."""
    informed: bool = False
    """Whether searches take ``return_info=True``, as :func:`fmkernels.knn` does."""


def prepared(bank: Tensor, k: int) -> Search:
    index = PatchIndex(bank.shape[1], dtype=bank.dtype, device=bank.device)
    index.add(bank)
    index.build()
    return functools.partial(index.search, k=k)


def unprepared(bank: Tensor, k: int) -> Search:
    """From the tensors as they are: the bank's norms and its int8 are made every time."""
    return lambda queries, **options: fmkernels.knn(queries, bank, k, **options)


@contextlib.contextmanager
def float32_products() -> Iterator[None]:
    """As on a CPU that multiplies neither bfloat16 nor int8."""
    usual = config.has_fast_bfloat16, config.has_fast_int8
    config.has_fast_bfloat16 = config.has_fast_int8 = lambda: False
    try:
        yield
    finally:
        config.has_fast_bfloat16, config.has_fast_int8 = usual


def prepared_float32(bank: Tensor, k: int) -> Search:
    search = float32_products()(prepared)(bank, k)
    return float32_products()(search)


def flat_index(units: Tensor) -> Any:
    """faiss's exact index of rows of norm 1, searched with as many threads as everybody else."""
    import faiss

    faiss.omp_set_num_threads(measure.THREADS)
    index = faiss.IndexFlatIP(units.shape[1])
    index.add(units.numpy())
    return index


def search_in(index: Any, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    scores, indices = index.search(queries.numpy(), k)
    return torch.from_numpy(scores), torch.from_numpy(indices)


def faiss(bank: Tensor, k: int) -> Search:
    """The rows are in the index already; so its queries have to be of norm 1."""
    return functools.partial(search_in, flat_index(F.normalize(bank, dim=1)), k=k)


def faiss_unprepared(bank: Tensor, k: int) -> Search:
    """From the tensors as they are."""

    def search(queries: Tensor) -> tuple[Tensor, Tensor]:
        return search_in(flat_index(F.normalize(bank, dim=1)), F.normalize(queries, dim=1), k)

    return search


def product_and_topk(dtype: torch.dtype, bank: Tensor, k: int) -> Search:
    """The bank is normalised and in ``dtype`` already."""
    units = F.normalize(bank, dim=1).to(dtype)
    return lambda queries: tuple((queries.to(dtype) @ units.mT).topk(k))


def float32_error(dim: int) -> float:
    """Of a product of rows of norm 1, added up in any order; 8 for normalising them."""
    return (dim + 8) * 2.0**-24


def bfloat16_error(dim: int) -> float:
    """Each factor is off by 2⁻⁹ of its norm, and the product is rounded once more."""
    return 2.0**-7


PROVIDERS: dict[str, Provider] = {
    "fmkernels": Provider(prepared, informed=True),
    "fmkernels-unprepared": Provider(unprepared, informed=True),
    "fmkernels-float32": Provider(prepared_float32, informed=True),
    "faiss": Provider(faiss, float32_error, unit_queries=True),
    "faiss-unprepared": Provider(faiss_unprepared, float32_error),
    "torch-float32": Provider(
        functools.partial(product_and_topk, torch.float32), float32_error, unit_queries=True
    ),
    "torch-bfloat16": Provider(
        functools.partial(product_and_topk, torch.bfloat16), bfloat16_error, unit_queries=True
    ),
}
