"""Part 3: scenes of digits segmented by retrieval, before and after NeCo post-pretraining."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from fmkernels.demo import in_context
from fmkernels.demo.report import is_there, table
from fmkernels.demo.timing import threads

STEPS, NECO_STEPS = 250, 40
"""As in examples/in_context_segmentation.py, of whose seeds this is the first."""


def run(console: Console, pictures: Path | None) -> bool:
    """Train, segment, draw; whether pretrained tokens segment better than untrained ones."""
    console.print(
        "Scenes of digits are segmented by their nearest patches among labelled ones: no mask "
        "takes\n   part in the training"
    )
    if not is_there(console, "sklearn", "scikit-learn"):
        return True
    if pictures is not None and not is_there(console, "matplotlib", "matplotlib", "no pictures"):
        pictures = None
    with threads(1), console.status("training, about half a minute") as status:
        report = in_context.run(
            1, STEPS, NECO_STEPS, pictures=pictures, say=lambda line: status.update(line.strip())
        )
    sizes = table("patches in the memory", *(f"{size:,}" for size in report.by_size))
    sizes.add_row("mIoU of 7 classes, pretrained", *map("{:.3f}".format, report.by_size.values()))
    console.print(sizes)
    tokens = table(
        "a vision transformer of 0.1 million parameters",
        "mIoU",
        caption="one seed says little of NeCo",
    )
    tokens.add_row("untrained", f"{report.untrained[0]:.3f}")
    tokens.add_row(f"{STEPS} steps with a label per image", f"{report.before[0]:.3f}")
    tokens.add_row(f"then {NECO_STEPS} steps more of the same", f"{report.control[0]:.3f}")
    tokens.add_row(f"or {NECO_STEPS} steps of NeCoLoss, without labels", f"{report.after[0]:.3f}")
    console.print(tokens)
    for name in in_context.PICTURES if pictures is not None else ():
        console.print(f"   picture: {pictures / name}")  # type: ignore[operator]
    return report.before[0] > report.untrained[0]
