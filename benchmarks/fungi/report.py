"""The part of the README about gradient projections, and docs/benchmarks/fungi.md."""

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

from fungi import e2e
from fungi.limits import LIMITS
from fungi.workloads import WORKLOADS

OURS = {
    "fmkernels": "`CountSketch`",
    "fmkernels-packed": "`Rademacher.from_matrix`",
    "fmkernels-seeded": "`Rademacher`",
    "fmkernels-khatri-rao": "`KhatriRao`",
    "fmkernels-kronecker": "`Kronecker`",
}
PEERS = {"float32": "float32", "bfloat16": "bfloat16"}
STEPS = {"fungivision": "all of fungivision's steps"}
ISAS = ("baseline", "avx2", "avx512")
"""Those that are not the machine's best are measured on their own."""


def measurement(peer: str, ours: str = "fmkernels") -> str:
    """The key of a ratio in the results."""
    return peer if ours == "fmkernels" else f"{peer}, {ours}"


def section(content: dict[str, Any]) -> list[str]:
    """The tables of one machine, for the README."""
    results = content["results"]
    return [intro(content), *verdicts(LIMITS, results)]


def details(content: dict[str, Any]) -> list[str]:
    """All tables of one machine."""
    results = content["results"]
    return [
        intro(content),
        *verdicts(LIMITS, results),
        *speeds(results),
        *kinds(results),
        *instruction_sets(results),
        *end_to_end(results),
        *costs(results),
        *memory(results),
    ]


def intro(content: dict[str, Any]) -> str:
    return heading(content, "built gradients and a product with the stored matrix")


def speeds(results: Results) -> list[str]:
    """The count sketch at every size."""
    rows = (
        (f"`{name}`", *(times(results.get(name, {}).get(peer)) for peer in PEERS | STEPS))
        for name in WORKLOADS
    )
    return table(("`CountSketch`, times faster than", *(PEERS | STEPS).values()), rows)


def kinds(results: Results) -> list[str]:
    """All projections at two sizes."""
    names = ("fungi-kl-b-1", "fungi-kl-b-64")
    columns = [(name, peer) for name in names for peer in PEERS]
    rows = (
        (words, *(times(results.get(n, {}).get(measurement(p, ours))) for n, p in columns))
        for ours, words in OURS.items()
    )
    return table(("times faster than", *(f"{p}, `{n}`" for n, p in columns)), rows)


def instruction_sets(results: Results) -> list[str]:
    shown = by_instruction_set(results.get("fungi-kl-b-64", {}), "float32", ISAS)
    words = "`fungi-kl-b-64`, `CountSketch` beside float32, in another instruction set"
    return ["", f"{words}: {shown}."] if shown else []


def end_to_end(results: Results) -> list[str]:
    """From pictures to features."""
    columns = {
        "float32, beside fungivision": e2e.measurement("fungivision"),
        "bfloat16, beside fungivision": e2e.measurement("fungivision", "fmkernels-bfloat16"),
        "float32, beside the plain forward passes": e2e.measurement("forwards"),
    }
    rows = (
        (
            f"`{name}`, {problem.views} views",
            *(times(results.get(name, {}).get(column)) for column in columns.values()),
        )
        for name, problem in e2e.WORKLOADS.items()
    )
    return table(("`FungiExtractor`, times faster", *columns), rows)


def costs(results: Results) -> list[str]:
    """What a workload needs at least, and what it takes of what the machine can do."""
    rows = []
    for name, problem in WORKLOADS.items():
        alone = results.get(name, {}).get("alone")
        if alone:
            rows.append(
                (
                    f"`{name}`",
                    f"{three(problem.operations() / 1e6)} M",
                    f"{three(problem.bytes_moved() / 1e3)} kB",
                    f"{three(1e3 * alone['median_ms'])} µs" + (BUSY_NOTE if busy(alone) else ""),
                    f"{alone['share_of_matmul_rate']:.1%}",
                )
            )
    return table(
        ("", "operations", "bytes at least", "time of a `CountSketch`", "of the matmul rate"), rows
    )


def memory(results: Results) -> list[str]:
    rows = (
        (f"`{name}`", megabytes(found.get("memory", {}).get("peak_bytes")))
        for name, found in results.items()
    )
    return table(("", "peak extra memory"), rows)
