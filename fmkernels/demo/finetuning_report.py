"""Fine-tuning compared: learning rates by validation, accuracies over seeds, times and memory."""

from __future__ import annotations

import importlib.util
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fmkernels.demo import beside_peft
from fmkernels.demo.finetuning import METHODS, Problem, Training, fine_tune, scores

PEERS = ("VeRA by PEFT", "LoRA by PEFT")
NEEDED = "peft: pip install peft"


@dataclass
class Result:
    """Of one method."""

    rate: float
    accuracies: list[float] = field(default_factory=list)
    """On the examples to test, one for each seed."""
    step_s: list[float] = field(default_factory=list)
    """Medians of the same trainings."""
    parameters: int = 0
    peak_bytes: int | None = None

    def add(self, training: Training, accuracy: float) -> None:
        """Another seed's."""
        self.accuracies.append(accuracy)
        self.step_s.append(training.step_s)
        self.parameters = training.parameters


def has_peft() -> bool:
    """Whether PEFT's methods can take part."""
    return importlib.util.find_spec("peft") is not None


def compare(
    problem: Problem,
    seeds: int,
    *,
    methods: tuple[str, ...] = tuple(METHODS),
    rates: dict[str, float] | None = None,
    say: Callable[[str], object] = print,
) -> dict[str, Result]:
    """Train with every method and seed; the seeds take the methods in turn, for the times' sake.

    Args:
        problem: what is learnt.
        seeds: trainings of each method, with other new layers and other batches.
        methods: which; those of PEFT are left out without it.
        rates: learning rates that are known; by default each method's best on the validation set
            with seed 0, of ``problem.rates``.
        say: where the lines go.
    """
    methods = tuple(name for name in methods if name not in PEERS or has_peft())
    known = dict(rates or {})
    for name in methods:
        if name not in known and name != "VeRA by PEFT":
            known[name] = choose_rate(problem, name)
            say(f"{problem.name}: {name}: learning rate {known[name]:g}")
    known.setdefault("VeRA by PEFT", known["VeRA"])
    results = {name: Result(known[name]) for name in methods}
    for seed in range(seeds):
        for name, result in results.items():
            training = fine_tune(problem, name, result.rate, seed)
            result.add(training, scores(training.model, problem.test)[0])
        accuracies = ", ".join(f"{r.accuracies[-1]:.1%} {n}" for n, r in results.items())
        say(f"{problem.name}: seed {seed}: {accuracies}")
    return results


def choose_rate(problem: Problem, method: str) -> float:
    """By accuracy on the validation set after a training with seed 0, then by the loss."""

    def quality(rate: float) -> tuple[float, float]:
        accuracy, loss = scores(fine_tune(problem, method, rate, 0).model, problem.validation)
        return accuracy, -loss

    return max(problem.rates[method], key=quality)


def measure_memory(problem: str, results: dict[str, Result]) -> None:
    """The rise of a fresh process's peak over its first three steps, for every method (Linux)."""
    script = Path(__file__).with_name("finetuning_memory.py")
    for name, result in results.items():
        command = [sys.executable, str(script), problem, name]
        found = subprocess.run(command, capture_output=True, text=True)
        result.peak_bytes = int(found.stdout) if found.returncode == 0 else None


HEADINGS = (
    "trained", "accuracy in %", "parameters", "ms per step", "peak extra memory", "learning rate",
)  # fmt: skip


def rows(results: dict[str, Result]) -> list[list[str]]:
    """Cells of text, headings first; a line for PEFT if it is missing."""
    found = [list(HEADINGS)]
    for name, result in results.items():
        peak = "" if result.peak_bytes is None else f"{result.peak_bytes / 1e6:,.0f} MB"
        milliseconds = 1e3 * statistics.median(result.step_s)
        cells = [spread(result.accuracies), f"{result.parameters:,}", f"{milliseconds:,.1f}"]
        found.append([name, *cells, peak, f"{result.rate:g}"])
    if not has_peft():
        found += [[name, f"needs {NEEDED}", "", "", "", ""] for name in PEERS]
    return found


def spread(values: list[float]) -> str:
    """Mean in percent, and the deviation over seeds where there are several."""
    mean = f"{100 * statistics.mean(values):.1f}"
    return mean if len(values) < 2 else f"{mean} ± {100 * statistics.stdev(values):.1f}"


def as_markdown(lines: list[list[str]]) -> str:
    """A table for a terminal and for a page."""
    headings, *others = lines
    rule = ["---", *["--:"] * (len(headings) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (headings, rule, *others))


def print_comparison(problem: Problem, seeds: int, *, memory: bool) -> dict[str, Result]:
    """All methods in one table, and how near to PEFT's the losses are; what the examples show."""
    results = compare(problem, seeds)
    if memory:
        measure_memory(problem.name, results)
    print("\n" + as_markdown(rows(results)))
    if has_peft():
        print("\n" + beside_peft.sentence(beside_peft.difference(problem, results["VeRA"].rate)))
    return results
