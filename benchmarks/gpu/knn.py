"""python -m gpu.knn FOLDER: exact search at the canonical sizes, beside torch and faiss.

Every time is of a search whose rows were compared just before with those of float64, for some of
the queries. It stands beside two floors: the bytes that must move over this device's copy rate, the
operations over its bfloat16 rate.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import measure
import torch
from torch import Tensor
from torch.nn import functional as F

import fmkernels
from fmkernels.ops.knn import reference, search
from gpu import clock, table
from gpu.record import Record
from gpu.sort import attempt
from gpu.target import DEVICE, DRY_RUN, prepare, running

CHECKED = 64
"""Queries whose rows are compared with those of float64."""

TILE = 65_536
"""Rows that torch multiplies at a time: 16,384 queries make 4.3 GB of float32 scores."""


@dataclass(frozen=True)
class Problem:
    """The k rows of a bank with the largest cosine; for labels, what is carried over from them."""

    queries: int
    rows: int
    dim: int = 384
    k: int = 30
    dtype: torch.dtype = torch.float32
    classes: int = 0
    """Of soft labels of the rows; 0 for the search alone."""

    def random(self, seed: int, rows: int) -> Tensor:
        generator = torch.Generator(DEVICE).manual_seed(seed)
        numbers = torch.empty(rows, self.dim, dtype=self.dtype, device=DEVICE)
        for part in numbers.split(2**20):
            part.normal_(generator=generator)
        return numbers

    @property
    def operations(self) -> int:
        return 2 * self.queries * self.rows * self.dim

    @property
    def bytes(self) -> int:
        """The bank, once; queries, scores and indices, or labels."""
        size = self.dtype.itemsize
        out = 4 * self.classes if self.classes else 12 * self.k
        return size * self.dim * (self.rows + self.queries) + self.queries * out

    def tiny(self) -> Problem:
        dtype = torch.float16 if self.dtype == torch.bfloat16 else self.dtype
        return replace(self, queries=2, rows=600, dim=8, k=3, dtype=dtype)


WORKLOADS = {
    "knn-100k": Problem(2048, 100_000),
    "knn-1m": Problem(16_384, 1_024_000),
    "knn-10m": Problem(16_384, 10_240_000, 768, dtype=torch.bfloat16),
    "hummingbird-voc": Problem(82_944, 102_400, classes=21),
}

Search = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""Queries and k -> cosines and indices."""


def ours(bank: Tensor) -> Search:
    return lambda queries, k: fmkernels.knn(queries, bank, k)


def ours_prepared(bank: Tensor) -> Search:
    """What depends on the bank alone is made before; that is not timed."""
    from fmkernels.ops.knn.gpu import shadow_of

    rest = shadow_of(bank)
    return lambda queries, k: search(queries, bank, k, "cosine", "exact", None, *rest)[:2]


