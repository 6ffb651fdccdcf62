"""Counts what the kernels of the sort do, from networks and launches, and writes docs/kernels."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from report import ROOT, generated, table, three
from workloads import Sorting

from fmkernels.ops.soft_sort.config import BlockPlan, Plan, block_plan, heuristic, launch_plan
from fmkernels.ops.soft_sort.networks import layers

PAGES = ROOT / "docs" / "kernels"

# An H200. What is measured: the copy.
CAPABILITY, MULTIPROCESSORS, CLOCK = "9.0", 132, 1.75e9
COPY, LEVEL_2 = 4.3e12, 5.5e12  # bytes a second
LEVEL_2_BYTES = 50e6
FLOAT32 = 60e12  # operations a second, outside of the tensor cores
SHARED_LIMITS = 232_448, 233_472  # bytes of a block, of a multiprocessor
WARPS = 64  # that a multiprocessor holds
SECTOR = 32  # bytes, the least that the level-2 cache is asked for
FLOAT = 4  # bytes

# Additions, multiplications and divisions, counted in csrc/include/fmkernels.
MIX, DIFFERENCE, UNMIX = 6, 1, 9  # soft_sort.h, of a comparator and a row
SORT_PAIR, SLOPE, SORT_PAIR_BACKWARD = 43, 5, 12  # of a comparator of the values; cauchy
CROSS_ENTROPY = 30  # of an entry: a division, a logarithm, the sums

# Estimates. Triton: cycles of a layer, which are those of a trip to the level-2 cache and of the
# shuffles. CUDA: cycles of a quad, a pair or a layer of the values; instructions of a comparator
# that a warp meets.
LAYER_CYCLES, STEP_CYCLES, INSTRUCTIONS = 300, 100, 10


@dataclass(frozen=True)
class Segment:
    """Comparators that can be done in any order: quads of ``slots`` = 4, or pairs, of 1."""

    slots: int
    members: tuple[tuple[int, ...], ...]
    """Their wires."""


def segments(network: str, n: int) -> Iterator[Segment]:
    """Two layers at a time: the quads, then what is left of each; as in networks.h."""
    wiring = [list(zip(lo, hi, strict=True)) for lo, hi in layers(network, n)]
    for upper, lower in itertools.zip_longest(wiring[::2], wiring[1::2], fillvalue=[]):
        above, below = ({w: pair for pair in layer for w in pair} for layer in (upper, lower))
        quads, taken = [], set()
        for pair in upper:
            a, b = (below.get(wire) for wire in pair)
            if pair in taken or a is None or b is None or a == b:
                continue
            c, d = sum(a) - pair[0], sum(b) - pair[1]  # their other wires
            if c in above and above[c] == above.get(d):
                quads.append((*pair, c, d))
                taken |= {pair, above[c], a, b}
        rest = [tuple(pair for pair in layer if pair not in taken) for layer in (upper, lower)]
        for slots, members in ((4, tuple(quads)), *((1, pairs) for pairs in rest)):
            if members:
                yield Segment(slots, members)


@dataclass(frozen=True)
class Group:
    """Rows of X that go through the network together."""

    rows: int
    visited: tuple[int, ...]
    """Of every segment, how many of its members."""


@dataclass(frozen=True)
class Walk:
    """How the rows of X pass a network, ``most_rows`` at a time; the plan of networks.h."""

    network: str
    n: int
    most_rows: int

    @cached_property
    def segments(self) -> list[Segment]:
        return list(segments(self.network, self.n))

    @cached_property
    def groups(self) -> list[Group]:
        missing = 0
        if self.network == "bitonic":  # its blocks begin at odd places
            missing = (1 << (self.n - 1).bit_length()) - self.n
        found, first = [], 0
        while first < self.n:
            rows = self.most_rows
            while first + rows > self.n or (first + missing) % rows:
                rows //= 2
            found.append(Group(rows, self._visited(set(range(first, first + rows)))))
            first += rows
        return found

    def _visited(self, reached: set[int]) -> tuple[int, ...]:
        counts = []
        for segment in self.segments:
            met = []
            for index, wires in enumerate(segment.members):
                if not reached.isdisjoint(wires):
                    reached.update(wires)
                    met.append(index)
            counts.append(met[-1] + 1 - met[0] if met else 0)  # one range
        return tuple(counts)

    def comparators_met(self, group: Group) -> int:
        return sum(s.slots * count for s, count in zip(self.segments, group.visited, strict=True))

    @property
    def comparators(self) -> int:
        return sum(segment.slots * len(segment.members) for segment in self.segments)

    @property
    def tape(self) -> int:
        """The longest of a group."""
        return max(map(self.comparators_met, self.groups))

    @property
    def met(self) -> int:
        """Comparators, over all rows."""
        return sum(group.rows * self.comparators_met(group) for group in self.groups)


@dataclass(frozen=True)
class Problem:
    """A call of one of the ops: a column of the tables. bitonic and cauchy, float32."""

    title: str
    queries: int
    n: int
    plain: int = 0
    """Times that a row goes forward through the network without a tape."""
    taped: int = 0
    """Times that it goes forward with one, and back."""
    chains: int = 1
    """Of values."""
    matrix: bool = False

    @property
    def depth(self) -> int:
        return len(layers("bitonic", self.n))

    @property
    def bytes(self) -> int:
        """Of a query, in and out: rows (scores, sorted values, gradients); P or its gradient; the
        weight and the loss."""
        if self.matrix:
            return FLOAT * (self.n * (2 + self.taped) + self.n**2)
        return FLOAT * (3 * self.n + 2)

    @property
    def least_operations(self) -> int:
        """Of a query; those of benchmarks/workloads.py."""
        mix, mix_and_keep, go_back = Sorting.OPERATIONS
        work = mix * self.plain + (mix_and_keep + go_back) * self.taped
        return Sorting(1, self.n).comparators_met() * work

    def operations(self, comparators: int, met: int) -> int:
        """Of a query, by a kernel whose rows meet so many of the comparators."""
        rows = met * (MIX * (self.plain + self.taped) + (DIFFERENCE + UNMIX) * self.taped)
        values = SORT_PAIR * self.chains + (SLOPE + SORT_PAIR_BACKWARD) * self.taped
        entries = 0 if self.matrix else CROSS_ENTROPY * self.n**2
        return rows + comparators * values + entries

    def microseconds(self, amount: float, rate: float) -> str:
        """That all queries take, if one has such an ``amount`` of something; nothing for none."""
        return f"{three(1e6 * self.queries * amount / rate)} µs" if amount else ""

    @property
    def floors(self) -> list[str]:
        """Of memory and arithmetic on an H200."""
        return [
            self.microseconds(self.bytes, COPY),
            self.microseconds(self.least_operations, FLOAT32),
        ]


FORWARD = Problem("`soft-sort-matrix`, forward", 3136, 49, plain=1, matrix=True)
BACKWARD = Problem("backward", 3136, 49, taped=1, matrix=True)
STEP = Problem("`neco-step`", 31_360, 49, plain=1, taped=1, chains=2)
FINE = Problem("`neco-196`", 12_544, 196, plain=1, taped=1, chains=2)
PROBLEMS = (FORWARD, BACKWARD, STEP, FINE)


def transposed(problems: Sequence[Problem], columns: Sequence[dict[str, str]]) -> list[str]:
    """A table with a problem in each column."""
    rows = ((name, *(column[name] for column in columns)) for name in columns[0])
    return table(("", *(problem.title for problem in problems)), rows)


def size(problem: Problem) -> str:
    return f"{problem.queries:,} of {problem.n}"


def kilobytes(count: float) -> str:
    """Nothing for none."""
    return f"{three(count / 1e3)} kB" if count else ""


# ------------------------------------------------------------------------------------------- C++

CPU_ROWS = 4
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


def cpu_arrays(n: int) -> dict[str, int]:
    """Registers of scratch of a thread."""
    walk = Walk("bitonic", n, CPU_ROWS)
    return {
        "values, and their gradient": 2 * n,
        "four rows of P": CPU_ROWS * n,
        "four rows of Q": CPU_ROWS * n,
        "keep and swap of the student": 2 * walk.comparators,
        "keep and swap of the teacher": 2 * walk.comparators,
        "slope and elastic": 2 * walk.comparators,
        "gradient of keep": walk.comparators,
        "tape of four rows": CPU_ROWS * walk.tape,
    }


def cpu_registers(problem: Problem) -> Registers:
    walk = Walk("bitonic", problem.n, CPU_ROWS)
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


def cpu() -> list[str]:
    return [*cpu_memory(), *transposed(PROBLEMS, [cpu_column(problem) for problem in PROBLEMS])]


def cpu_memory() -> list[str]:
    small, large = cpu_arrays(49), cpu_arrays(196)
    lanes = 8
    rows = [
        (name, *(kilobytes(FLOAT * lanes * arrays[name]) for arrays in (small, large)))
        for name in small
    ]
    for lanes in (4, 8, 16):
        totals = (FLOAT * lanes * sum(arrays.values()) for arrays in (small, large))
        rows.append((f"**all, {lanes} lanes**", *map(kilobytes, totals)))
    return table(("scratch of a thread, 8 lanes", "n = 49", "n = 196"), rows)


def cpu_column(problem: Problem) -> dict[str, str]:
    walk, registers = Walk("bitonic", problem.n, CPU_ROWS), cpu_registers(problem)
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


# ---------------------------------------------------------------------------------------- Triton


def triton_plan(problem: Problem) -> Plan:
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


def triton_scratch(problem: Problem) -> Scratch:
    plan = triton_plan(problem)
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


def triton_operations(problem: Problem) -> int:
    """Of whole tiles: every wire mixes on its own, missing ones and those not reached, too."""
    plan = triton_plan(problem)
    passes = -(-problem.n // plan.config.rows)
    states = problem.depth * passes * plan.config.rows * plan.wires
    rows = states * (3 * (problem.plain + problem.taped) + (1 + 3 + 3) * problem.taped)
    wires = problem.depth * plan.wires
    values = SORT_PAIR * problem.chains + (SLOPE + SORT_PAIR_BACKWARD) * problem.taped
    entries = 0 if problem.matrix else CROSS_ENTROPY * passes * plan.config.rows * plan.wires
    return rows + wires * values + entries


def triton_scratch_rate(problem: Problem) -> float:
    """Of the level-2 cache; of the memory, if the slots do not fit there."""
    return LEVEL_2 if FLOAT * triton_plan(problem).workspace <= LEVEL_2_BYTES else COPY


def triton_waiting(problem: Problem) -> float:
    """Cycles of a multiprocessor for one query: layer after layer, its programs side by side."""
    config = triton_plan(problem).config
    passes = -(-problem.n // config.rows) * (problem.plain + 2 * problem.taped)
    layers_passed = problem.depth * (passes + problem.chains + problem.taped)
    return layers_passed * LAYER_CYCLES / config.programs_per_sm


def triton_milliseconds(problem: Problem) -> float:
    """Expected: the longer of scratch and waiting."""
    scratch = triton_scratch(problem).bytes / triton_scratch_rate(problem)
    waiting = triton_waiting(problem) / CLOCK / MULTIPROCESSORS
    return 1e3 * problem.queries * max(scratch, waiting)


def triton() -> list[str]:
    return [
        *triton_memory(),
        *transposed(PROBLEMS, [triton_column(problem) for problem in PROBLEMS]),
    ]


def triton_arrays(problem: Problem) -> dict[str, int]:
    """Bytes of a program's slot."""
    plan = triton_plan(problem)
    numbers = {
        "keep and swap of the teacher": 2,
        "keep, swap, slope, elastic of the student": 4,
        "gradient of keep": 1,
        "tape of R rows": plan.config.rows,
    }
    return {name: FLOAT * problem.depth * plan.wires * count for name, count in numbers.items()}


