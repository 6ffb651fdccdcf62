"""The calls whose work is counted, what each must do at least, and an H200."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import status
from markdown import table, three
from sort.workloads import Sorting

from fmkernels.ops.soft_sort.networks import layers

# An H200. What is measured: the copy.
CAPABILITY, MULTIPROCESSORS, CLOCK = "9.0", 132, 1.75e9
COPY, LEVEL_2 = 4.3e12, 5.5e12  # bytes a second
FLOAT32 = 60e12  # operations a second, outside of the tensor cores
WARPS = 64  # that a multiprocessor holds
FLOAT = 4  # bytes

# Additions, multiplications and divisions, counted in csrc/include/fmkernels.
MIX, DIFFERENCE, UNMIX = 6, 1, 9  # soft_sort.h, of a comparator and a row
SORT_PAIR, SLOPE, SORT_PAIR_BACKWARD = 43, 5, 12  # of a comparator of the values; cauchy
CROSS_ENTROPY = 30  # of an entry: a division, a logarithm, the sums


@dataclass(frozen=True)
class Problem:
    """A call of one of the ops: a column of the tables. bitonic and cauchy, float32."""

    title: str
    op: str
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
        """Of a query, in and out: rows (scores, sorted values, gradients); P or its gradient, or
        the weight and the loss."""
        return FLOAT * (self.n * (2 + self.taped) + (self.n**2 if self.matrix else 2))

    @property
    def least_operations(self) -> int:
        """Of a query; those of benchmarks/sort/workloads.py."""
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

    def last_run(self, backend: str) -> str:
        """On a GPU."""
        return status.verified().get(self.op, {}).get(backend, "*unverified*")

    @property
    def floors(self) -> list[str]:
        """Of memory and arithmetic on an H200."""
        return [
            self.microseconds(self.bytes, COPY),
            self.microseconds(self.least_operations, FLOAT32),
        ]


FORWARD = Problem("`soft-sort-matrix`, forward", "soft_sort", 3136, 49, plain=1, matrix=True)
BACKWARD = Problem("backward", "soft_sort_backward", 3136, 49, taped=1, matrix=True)
LOSS = Problem(
    "`neco-step`, no gradient", "soft_sort_cross_entropy_loss", 31_360, 49, plain=2, chains=2
)
STEP = Problem("`neco-step`", "soft_sort_cross_entropy", 31_360, 49, plain=1, taped=1, chains=2)
FINE = Problem("`neco-196`", "soft_sort_cross_entropy", 12_544, 196, plain=1, taped=1, chains=2)
PROBLEMS = (FORWARD, BACKWARD, LOSS, STEP, FINE)


def transposed(problems: Sequence[Problem], columns: Sequence[dict[str, str]]) -> list[str]:
    """A table with a problem in each column."""
    rows = ((name, *(column[name] for column in columns)) for name in columns[0])
    return table(("", *(problem.title for problem in problems)), rows)


def size(problem: Problem) -> str:
    return f"{problem.queries:,} of {problem.n}"


def kilobytes(count: float) -> str:
    """Nothing for none."""
    return f"{three(count / 1e3)} kB" if count else ""