def torch_search(dtype: torch.dtype, bank: Tensor) -> Search:
    """Products in tiles, and the best of each; the bank is normalised and converted before."""
    units = torch.cat([F.normalize(part.float(), dim=1).to(dtype) for part in bank.split(2**20)])

    def run(queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        queries = F.normalize(queries.float(), dim=1).to(dtype)
        best = []
        for start in range(0, len(units), TILE):
            values, rows = (queries @ units[start : start + TILE].mT).topk(k)
            best.append((values, rows + start))
        values, order = torch.cat([values for values, _ in best], dim=1).topk(k)
        return values, torch.cat([rows for _, rows in best], dim=1).gather(1, order)

    return run


def faiss_search(bank: Tensor) -> Search:
    """faiss's exact index on this GPU, whose rows are normalised before."""
    import faiss
    import faiss.contrib.torch_utils

    if not hasattr(faiss, "StandardGpuResources"):
        raise ModuleNotFoundError("No module named 'faiss-gpu'", name="faiss-gpu")
    index = faiss.GpuIndexFlatIP(faiss.StandardGpuResources(), bank.shape[1])
    for part in bank.split(2**20):
        index.add(F.normalize(part.float(), dim=1))
    return lambda queries, k: index.search(F.normalize(queries.float(), dim=1), k)


PROVIDERS: dict[str, Callable[[Tensor], Search]] = {
    "triton": ours,
    "triton-prepared": ours_prepared,
    "torch-float32": functools.partial(torch_search, torch.float32),
    "torch-bfloat16": functools.partial(torch_search, torch.bfloat16),
    "faiss": faiss_search,
}
EXACT = ("triton", "triton-prepared")


def recall(queries: Tensor, bank: Tensor, k: int, indices: Tensor) -> float:
    """The share of the nearest rows by float64 that were found, for some of the queries."""
    units = reference.unit(queries[:CHECKED].double())
    best = torch.empty(len(units), 0, dtype=torch.float64, device=queries.device)
    for part in bank.split(2**18):
        cosines = units @ reference.unit(part.double()).mT
        best = torch.cat([best, cosines.topk(min(k, len(part))).values], dim=1)
        best = best.topk(min(k, best.shape[1])).values
    found = reference.unit(bank[indices[:CHECKED]].double()) @ units.unsqueeze(-1)
    return (found.squeeze(-1) >= best[:, -1:] - 2.0**-45).double().mean().item()


def measured(problem: Problem, name: str, bank: Tensor, labels: Tensor | None) -> dict[str, Any]:
    """Time and memory of a search, or of a search and its labels."""
    sets = [problem.random(seed, problem.queries) for seed in (1, 2)]
    with running("triton" if name in EXACT else "reference"):
        find = PROVIDERS[name](bank)
        share = recall(sets[0], bank, problem.k, find(sets[0], problem.k)[1])
        if name in EXACT and share < 1:
            raise AssertionError(f"found {share:.4f} of the nearest rows")
        facts = {"recall": measure.digits(share)}
        if name == "triton":
            info = fmkernels.knn(sets[0], bank, problem.k, return_info=True)[2]
            facts["candidates"] = measure.digits(info.candidates.double().mean().item())
            facts["fallbacks"] = info.fallbacks
        turns = iter(range(10**9))

        def step() -> Tensor:
            scores, indices = find(sets[next(turns) % len(sets)], problem.k)
            return scores if labels is None else carried(labels, scores, indices)

        return facts | {"ms": clock.milliseconds(step), "peak_bytes": clock.peak_bytes(step)}


def carried(labels: Tensor, scores: Tensor, indices: Tensor) -> Tensor:
    """Labels (Q, C) of the nearest rows, weighted; some queries at a time, for the memory."""
    weights = torch.softmax(scores.float() / 0.02, dim=1).split(8192)
    parts = zip(weights, indices.split(8192), strict=True)
    return torch.cat([(weight.unsqueeze(1) @ labels[rows]).squeeze(1) for weight, rows in parts])


def main(folder: str) -> None:
    prepare()
    record = Record(Path(folder), "knn")
    roof = record.content["roofline"] = clock.roofline()
    record.write()
    for name, full in WORKLOADS.items():
        problem = full.tiny() if DRY_RUN else full
        rates = (roof["bytes_per_s"], roof["bfloat16_operations_per_s"])
        work = zip(("bytes", "operations"), (problem.bytes, problem.operations), rates, strict=True)
        found = record.results[name] = {
            "queries": problem.queries,
            "rows": problem.rows,
            "floor_ms": {what: measure.digits(amount / rate * 1e3) for what, amount, rate in work},
        }
        bank, labels = problem.random(0, problem.rows), None
        if problem.classes:
            labels = torch.rand(problem.rows, problem.classes, device=DEVICE)
        for who in PROVIDERS:
            found[who] = attempt(measured, problem, who, bank, labels)
            record.write()
        del bank, labels
        print(*table.knn({name: found}), flush=True)
    record.finish()


if __name__ == "__main__":
    main(*sys.argv[1:])
