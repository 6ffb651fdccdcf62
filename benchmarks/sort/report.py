"""The part of the README about NeCo's sort."""

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

from sort.limits import LIMITS

ISAS = ("baseline", "avx2", "avx512")

MEANING = {
    "neco-step": "loss, 392 rows of 49",
    "neco-196": "loss, 196 rows of 196",
    "neco-196-small": "loss, 4 rows of 196",
    "neco-features": "`patch_neighbor_loss`, 64 images × 49 patches × 256",
    "neco-features-8": "`patch_neighbor_loss`, 8 images × 49 patches × 256",
    "neco-loss": "`NeCoLoss`, 2 images: 10 pairs of crops, 7 × 7 patches × 256",
    "neco-loss-14": "`NeCoLoss`, 4 images: 10 pairs of crops, 14 × 14 patches × 256",
    "soft-sort-matrix": "permutation matrix, 3,136 rows of 49",
    "soft-sort-matrix-392": "permutation matrix, 392 rows of 49",
    "soft-sort-matrix-16": "permutation matrix, 3,136 rows of 16",
    "soft-sort-matrix-64": "permutation matrix, 392 rows of 64",
    "soft-sort-matrix-256": "permutation matrix, 8 rows of 256",
    "soft-sort-values": "sorted values only, 3,136 rows of 49",
}

PEERS = {
    "diffsort": "diffsort",
    "diffsort-compiled": "diffsort under `torch.compile`",
    "reference": "our reference, in PyTorch",
}


def speeds(results: Results) -> list[str]:
    """How many times faster than the peers."""
    rows = (
        (f"`{name}`: {meaning}", *(times(results.get(name, {}).get(peer)) for peer in PEERS))
        for name, meaning in MEANING.items()
    )
    lines = table(("forward + backward, times faster than", *PEERS.values()), rows)
    step = results.get("neco-step", {})
    shown = by_instruction_set(step, "diffsort", ISAS)
    if shown:
        lines += ["", f"`neco-step` beside diffsort, by instruction set: {shown}."]
    torchsort = results.get("soft-sort-values", {}).get("torchsort")
    if torchsort:
        lines += ["", f"`soft-sort-values` beside torchsort: {times(torchsort)}."]
    return lines


def costs(results: Results) -> list[str]:
    """What a workload takes: time, share of what the machine can do, memory."""
    rows = []
    for name in MEANING:
        facts = results.get(name, {})
        alone, memory = facts.get("alone"), facts.get("memory", {})
        rows.append(
            (
                f"`{name}`",
                per_row(alone) if alone else "",
                f"{alone['share_of_matmul_rate']:.1%}" if alone else "",
                f"{alone['share_of_copy_rate']:.1%}" if alone else "",
                megabytes(memory.get("peak_bytes")),
                megabytes(memory.get("kept_bytes")),
            )
        )
    titles = ("", "time per row", "of the matmul rate", "of the copy rate")
    return table((*titles, "peak extra memory", "kept for backward"), rows)


def per_row(alone: dict[str, Any]) -> str:
    return f"{three(alone['microseconds_per_row'])} µs{BUSY_NOTE if busy(alone) else ''}"


def accuracy(results: Results) -> list[str]:
    """Errors of float32 log-probabilities."""

    def shown(errors: dict[str, float]) -> str:
        mean, largest = (f"{float(f'{errors[key]:.1g}'):g}" for key in ("mean", "largest"))
        return f"{mean} ({largest})"

    rows = (
        (f"`{distribution}`", shown(errors["fmkernels"]), shown(errors["diffsort"]))
        for distribution, errors in results.get("accuracy", {}).items()
    )
    return table(("error of log P in float32: mean (largest)", "fmkernels", "diffsort"), rows)


def section(content: dict[str, Any]) -> list[str]:
    """The tables of one machine."""
    results = content["results"]
    return [
        heading(content, "diffsort 0.2.0"),
        *verdicts(LIMITS, results),
        *speeds(results),
        *costs(results),
        *accuracy(results),
    ]
