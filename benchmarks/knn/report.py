"""The part of the README about nearest neighbours, and docs/benchmarks/knn.md."""

from __future__ import annotations

from typing import Any

from limits import Results, busy
from markdown import (
    BUSY_NOTE,
    by_instruction_set,
    heading,
    megabytes,
    table,
    three,
    times,
    verdicts,
)

from knn.limits import LIMITS
from knn.workloads import SHAPES

OURS = {
    "fmkernels": "prepared `PatchIndex`",
    "fmkernels-unprepared": "`fmkernels.knn`, the bank's conversion included",
    "fmkernels-float32": "prepared `PatchIndex`, products in float32",
}
PEERS = {
    "faiss": "faiss, prepared",
    "faiss-unprepared": "faiss, normalising and adding included",
    "torch-float32": "`torch.mm` and `topk`, float32",
    "torch-bfloat16": "the same in bfloat16",
}
KINDS = {
    "random": "random normal numbers",
    "outlier channel": "the same, with one channel a hundred times as large",
    "photographs": "8 × 8 pixel patches of two photographs, near-duplicates among them",
}
ISAS = ("baseline", "avx2", "avx512")
"""Those that are not the machine's best are measured on their own."""


def measurement(peer: str, ours: str = "fmkernels") -> str:
    """The key of a ratio in the results."""
    return peer if ours == "fmkernels" else f"{peer}, {ours}"


def section(content: dict[str, Any]) -> list[str]:
    """The tables of one machine, for the README."""
    results = content["results"]
    return [intro(content), *verdicts(LIMITS, results), *speeds(results)]


def details(content: dict[str, Any]) -> list[str]:
    """All tables of one machine."""
    results = content["results"]
    return [
        intro(content),
        *verdicts(LIMITS, results),
        *speeds(results),
        *shapes(results),
        *instruction_sets(results),
        *costs(results),
        *memory(results),
        *candidates(results),
    ]


def intro(content: dict[str, Any]) -> str:
    return heading(content, f"faiss-cpu {content['machine']['faiss-cpu']}")


def speeds(results: Results) -> list[str]:
    """Of the canonical search, beside everybody."""
    found = results.get("knn-100k", {})
    rows = (
        (words, *(times(found.get(measurement(peer, ours))) for peer in PEERS))
        for ours, words in OURS.items()
    )
    return table(("`knn-100k`, times faster than", *PEERS.values()), rows)


def shapes(results: Results) -> list[str]:
    """Every shape beside faiss."""
    rows = []
    for name, search in SHAPES.items():
        chosen = results.get(name, {}).get("faiss")
        forced = results.get(name, {}).get(measurement("faiss", "fmkernels-float32"))
        rows.append(
            (
                f"{search.queries:,} × {search.dim}, k = {search.k:,}",
                times(chosen),
                chosen["path"] if chosen else "",
                three(chosen["candidates"]) if chosen else "",
                times(forced),
            )
        )
    titles = ("queries in 100,000 rows", "times faster than faiss", "product", "candidates a query")
    return table((*titles, "in float32"), rows)


def instruction_sets(results: Results) -> list[str]:
    shown = by_instruction_set(results.get("knn-100k", {}), "faiss", ISAS)
    words = "`knn-100k` beside faiss, with our own loops in another instruction set"
    return ["", f"{words} (the product is oneDNN's): {shown}."] if shown else []


def costs(results: Results) -> list[str]:
    """What a workload needs at least, and what it takes of what the machine can do."""
    rows = []
    for name, search in SHAPES.items():
        alone = results.get(name, {}).get("alone")
        if alone:
            rows.append(
                (
                    f"`{name}`",
                    f"{three(search.operations() / 1e9)} G",
                    f"{three(search.bytes_moved() / 1e6)} MB",
                    f"{three(1e3 * alone['median_ms'] / search.queries)} µs"
                    + (BUSY_NOTE if busy(alone) else ""),
                    f"{alone['share_of_matmul_rate']:.1%} ({alone['product']})",
                    f"{alone['share_of_copy_rate']:.1%}",
                )
            )
    titles = ("", "operations", "bytes at least", "time per query", "of the matmul rate")
    return table((*titles, "of the copy rate"), rows)


def memory(results: Results) -> list[str]:
    rows = (
        (f"`{name}`", megabytes(found.get("memory", {}).get("peak_bytes")))
        for name, found in results.items()
    )
    return table(("", "peak extra memory"), rows)


def candidates(results: Results) -> list[str]:
    """How many rows are scored in float64."""
    rows = []
    for kind, words in KINDS.items():
        facts = results.get("candidates", {}).get(kind)
        if facts:
            shown = map(three, (facts["mean"], facts["most"]))
            again = f"{facts['fallbacks']} of {facts['queries']}"
            rows.append((words, facts["path"], *shown, again))
    titles = ("candidates of a query, k = 30, 100,000 rows", "product", "mean", "most")
    return table((*titles, "queries that needed a second product"), rows)
