"""Part 2: one training step of part 1, with fmkernels and built on the diffsort package."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from fmkernels.demo import comparison
from fmkernels.demo.report import is_there, table
from fmkernels.demo.timing import spare_threads


def run(console: Console) -> bool:
    """Compare; whether both give the same loss and gradient, or diffsort is missing."""
    console.print("The same step built on diffsort")
    if not is_there(console, "diffsort", "diffsort"):
        return True
    with console.status("comparing, some ten seconds"), spare_threads() as note:
        result = comparison.compare()
    console.print(_table(result))
    if note:
        console.print(f"{note}: waiting for a second\n   slows diffsort's small steps most.")
    return result.gradient_difference < 1e-9  # both in float64


def _table(result: comparison.Comparison) -> Table:
    times = result.times
    found = table(
        f"forward + backward, {comparison.ROWS} queries of n = {comparison.SIZE}",
        f"diffsort {result.diffsort_version}",
        "fmkernels",
        "",
        caption=f"medians of {times.pairs} interleaved pairs; memory in fresh processes",
    )
    theirs, ours = result.diffsort, result.fmkernels
    found.add_row("loss (float64)", f"{theirs.loss:.12f}", f"{ours.loss:.12f}", "")
    found.add_row(
        "gradient, largest difference (float64)", "", "", f"{result.gradient_difference:.0e}"
    )
    found.add_row(
        "time of a step (float32)",
        f"{times.theirs * 1e3:.1f} ms",
        f"{times.ours * 1e3:.2f} ms",
        f"{times.speed_ratio:.0f} × faster",
    )
    if theirs.peak_bytes is None or ours.peak_bytes is None:
        found.add_row("peak extra memory", "", "", "measured on Linux only")
    else:
        found.add_row(
            "peak extra memory",
            f"{theirs.peak_bytes / 1e6:.0f} MB",
            f"{ours.peak_bytes / 1e6:.1f} MB",
            f"{ours.peak_bytes / theirs.peak_bytes:.1%}",
        )
    return found
