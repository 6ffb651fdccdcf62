"""The part of the README about layers with an adapter, and docs/benchmarks/vera.md."""

from __future__ import annotations

from typing import Any

from limits import Results
from markdown import heading, megabytes, table, three, times, verdicts

from vera.limits import LIMITS
from vera.models import FineTuning
from vera.workloads import WORKLOADS, Adapted

PEERS = {
    "peft": "PEFT",
    "peft-autocast": "PEFT under autocast",
    "peft-compiled": "PEFT under `torch.compile`",
    "stock": "the stock products",
    "lora": "LoRA, r = 16",
}


def measurement(peer: str, ours: str = "fmkernels") -> str:
    """The key of a ratio in the results."""
    return peer if ours == "fmkernels" else f"{peer}, {ours}"


def section(content: dict[str, Any]) -> list[str]:
    """The tables of one machine, for the README."""
    return [intro(content), *verdicts(LIMITS, content["results"])]


def details(content: dict[str, Any]) -> list[str]:
    """All tables of one machine."""
    results = content["results"]
    return [
        intro(content),
        *verdicts(LIMITS, results),
        *speeds(results),
        *parts(results),
        *many(results),
        *norms(results),
        *steps(results),
        *memory(results),
    ]


def intro(content: dict[str, Any]) -> str:
    return heading(content, "PEFT's VeRA layer, of what the adapter adds to the layer alone")


def names(kind: type = Adapted) -> list[str]:
    return [name for name, workload in WORKLOADS.items() if isinstance(workload, kind)]


def speeds(results: Results) -> list[str]:
    """Of the adapter, in both precisions."""
    rows = (
        (
            f"`{name}`",
            *(times(results.get(name, {}).get(peer)) for peer in PEERS),
            times(results.get(name, {}).get(measurement("peft", "fmkernels-merged"))),
        )
        for name in names()
    )
    columns = (*PEERS.values(), "merged, than PEFT")
    return table(("what the adapter takes, times less than", *columns), rows)


def parts(results: Results) -> list[str]:
    """Milliseconds of the layer alone and of what is added."""
    rows = []
    for name in names():
        found = results.get(name, {}).get("peft", {})
        if "beyond_ms" not in found:
            continue
        added = found["beyond_ms"]
        kept = found["kept_bytes"]
        rows.append(
            (
                f"`{name}`",
                three(found["ms"]["base"]),
                three(added["fmkernels"]),
                three(added["peft"]),
                f"{three(kept['fmkernels'] / 1e6)} MB",
                f"{three(kept['peft'] / 1e6)} MB",
            )
        )
    columns = ("the layer alone, ms", "ours adds", "PEFT adds", "ours keeps", "PEFT keeps")
    return table(("", *columns), rows)


def many(results: Results) -> list[str]:
    rows = (
        (
            f"`{name}`",
            times(results.get(name, {}).get("64 adapters, the layer")),
            times(results.get(name, {}).get("64 adapters, the adapter's part")),
            times(results.get(name, {}).get(measurement("looped", "fmkernels-mixed"))),
        )
        for name in names()
    )
    columns = ("the layer, beside one adapter", "the adapter's part", "faster than a loop")
    return table(("64 adapters in a batch", *columns), rows)


def norms(results: Results) -> list[str]:
    rows = (
        (f"`{name}`", *(times(results.get(name, {}).get(p)) for p in ("peft-dora", "materialized")))
        for name in WORKLOADS
        if name.startswith("dvora")
    )
    return table(("DVoRA's norms, times faster than", "PEFT's DoRA", "built and measured"), rows)


def steps(results: Results) -> list[str]:
    """Of a fine-tune of whole models."""
    peers = {
        "PEFT": "peft",
        "PEFT under autocast": "peft-autocast",
        "PEFT, by `accelerate_peft`": measurement("peft", "fmkernels-peft"),
    }
    rows = (
        (f"`{name}`", *(times(results.get(name, {}).get(key)) for key in peers.values()))
        for name in names(FineTuning)
    )
    return table(("a step of a model, times faster than", *peers), rows)


def memory(results: Results) -> list[str]:
    rows = (
        (f"`{name}`", megabytes(found.get("memory", {}).get("peak_bytes")))
        for name, found in results.items()
    )
    return table(("", "peak extra memory"), rows)
