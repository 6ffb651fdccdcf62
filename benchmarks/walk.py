"""How the rows of X pass a sorting network in the kernels: the plan of networks.h, in Python."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from fmkernels.ops.soft_sort.networks import layers


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
    """The rows of X, up to ``most_rows`` at a time."""

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
