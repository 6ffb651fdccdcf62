"""Counts what the Triton kernels do: fmkernels/ops/soft_sort/triton.py, launched on an H200."""

from __future__ import annotations

from dataclasses import dataclass

from markdown import table, three
from problems import (
    CAPABILITY,
    CLOCK,
    COPY,
    CROSS_ENTROPY,
    FINE,
    FLOAT,
    FLOAT32,
    LEVEL_2,
    MULTIPROCESSORS,
    PROBLEMS,
    SLOPE,
    SORT_PAIR,
    SORT_PAIR_BACKWARD,
    STEP,
    WARPS,
    Problem,
    kilobytes,
    size,
    transposed,
)

from fmkernels.ops.soft_sort.config import Plan, heuristic, launch_plan

LEVEL_2_BYTES = 50e6

LAYER_CYCLES = 300
"""An estimate, of a layer: a trip to the level-2 cache, and the shuffles."""


def plan_of(problem: Problem) -> Plan:
    config = heuristic(problem.n, CAPABILITY)
    return launch_plan(problem.queries, problem.n, problem.depth, MULTIPROCESSORS, config)


@dataclass(frozen=True)
class Scratch:
    """Bytes that a program reads from and writes to its slot, for one query."""

    tape: int
    weights: int
    values: int

    @property
    def bytes(self) -> int:
        return self.tape + self.weights + self.values


def scratch_of(problem: Problem) -> Scratch:
    plan = plan_of(problem)
    array = FLOAT * problem.depth * plan.wires  # one number for every layer and wire
    passes = -(-problem.n // plan.config.rows)
    forwards = problem.plain + problem.taped
    return Scratch(
        tape=array * passes * plan.config.rows * 2 * problem.taped,
        # keep and swap; back, the gradient of keep is read and written, too
        weights=array * passes * (2 * forwards + 4 * problem.taped),
        # keep and swap are written; slopes, too, and the gradient of keep cleared; all are read
        values=array * (2 * problem.chains + (2 + 1 + 5) * problem.taped),
    )


def operations(problem: Problem) -> int:
    """Of whole tiles: every wire mixes on its own, missing ones and those not reached, too."""
    plan = plan_of(problem)
    passes = -(-problem.n // plan.config.rows)
    states = problem.depth * passes * plan.config.rows * plan.wires
    rows = states * (3 * (problem.plain + problem.taped) + (1 + 3 + 3) * problem.taped)
    wires = problem.depth * plan.wires
    values = SORT_PAIR * problem.chains + (SLOPE + SORT_PAIR_BACKWARD) * problem.taped
    entries = 0 if problem.matrix else CROSS_ENTROPY * passes * plan.config.rows * plan.wires
    return rows + wires * values + entries


def scratch_rate(problem: Problem) -> float:
    """Of the level-2 cache; of the memory, if the slots do not fit there."""
    return LEVEL_2 if FLOAT * plan_of(problem).workspace <= LEVEL_2_BYTES else COPY


def waiting(problem: Problem) -> float:
    """Cycles of a multiprocessor for one query: layer after layer, its programs side by side."""
    config = plan_of(problem).config
    passes = -(-problem.n // config.rows) * (problem.plain + 2 * problem.taped)
    layers_passed = problem.depth * (passes + problem.chains + problem.taped)
    return layers_passed * LAYER_CYCLES / config.programs_per_sm


def milliseconds(problem: Problem) -> float:
    """Expected: the longer of scratch and waiting."""
    scratch = scratch_of(problem).bytes / scratch_rate(problem)
    layer_by_layer = waiting(problem) / CLOCK / MULTIPROCESSORS
    return 1e3 * problem.queries * max(scratch, layer_by_layer)


def tables() -> list[str]:
    return [*memory(), *transposed(PROBLEMS, [column(problem) for problem in PROBLEMS])]


def arrays_of(problem: Problem) -> dict[str, int]:
    """Bytes of a program's slot."""
    plan = plan_of(problem)
    numbers = {
        "keep and swap of the teacher": 2,
        "keep, swap, slope, elastic of the student": 4,
        "gradient of keep": 1,
        "tape of R rows": plan.config.rows,
    }
    return {name: FLOAT * problem.depth * plan.wires * count for name, count in numbers.items()}


def memory() -> list[str]:
    small, large = arrays_of(STEP), arrays_of(FINE)
    rows = [(name, kilobytes(small[name]), kilobytes(large[name])) for name in small]
    rows.append(("**slot**", *(kilobytes(sum(arrays.values())) for arrays in (small, large))))
    return table(("scratch of a program", "n = 49", "n = 196"), rows)


def column(problem: Problem) -> dict[str, str]:
    plan, scratch = plan_of(problem), scratch_of(problem)
    resident = plan.config.programs_per_sm * plan.config.num_warps
    memory, arithmetic = problem.floors
    return {
        "queries": size(problem),
        "wires, rows R": f"{plan.wires}, {plan.config.rows}",
        "programs, of so many warps": f"{plan.grid}, {plan.config.num_warps}",
        "occupancy": f"{resident} of {WARPS} warps",
        "scratch of all programs": f"{three(FLOAT * plan.workspace / 1e6)} MB",
        "in and out through the memory, a query": f"{problem.bytes:,} bytes",
        "scratch, a query: tape, written and read": kilobytes(scratch.tape),
        "weights, for every R rows": kilobytes(scratch.weights),
        "values, there and back": kilobytes(scratch.values),
        "operations: at least": f"{problem.least_operations:,}",
        "of whole tiles": f"{operations(problem):,}",
        "**all queries:** floor of the memory": memory,
        "floor of the arithmetic": arithmetic,
        "arithmetic of whole tiles": problem.microseconds(operations(problem), FLOAT32),
        "scratch": problem.microseconds(scratch.bytes, scratch_rate(problem)),
        "waiting": problem.microseconds(waiting(problem), CLOCK * MULTIPROCESSORS),
        "**expected**": f"**{three(milliseconds(problem))} ms**",
        "last run on a GPU": problem.last_run("triton"),
    }
