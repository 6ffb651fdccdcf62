"""Part 6: two encoders fine-tuned by VeRA, DVoRA, LoRA and whole, and losses beside PEFT's."""

from __future__ import annotations

from rich.console import Console

from fmkernels.demo import beside_peft, finetuning_report, new_digits, text_encoder
from fmkernels.demo.finetuning import ALONE, METHODS, Problem
from fmkernels.demo.report import is_there, table
from fmkernels.demo.timing import threads

DIGITS_RATES = {
    ALONE: 1e-1, "VeRA": 1e-1, "DVoRA": 1e-1, "LoRA by PEFT": 3e-3, "everything": 1e-3,
}  # fmt: skip
TEXT_RATES = {ALONE: 3e-2, "VeRA": 1e-1}
"""As examples/finetune_vit.py and examples/finetune_text.py find them by validation."""
EXACT = 1e-9


def run(console: Console) -> bool:
    """Fine-tune; whether VeRA beats a new layer alone, and computes what PEFT's VeRA computes."""
    console.print(
        "Encoders are fine-tuned by VeRA: two vectors for each layer, between random matrices that "
        "all\n   layers share"
    )
    if not is_there(console, "sklearn", "scikit-learn"):
        return True
    with threads(1), console.status("training a vision transformer, on the digits 0 to 4"):
        problem = new_digits.problem()
    good = _show(console, problem, DIGITS_RATES, "digits 5 to 9")
    if finetuning_report.has_peft():
        with threads(1):
            found = beside_peft.difference(problem, DIGITS_RATES["VeRA"])
        console.print("   " + beside_peft.sentence(found))
        good = good and found.float64 <= EXACT
    if not is_there(console, "transformers", "transformers", "no text"):
        return good
    path = text_encoder.folder()
    if path is None:
        console.print(f"   no text: its encoder is missing: {text_encoder.HOW_TO_GET_IT}")
        return good
    with console.status("reading docstrings"):
        text = text_encoder.problem(path)
    return _show(console, text, TEXT_RATES, "docstrings of 23 subpackages") and good


def _show(console: Console, problem: Problem, rates: dict[str, float], what: str) -> bool:
    methods = tuple(rates) if problem.name == "text" else tuple(METHODS)
    with threads(1), console.status(f"fine-tuning, {problem.steps} steps with each method"):
        results = finetuning_report.compare(
            problem, 1, methods=methods, rates=rates, say=lambda line: None
        )
    lines = [[*cells[:4]] for cells in finetuning_report.rows(results)]
    made = table(what, *lines[0][1:], caption="one seed: differences of less than 3 are chance")
    for cells in lines[1:]:
        made.add_row(*cells)
    console.print(made)
    return results["VeRA"].accuracies[0] > results[ALONE].accuracies[0]
