"""Part 5: digits get the labels of their nearest neighbours, by embeddings and by gradients."""

from __future__ import annotations

from rich.console import Console

from fmkernels.demo import gradient_features
from fmkernels.demo.report import is_there, table
from fmkernels.demo.timing import threads


def run(console: Console) -> bool:
    """Train, take gradients, classify; whether training without labels made better embeddings."""
    console.print(
        "Digits get the labels of their nearest neighbours, by embeddings and by FUNGI's "
        "gradients:\n   no label takes part in the training, nor in the losses"
    )
    if not is_there(console, "sklearn", "scikit-learn"):
        return True
    with threads(1), console.status("training, about half a minute") as status:
        report = gradient_features.run(1, gradient_features.STEPS, say=status.update)
    for headings, *rows in gradient_features.tables(report):
        made = table(*headings, caption="one seed: differences of less than 2 are chance")
        for row in rows:
            made.add_row(*row)
        console.print(made)
    return report.full["embedding"] > report.full["untrained embedding"]
