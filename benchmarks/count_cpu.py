"""Counts what the CPU kernels do: csrc/cpu/soft_sort_kernel.cpp."""

from __future__ import annotations

from dataclasses import dataclass

from markdown import table, three
from problems import (
    CROSS_ENTROPY,
    FLOAT,
    PROBLEMS,
    SLOPE,
    SORT_PAIR,
    SORT_PAIR_BACKWARD,
    Problem,
    kilobytes,
    size,
    transposed,
)
from sort.workloads import Sorting
from walk import Walk

GROUP_ROWS = 4
"""max_group_rows of sorting_plan.h."""
AT_ONCE = 2
"""rows_at_once of soft_sort.h."""


@dataclass(frozen=True)
class Registers:
    """Instructions of a group of queries, one query in each lane: additions, multiplications and
    fused ones; loads from and stores to the level-1 cache."""

    arithmetic: int
    loads: int
    stores: int

    @property
    def cycles(self) -> float:
        """With two arithmetic instructions, two loads and one store a cycle."""
        return max(self.arithmetic / 2, self.loads / 2, self.stores)


def arrays_of(n: int) -> dict[str, int]:
    """Registers of scratch of a thread."""
    walk = Walk("bitonic", n, GROUP_ROWS)
    return {
        "values, and their gradient": 2 * n,
        "four rows of P": GROUP_ROWS * n,
        "four rows of Q": GROUP_ROWS * n,
        "keep and swap of the student": 2 * walk.comparators,
        "keep and swap of the teacher": 2 * walk.comparators,
        "slope and elastic": 2 * walk.comparators,
        "gradient of keep": walk.comparators,
        "tape of four rows": GROUP_ROWS * walk.tape,
    }


def registers_of(problem: Problem) -> Registers:
    walk = Walk("bitonic", problem.n, GROUP_ROWS)
    forwards = problem.plain + problem.taped
    entries = problem.n**2
    chains = walk.comparators * problem.chains
    back = walk.comparators * problem.taped
    arithmetic = chains * SORT_PAIR + back * (SLOPE + SORT_PAIR_BACKWARD)
    loads, stores = 4 * chains + 7 * back, 6 * chains + 4 * back
    arithmetic += 0 if problem.matrix else CROSS_ENTROPY * entries
    loads += entries if problem.matrix else 2 * entries
    stores += entries * (forwards + (problem.matrix or problem.taped))  # cleared, then written
    for group in walk.groups:
        for segment, count in zip(walk.segments, group.visited, strict=True):
            met = count * segment.slots * group.rows
            state = met if segment.slots == 4 else 2 * met
            visits = count * segment.slots * max(1, group.rows // AT_ONCE)
            arithmetic += met * (4 * forwards + (1 + 6) * problem.taped)
            loads += (state + 2 * visits) * (forwards + problem.taped)
            stores += state * (forwards + problem.taped)
            loads += (met + count * segment.slots) * problem.taped  # tape, gradient of keep
            stores += (met + count * segment.slots) * problem.taped
    return Registers(arithmetic, loads, stores)


def tables() -> list[str]:
    return [*memory(), *transposed(PROBLEMS, [column(problem) for problem in PROBLEMS])]


def memory() -> list[str]:
    small, large = arrays_of(49), arrays_of(196)
    lanes = 8
    rows = [
        (name, *(kilobytes(FLOAT * lanes * arrays[name]) for arrays in (small, large)))
        for name in small
    ]
    for lanes in (4, 8, 16):
        totals = (FLOAT * lanes * sum(arrays.values()) for arrays in (small, large))
        rows.append((f"**all, {lanes} lanes**", *map(kilobytes, totals)))
    return table(("scratch of a thread, 8 lanes", "n = 49", "n = 196"), rows)


def column(problem: Problem) -> dict[str, str]:
    walk, registers = Walk("bitonic", problem.n, GROUP_ROWS), registers_of(problem)
    operations = problem.operations(walk.comparators, walk.met)
    share = problem.least_operations / (4 * registers.cycles)
    return {
        "queries": size(problem),
        "in and out through the memory, a query": f"{problem.bytes:,} bytes",
        "comparators that the rows meet: at least": f"{Sorting(1, problem.n).comparators_met():,}",
        "in groups of four rows": f"{walk.met:,}",
        "operations: at least": f"{problem.least_operations:,}",
        "done": f"{operations:,}",
        "operations for each byte": three(problem.least_operations / problem.bytes),
        "arithmetic instructions of a group of queries": f"{registers.arithmetic:,}",
        "loads, stores (level 1)": f"{registers.loads:,}, {registers.stores:,}",
        "cycles at least": f"{registers.cycles:,.0f}",
        "of the matmul rate, at most": f"{share:.0%}",
    }