def triton_memory() -> list[str]:
    small, large = triton_arrays(STEP), triton_arrays(FINE)
    rows = [(name, kilobytes(small[name]), kilobytes(large[name])) for name in small]
    rows.append(("**slot**", *(kilobytes(sum(arrays.values())) for arrays in (small, large))))
    return table(("scratch of a program", "n = 49", "n = 196"), rows)


def triton_column(problem: Problem) -> dict[str, str]:
    plan, scratch, rate = (
        triton_plan(problem),
        triton_scratch(problem),
        triton_scratch_rate(problem),
    )
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
        "of whole tiles": f"{triton_operations(problem):,}",
        "**all queries:** floor of the memory": memory,
        "floor of the arithmetic": arithmetic,
        "arithmetic of whole tiles": problem.microseconds(triton_operations(problem), FLOAT32),
        "scratch": problem.microseconds(scratch.bytes, rate),
        "waiting": problem.microseconds(triton_waiting(problem), CLOCK * MULTIPROCESSORS),
        "**expected**": f"**{three(triton_milliseconds(problem))} ms**",
    }


# ------------------------------------------------------------------------------------------ CUDA

CUDA_PROBLEMS = PROBLEMS[:3]


def cuda_arrays(problem: Problem, rows: int) -> dict[str, int]:
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


