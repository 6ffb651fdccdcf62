"""The demo: NeCo's loss at work on photographs, and measured beside diffsort.

``python -m fmkernels demo`` trains a small network for some ten seconds until it orders the
neighbours of photograph patches as its teacher does, draws that, and compares one training step
with the same step built on the installed diffsort package.
"""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fmkernels import __version__, _library, info
from fmkernels.demo import comparison, photographs, training

SHOWN = (("coffee", 8, 1), ("china", 11, 1), ("astronaut", 9, 4), ("rocket", 4, 2))
"""The queries of the picture: photograph, row and column among its held-out patches."""


def run(picture: Path | None, steps: int) -> int:
    """Train, draw, compare; the exit code is 0 if the training brought the orders together.

    Args:
        picture: where the PNG goes, or None for numbers only.
        steps: gradient steps.
    """
    console = Console(width=None if Console().is_terminal else 100)
    start = time.perf_counter()
    torch.manual_seed(0)
    photos = photographs.load()
    if not photos:
        console.print("demo: no photographs: pip install scikit-learn scikit-image")
        return 1
    console.print(f"[bold]fmkernels {__version__}[/bold] on {machine()}\n")
    console.print(
        f"1. A student learns its teacher's order of neighbours: {steps} steps of "
        f"patch_neighbor_loss\n   on {len(photos)} photographs ({', '.join(photos)})"
    )
    experiment = training.Experiment(photos, steps)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are tiny: a second thread only waits
    shown = [(name, row, column) for name, row, column in SHOWN if name in photos]
    queries = torch.stack([photographs.held_out(photos[name])[r, c] for name, r, c in shown])
    before, order_before = experiment.evaluate(), experiment.order(queries)
    losses = _train(experiment, steps, console)
    after, order_after = experiment.evaluate(), experiment.order(queries)
    torch.set_num_threads(threads)
    console.print(_agreement_table(before, after))

    if picture is not None:
        orders = (order_before, order_after, experiment.order(queries, teacher=True))
        _draw(picture, experiment, (before, after), losses, shown, orders, console=console)

    console.print("2. The same step built on diffsort")
    if importlib.util.find_spec("diffsort") is None:
        console.print("   left out: diffsort is missing: pip install diffsort")
    else:
        with console.status("comparing, some ten seconds"):
            busy = comparison.busy_cores()
            torch.set_num_threads(1 if busy > 0.5 else threads)
            result = comparison.compare()
            torch.set_num_threads(threads)
        console.print(_comparison_table(result))
        if busy > 0.5:
            console.print(
                f"   Other programs use {busy:.1f} cores, so both ran on one thread: waiting for a "
                "second\n   slows diffsort's many small steps most. An idle machine gives a fair "
                "ratio."
            )
    console.print(f"Done in {time.perf_counter() - start:.0f} s.")
    return 0 if after.spearman > before.spearman else 1


def machine() -> str:
    """The processor, instruction set and threads that the figures hold for."""
    native = _library.native
    kernels = f"{native.cpu_isa()} kernels" if native else "no compiled kernels (the reference)"
    threads = torch.get_num_threads()
    return f"{info.cpu_model()}, {kernels}, {threads} threads, torch {torch.__version__}"


def _train(experiment: training.Experiment, steps: int, console: Console) -> list[float]:
    columns = TextColumn("   {task.description}"), BarColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("training", total=steps)
        losses = []
        for _ in range(steps):
            losses.append(experiment.step())
            progress.update(task, advance=1, description=f"loss {losses[-1]:.3f}")
    return losses


def _draw(path: Path, *contents: Any, console: Console) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        console.print("   no picture: matplotlib is missing: pip install matplotlib\n")
        return
    from fmkernels.demo import picture

    picture.draw(*contents).savefig(path, dpi=110)
    console.print(f"   picture: {path}\n")


def _agreement_table(before: training.Evaluation, after: training.Evaluation) -> Table:
    table = Table("held-out patches, student against teacher", "before", "after")
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row("loss", f"{before.loss:.3f}", f"{after.loss:.3f}")
    table.add_row("loss if student = teacher", f"{before.floor:.3f}", f"{after.floor:.3f}")
    table.add_row("rank correlation (Spearman)", f"{before.spearman:.2f}", f"{after.spearman:.2f}")
    table.add_row("shared among the 5 nearest", f"{before.top5:.0%}", f"{after.top5:.0%}")
    return table


def _comparison_table(result: comparison.Comparison) -> Table:
    table = Table(
        f"forward + backward, {comparison.ROWS} queries of n = {comparison.SIZE}",
        f"diffsort {result.diffsort_version}",
        "fmkernels",
        "",
        caption=f"medians of {result.pairs} interleaved pairs; memory in fresh processes",
        caption_justify="left",
    )
    for column in table.columns[1:]:
        column.justify = "right"
    theirs, ours = result.diffsort, result.fmkernels
    table.add_row("loss (float64)", f"{theirs.loss:.12f}", f"{ours.loss:.12f}", "")
    table.add_row(
        "gradient, largest difference (float64)", "", "", f"{result.gradient_difference:.0e}"
    )
    table.add_row(
        "time of a step (float32)",
        f"{theirs.seconds * 1e3:.1f} ms",
        f"{ours.seconds * 1e3:.2f} ms",
        f"{result.speed_ratio:.0f} × faster",
    )
    if theirs.peak_bytes is None or ours.peak_bytes is None:
        table.add_row("peak extra memory", "", "", "measured on Linux only")
    else:
        table.add_row(
            "peak extra memory",
            f"{theirs.peak_bytes / 1e6:.0f} MB",
            f"{ours.peak_bytes / 1e6:.1f} MB",
            f"{ours.peak_bytes / theirs.peak_bytes:.1%}",
        )
    return table
