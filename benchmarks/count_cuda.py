"""Counts what the CUDA kernels do: csrc/include/fmkernels/soft_sort_block.h, on an H200."""

from __future__ import annotations

from dataclasses import dataclass

from markdown import table, three
from problems import (
    CAPABILITY,
    CLOCK,
    COPY,
    FLOAT,
    LEVEL_2,
    MULTIPROCESSORS,
    WARPS,
    Problem,
    kilobytes,
    size,
    transposed,
)
from problems import PROBLEMS as ALL
from walk import Walk

from fmkernels.ops.soft_sort.config import BlockPlan, block_plan

SHARED_LIMITS = 232_448, 233_472  # bytes of a block, of a multiprocessor
SECTOR = 32  # bytes, the least that the level-2 cache is asked for

STEP_CYCLES, INSTRUCTIONS = 100, 10
"""Estimates: cycles of a step of a row or of a layer of the values; instructions of a comparator
that a warp meets."""

AT_ONCE = {4: 2, 1: 4}
"""Quads, and pairs, that a thread has in flight, by their slots; see soft_sort.h."""

PROBLEMS = ALL[:4]


def arrays_of(problem: Problem, rows: int) -> dict[str, int]:
    """Bytes of a block's shared memory: BlockMemory of soft_sort_block.h."""
    walk = Walk("bitonic", problem.n, 1)
    n, comparators, lanes = problem.n, walk.comparators, -(-rows // 32) * 32
    numbers = {
        "keep and swap": 2 * comparators * problem.chains,
        "slope and elastic": 2 * comparators * problem.taped,
        "gradient of keep": comparators * problem.taped,
        "tape": walk.tape * (rows | 1) * problem.taped,
        "state of the rows": n * lanes,
        "the teacher's": n * lanes * (problem.chains - 1),
        "values and what rounding took": 4 * n,
        "loss of every row": n,
    }
    return {name: FLOAT * count for name, count in numbers.items()}


def plan_of(problem: Problem) -> BlockPlan:
    def shared_bytes(rows: int) -> int:
        return sum(arrays_of(problem, rows).values())

    plan = block_plan(
        problem.queries,
        problem.n,
        *SHARED_LIMITS,
        shared_bytes,
        CAPABILITY,
        with_teacher=problem.chains == 2,
    )
    assert plan is not None
    return plan


@dataclass(frozen=True)
class Warps:
    """What the warps of a block do for one query."""

    met: int
    """Comparators, over the warps: the most that a lane meets in every segment."""
    steps: int
    """Quads and pairs, some at once: of the slowest warp, over the passes."""


def warps_of(problem: Problem) -> Warps:
    walk, plan = Walk("bitonic", problem.n, 1), plan_of(problem)
    met = steps = 0
    for first in range(0, problem.n, plan.rows):
        rows = walk.groups[first : first + plan.rows]
        longest = 0
        for warp in (rows[lane : lane + 32] for lane in range(0, len(rows), 32)):
            counts = [max(counts) for counts in zip(*(row.visited for row in warp), strict=True)]
            of_segments = list(zip((s.slots for s in walk.segments), counts, strict=True))
            met += sum(slots * count for slots, count in of_segments)
            steps_of_warp = (sum(divmod(count, AT_ONCE[slots])) for slots, count in of_segments)
            longest = max(longest, sum(steps_of_warp))
        steps += longest
    return Warps(met, steps)


def shared_accesses(problem: Problem) -> int:
    """Of a query, by warps: a cycle each, if no two lanes want different lines of one bank."""
    warps, plan = warps_of(problem), plan_of(problem)
    comparators = Walk("bitonic", problem.n, 1).comparators
    forwards = problem.plain + problem.taped
    # two accesses to the state and one to the weights; the tape is written, read, and written
    rows = warps.met * (3 * (forwards + problem.taped) + 3 * problem.taped)
    sums = -(-comparators // 32) * problem.n * problem.taped
    entries = (
        -(-plan.rows // 32) * problem.n * (forwards + (1 if problem.matrix else 2 + problem.taped))
    )
    # values: four numbers read and written, and the weights; slopes; back, two numbers read and
    # written, the weights, slopes and gradient of keep
    layer = 9 * problem.chains + (1 + 4 + 3) * problem.taped
    return rows + sums + entries + problem.depth * layer


def cycles_of(problem: Problem) -> dict[str, float]:
    """Of a multiprocessor for one query: what each of its units is busy for, and the waiting."""
    warps, plan = warps_of(problem), plan_of(problem)
    passes = problem.plain + 2 * problem.taped
    there_and_back = 1 + problem.taped  # the teacher's rows go there beside the student's
    waits = (warps.steps + problem.depth) * there_and_back
    sectors = SECTOR * problem.n**2 * problem.matrix * problem.plain
    return {
        "memory": problem.bytes * CLOCK * MULTIPROCESSORS / COPY,
        "level 2": sectors * CLOCK * MULTIPROCESSORS / LEVEL_2,
        "shared memory": shared_accesses(problem),
        "instructions": warps.met * passes * INSTRUCTIONS / 4,
        "waiting": waits * STEP_CYCLES / plan.blocks_per_sm,
    }


def milliseconds(problem: Problem) -> float:
    """Expected: the longest of them."""
    longest = max(cycles_of(problem).values())
    return 1e3 * problem.queries * longest / MULTIPROCESSORS / CLOCK


def tables() -> list[str]:
    return [*memory(), *transposed(PROBLEMS, [column(problem) for problem in PROBLEMS])]


def memory() -> list[str]:
    arrays = [arrays_of(problem, plan_of(problem).rows) for problem in PROBLEMS]
    rows = [(name, *(kilobytes(a[name]) for a in arrays)) for name in arrays[0]]
    rows.append(("**block**", *(kilobytes(sum(a.values())) for a in arrays)))
    titles = (problem.title for problem in PROBLEMS)
    return table(("shared memory of a block", *titles), rows)


def column(problem: Problem) -> dict[str, str]:
    plan, warps, cycles = plan_of(problem), warps_of(problem), cycles_of(problem)
    resident = plan.blocks_per_sm * plan.threads // 32
    memory, arithmetic = problem.floors

    def time(unit: str) -> str:
        return problem.microseconds(cycles[unit], CLOCK * MULTIPROCESSORS)

    return {
        "queries": size(problem),
        "rows at a time, threads": f"{plan.rows}, {plan.threads}",
        "blocks of a multiprocessor": f"{plan.blocks_per_sm}",
        "occupancy": f"{resident} of {WARPS} warps",
        "in and out through the memory, a query": f"{problem.bytes:,} bytes",
        "operations: at least": f"{problem.least_operations:,}",
        "comparators that warps meet": f"{warps.met:,}",
        "steps of a row": f"{warps.steps:,}",
        "accesses of warps to shared memory": f"{shared_accesses(problem):,}",
        "**all queries:** floor of the memory": memory,
        "floor of the arithmetic": arithmetic,
        "level-2 cache": time("level 2"),
        "shared memory": time("shared memory"),
        "instructions": time("instructions"),
        "waiting": time("waiting"),
        "**expected**": f"**{three(milliseconds(problem))} ms**",
        "last run on a GPU": problem.last_run("cuda"),
    }