def cuda_plan(problem: Problem) -> BlockPlan:
    def shared_bytes(rows: int) -> int:
        return sum(cuda_arrays(problem, rows).values())

    plan = block_plan(problem.queries, problem.n, *SHARED_LIMITS, shared_bytes, CAPABILITY)
    assert plan is not None
    return plan


@dataclass(frozen=True)
class Warps:
    """What the warps of a block do for one query."""

    met: int
    """Comparators, over the warps: the most that a lane meets in every segment."""
    steps: int
    """Quads and pairs, one after the other: of the slowest warp, over the passes."""


def cuda_warps(problem: Problem) -> Warps:
    walk, plan = Walk("bitonic", problem.n, 1), cuda_plan(problem)
    met = steps = 0
    for first in range(0, problem.n, plan.rows):
        rows = walk.groups[first : first + plan.rows]
        longest = 0
        for warp in (rows[lane : lane + 32] for lane in range(0, len(rows), 32)):
            counts = [max(counts) for counts in zip(*(row.visited for row in warp), strict=True)]
            met += sum(s.slots * count for s, count in zip(walk.segments, counts, strict=True))
            longest = max(longest, sum(counts))
        steps += longest
    return Warps(met, steps)


def cuda_shared_accesses(problem: Problem) -> int:
    """Of a query, by warps: a cycle each, if no two lanes want different lines of one bank."""
    warps, plan = cuda_warps(problem), cuda_plan(problem)
    comparators = Walk("bitonic", problem.n, 1).comparators
    forwards = problem.plain + problem.taped
    # two accesses to the state and one to the weights; the tape is written, read, and written
    rows = warps.met * (3 * (forwards + problem.taped) + 3 * problem.taped)
    sums = -(-comparators // 32) * problem.n * problem.taped
    entries = -(-plan.rows // 32) * problem.n * (forwards + (2 if problem.matrix else 3))
    # values: four numbers read and written, and the weights; slopes; back, two and the weights
    layer = 9 * problem.chains + (1 + 4 + 3) * problem.taped
    return rows + sums + entries + problem.depth * layer


def cuda_cycles(problem: Problem) -> dict[str, float]:
    """Of a multiprocessor for one query: what each of its units is busy for, and the waiting."""
    warps, plan = cuda_warps(problem), cuda_plan(problem)
    passes = problem.plain + 2 * problem.taped
    waits = warps.steps * passes + problem.depth * (1 + problem.taped)
    sectors = SECTOR * problem.n**2 * problem.matrix * problem.plain
    return {
        "memory": problem.bytes * CLOCK * MULTIPROCESSORS / COPY,
        "level 2": sectors * CLOCK * MULTIPROCESSORS / LEVEL_2,
        "shared memory": cuda_shared_accesses(problem),
        "instructions": warps.met * passes * INSTRUCTIONS / 4,
        "waiting": waits * STEP_CYCLES / plan.blocks_per_sm,
    }


def cuda_milliseconds(problem: Problem) -> float:
    """Expected: the longest of them."""
    longest = max(cuda_cycles(problem).values())
    return 1e3 * problem.queries * longest / MULTIPROCESSORS / CLOCK


def cuda() -> list[str]:
    columns = [cuda_column(problem) for problem in CUDA_PROBLEMS]
    return [*cuda_memory(), *transposed(CUDA_PROBLEMS, columns)]


def cuda_memory() -> list[str]:
    arrays = [cuda_arrays(problem, cuda_plan(problem).rows) for problem in CUDA_PROBLEMS]
    rows = [(name, *(kilobytes(a[name]) for a in arrays)) for name in arrays[2]]
    rows.append(("**block**", *(kilobytes(sum(a.values())) for a in arrays)))
    titles = (problem.title for problem in CUDA_PROBLEMS)
    return table(("shared memory of a block", *titles), rows)


def cuda_column(problem: Problem) -> dict[str, str]:
    plan, warps, cycles = cuda_plan(problem), cuda_warps(problem), cuda_cycles(problem)
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
        "quads and pairs of a row": f"{warps.steps:,}",
        "accesses of warps to shared memory": f"{cuda_shared_accesses(problem):,}",
        "**all queries:** floor of the memory": memory,
        "floor of the arithmetic": arithmetic,
        "level-2 cache": time("level 2"),
        "shared memory": time("shared memory"),
        "instructions": time("instructions"),
        "waiting": time("waiting"),
        "**expected**": f"**{three(cuda_milliseconds(problem))} ms**",
    }


def main() -> int:
    """Write, or with ``--check`` say whether anything would change."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 if a page would change")
    options = parser.parse_args()
    changed = []
    for make in (cpu, triton, cuda):
        page = PAGES / f"{make.__name__}.md"
        current = page.read_text()
        wanted = generated(current, "counts.py", "\n".join(make()).strip())
        if wanted != current:
            changed.append(page.relative_to(ROOT))
            if not options.check:
                page.write_text(wanted)
    if options.check and changed:
        print(f"out of date: {changed}; run `make readme`", file=sys.stderr)
    return int(options.check and bool(changed))


if __name__ == "__main__":
    sys.exit(main())
