"""Part 1: a student learns its teacher's order of neighbours on photographs."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fmkernels.demo import photographs, training
from fmkernels.demo.report import is_there, table
from fmkernels.demo.timing import threads

SHOWN = (("coffee", 8, 1), ("china", 11, 1), ("astronaut", 9, 4), ("rocket", 4, 2))
"""The queries of the picture: photograph, row and column among its held-out patches."""
PICTURE = "neco_demo.png"


def run(console: Console, pictures: Path | None, steps: int) -> bool:
    """Train, evaluate and draw; whether the training brought the orders together."""
    photos = photographs.load()
    console.print(
        f"A student learns its teacher's order of neighbours: {steps} steps of "
        f"patch_neighbor_loss\n   on {len(photos)} photographs ({', '.join(photos)})"
    )
    torch.manual_seed(0)
    experiment = training.Experiment(photos, steps)
    shown = [(name, row, column) for name, row, column in SHOWN if name in photos]
    queries = torch.stack([photographs.held_out(photos[name])[r, c] for name, r, c in shown])
    with threads(1):  # the tensors are tiny: a second thread only waits
        before, order_before = experiment.evaluate(), experiment.order(queries)
        losses = _train(experiment, steps, console)
        after, order_after = experiment.evaluate(), experiment.order(queries)
    console.print(_agreement(before, after))
    if pictures is not None and is_there(console, "matplotlib", "matplotlib", "no picture"):
        from fmkernels.demo import picture

        orders = (order_before, order_after, experiment.order(queries, teacher=True))
        path = pictures / PICTURE
        figure = picture.draw(experiment, (before, after), losses, shown, orders)
        figure.savefig(path, dpi=110)
        console.print(f"   picture: {path}")
    return after.spearman > before.spearman


def _train(experiment: training.Experiment, steps: int, console: Console) -> list[float]:
    columns = TextColumn("   {task.description}"), BarColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("training", total=steps)
        losses = []
        for _ in range(steps):
            losses.append(experiment.step())
            progress.update(task, advance=1, description=f"loss {losses[-1]:.3f}")
    return losses


def _agreement(before: training.Evaluation, after: training.Evaluation) -> Table:
    found = table("held-out patches, student against teacher", "before", "after")
    found.add_row("loss", f"{before.loss:.3f}", f"{after.loss:.3f}")
    found.add_row("loss if student = teacher", f"{before.floor:.3f}", f"{after.floor:.3f}")
    found.add_row("rank correlation (Spearman)", f"{before.spearman:.2f}", f"{after.spearman:.2f}")
    found.add_row("shared among the 5 nearest", f"{before.top5:.0%}", f"{after.top5:.0%}")
    return found
