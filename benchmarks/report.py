"""Writes the tables of README and docs/backends.md, and docs/benchmarks/sort.png."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import status
from gpu import table as gpu_table
from limits import LIMITS, Results, busy

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
BACKENDS = ROOT / "docs" / "backends.md"
RESULTS = ROOT / "benchmarks" / "results"
PLOT = ROOT / "docs" / "benchmarks" / "sort.png"

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
BUSY_NOTE = ", machine busy"

PEERS = {
    "diffsort": "diffsort",
    "diffsort-compiled": "diffsort under `torch.compile`",
    "reference": "our reference, in PyTorch",
}


def load(pattern: str = "sort-*.json") -> list[dict[str, Any]]:
    """Every committed result file of that name: by default those of the sort on CPUs."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob(pattern))]


def table(titles: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """A Markdown table, without the rows that have nothing but a name."""
    head = [list(titles)]
    head.append(["---"] * len(head[0]))
    body = [row for row in map(list, rows) if any(row[1:])]
    return ["", *(f"| {' | '.join(row)} |" for row in head + body)] if body else []


def three(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{float(f'{value:.3g}'):,g}"


def times(ratio: dict[str, Any] | None) -> str:
    """A ratio with its interval; a peer that gave none, in words."""
    if ratio is None:
        return ""
    if "failed" in ratio:
        return ratio["failed"]
    broken = ratio.get("peer_not_finite")
    note = f", but {broken:,} elements of its gradient are not finite" if broken else ""
    return f"{three(ratio['median'])} × {interval(ratio)}{note}"


def interval(figure: dict[str, Any]) -> str:
    """In brackets; nothing where there is none. Says where the machine was not idle."""
    if figure["low"] == figure["high"]:
        return ""
    return f"({three(figure['low'])}–{three(figure['high'])}{BUSY_NOTE if busy(figure) else ''})"


def limits(results: Results) -> list[str]:
    """What is asked, and what was measured."""
    rows = []
    for limit in LIMITS:
        figure = limit.measured(results)
        if figure is None:
            rows.append((limit.what, limit.asked, "not measured here", ""))
            continue
        measured = f"{three(figure['median'])} {limit.unit} {interval(figure)}".strip()
        rows.append((limit.what, limit.asked, measured, limit.verdict(figure)))
    return table(("figure", "limit", "measured", ""), rows)


def speeds(results: Results) -> list[str]:
    """How many times faster than the peers."""
    rows = (
        (f"`{name}`: {meaning}", *(times(results.get(name, {}).get(peer)) for peer in PEERS))
        for name, meaning in MEANING.items()
    )
    lines = table(("forward + backward, times faster than", *PEERS.values()), rows)
    step = results.get("neco-step", {})
    by_isa = {key.removeprefix("diffsort, "): step[key] for key in step if "diffsort, " in key}
    if by_isa:
        shown = ", ".join(f"{isa} {times(ratio)}" for isa, ratio in by_isa.items())
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


def megabytes(count: dict[str, int] | None) -> str:
    """Ours, and diffsort's where it was measured."""
    if count is None:
        return ""
    peer = f" (diffsort {three(count['diffsort'] / 1e6)})" if "diffsort" in count else ""
    return f"{three(count['fmkernels'] / 1e6)}{peer} MB"


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


def section(content: dict[str, Any]) -> str:
    """The tables of one machine."""
    machine, results = content["machine"], content["results"]
    origins = {
        f"{measurement['revision']} of {measurement['date']}"
        for measurements in results.values()
        for measurement in measurements.values()
    }
    lines = [
        f"**{machine['cpu']}, {machine['instruction set']}, {machine['threads']} threads, "
        f"torch {machine['torch']}**, revision {', '.join(sorted(origins))}. Ratios are medians of "
        "interleaved pairs in one run (95 % interval), beside diffsort 0.2.0; the rates are those "
        "of a large float32 product and a large copy in the same run.",
        *limits(results),
        *speeds(results),
        *costs(results),
        *accuracy(results),
    ]
    return "\n".join(lines)


def readme_body() -> str:
    """The README's generated part."""
    gpu = load("gpu-sort-*.json")
    parts = [section(content) for content in load()]
    parts += ["\n".join(gpu_table.markdown(content)) for content in gpu]
    return "\n\n".join([*parts, status.sentence(status.verified(), gpu)])


def generated(page: str, script: str, body: str) -> str:
    """A page with ``body`` as what a script of this folder has made."""
    begin, end = f"<!-- generated by benchmarks/{script} -->", "<!-- end of generated -->"
    before, rest = page.split(begin)
    after = rest.split(end)[1]
    return f"{before}{begin}\n\n{body}\n\n{end}{after}"


def pages() -> dict[Path, str]:
    """What the pages with a generated part should be."""
    bodies = {README: readme_body(), BACKENDS: "\n".join(status.backends(status.verified()))}
    return {path: generated(path.read_text(), "report.py", body) for path, body in bodies.items()}


def main() -> int:
    """Write, or with ``--check`` say whether anything would change."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 if a page would change")
    options = parser.parse_args()
    changed = {path: text for path, text in pages().items() if path.read_text() != text}
    if options.check:
        for path in changed:
            print(f"{path.relative_to(ROOT)} is out of date: run `make readme`", file=sys.stderr)
        return int(bool(changed))
    for path, text in changed.items():
        path.write_text(text)
    from plots import plot  # not for a check, which needs no matplotlib

    contents = load()
    shown = [
        name
        for name in MEANING
        if any("median" in c["results"].get(name, {}).get("diffsort", {}) for c in contents)
    ]
    plot(contents, shown, PLOT)
    print("wrote", *(path.relative_to(ROOT) for path in (*changed, PLOT)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
