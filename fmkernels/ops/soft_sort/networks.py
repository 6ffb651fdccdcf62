"""Sorting networks: which wires are compared, layer by layer, and whether the result is sorted.

A network on n wires is a list of layers; a layer is a list of comparators ``(lo, hi)`` that
share no wire. After a hard comparator the smaller value is on ``lo`` and the larger on ``hi``;
a relaxed one mixes the two. A correct network leaves the values ascending from wire 0 to n - 1.

The wiring decides the *result* of a relaxed network, not only its speed: two correct networks
give different permutation matrices at a finite steepness. ``csrc/include/fmkernels/networks.h``
builds the same lists for the kernels; a test holds the two equal.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import numpy as np

Layer = tuple[tuple[int, ...], tuple[int, ...]]
"""The ``lo`` wires of a layer and, in the same order, their ``hi`` partners."""


def _layer(comparators: list[tuple[int, int]]) -> Layer:
    return tuple(lo for lo, _ in comparators), tuple(hi for _, hi in comparators)


def _bitonic(n: int) -> Iterator[Layer]:
    """diffsort's wiring: the n wires are the top n of N = 2^ceil(log2 n).

    Blocks of 2, 4, ..., N wires are merged, alternately ascending and descending. A comparator
    that touches one of the N - n missing wires is dropped, which is why it fails for some n.
    """
    depth = (n - 1).bit_length()
    missing = 2**depth - n
    for block in range(depth):
        for stage in range(block + 1):
            distance = 2 ** (block - stage)
            comparators = []
            for wire in range(missing, 2**depth - distance):
                if wire & distance:
                    continue
                a, b = wire - missing, wire + distance - missing
                descending = (wire >> (block + 1)) & 1
                comparators.append((b, a) if descending else (a, b))
            yield _layer(comparators)


def _reflected_bitonic(n: int) -> Iterator[Layer]:
    """Bitonic merges whose first layer pairs each wire with its mirror: all comparators ascend.

    Missing wires are the last ones and would hold +inf, which no ascending comparator moves, so
    dropping their comparators is exact and every n sorts.
    """
    depth = (n - 1).bit_length()
    for block in range(depth):
        mirror = 2 ** (block + 1) - 1
        yield _layer([(a, a ^ mirror) for a in range(n) if a < (a ^ mirror) < n])
        for stage in range(1, block + 1):
            distance = 2 ** (block - stage)
            yield _layer([(a, a + distance) for a in range(n - distance) if not a & distance])


def _odd_even_merge(n: int) -> Iterator[Layer]:
    """Batcher's odd-even merge sort: the fewest comparators of the four, and every n sorts."""
    depth = (n - 1).bit_length()
    for block in range(depth):
        size = 2 ** (block + 1)
        for stage in range(block + 1):
            distance = 2 ** (block - stage)
            first = distance % (size // 2)
            yield _layer(
                [
                    (a, a + distance)
                    for start in range(first, n - distance, 2 * distance)
                    for a in range(start, min(start + distance, n - distance))
                    if a // size == (a + distance) // size
                ]
            )


def _odd_even(n: int) -> Iterator[Layer]:
    """n layers of neighbours (brick wall): deep, but each wire only ever meets the next."""
    for layer in range(n):
        yield _layer([(a, a + 1) for a in range(layer % 2, n - 1, 2)])


_BUILDERS: dict[str, Callable[[int], Iterator[Layer]]] = {
    "bitonic": _bitonic,
    "reflected_bitonic": _reflected_bitonic,
    "odd_even_merge": _odd_even_merge,
    "odd_even": _odd_even,
}

NETWORKS = tuple(_BUILDERS)


@functools.lru_cache(maxsize=64)
def layers(network: str, n: int) -> tuple[Layer, ...]:
    """The layers of ``network`` on ``n`` wires; layers without a comparator are left out."""
    return tuple(layer for layer in _BUILDERS[network](n) if layer[0])


@functools.lru_cache(maxsize=4096)
def sorts(network: str, n: int) -> bool:
    """Whether the network sorts every input of length ``n``, decided by the 0-1 principle.

    Only ``bitonic`` can fail. Its blocks are independent until they are merged, and all of them
    but one are complete bitonic sorters; so it is enough to follow the set of 0-1 patterns that
    can leave the one block with missing wires, merged each time with the sorted patterns of its
    complete neighbour. That is exact, and polynomial where all 2^n patterns are not.

    Once a pattern leaves the block unsorted, a few such patterns are followed to the end first:
    one that stays unsorted settles the question (so far, one always did).
    """
    if network != "bitonic" or n & (n - 1) == 0:
        return True
    for follow in (64, None):
        patterns, complete = _output_patterns(n, follow)
        if _unsorted(patterns, descending=False).any():
            return False
        if complete:
            break
    return True


def _output_patterns(n: int, follow: int | None) -> tuple[np.ndarray, bool]:
    """0-1 patterns (patterns, n) that leave ``bitonic``, and whether they are all of them.

    As soon as a block is left unsorted, at most ``follow`` of its unsorted patterns are kept.
    """
    depth = (n - 1).bit_length()
    missing = 2**depth - n
    patterns = np.array([[False], [True]])  # (patterns, present wires of the partial block)
    complete = True
    for block in range(depth):
        size = 2 ** (block + 1)
        end = (missing // size + 1) * size  # the partial block is wires missing .. end - 1
        gained = end - missing - patterns.shape[1]  # wires of the complete upper half, if it joins
        partner = np.arange(gained)[None, :] < np.arange(gained + 1)[:, None]  # sorted downwards
        rows = max(1, 2**24 // ((gained + 1) * (end - missing)))  # bounds the memory
        merged = [
            _merge_patterns(patterns[first : first + rows], partner, missing, block, follow)
            for first in range(0, len(patterns), rows)
        ]
        patterns = np.unique(np.concatenate(merged), axis=0)
        unsorted = _unsorted(patterns, descending=bool((missing // size) & 1))
        if follow is not None and unsorted.any():
            patterns, complete = patterns[unsorted][:follow], False
    return patterns, complete


def _unsorted(patterns: np.ndarray, *, descending: bool) -> np.ndarray:
    if descending:
        patterns = patterns[:, ::-1]
    falls: np.ndarray = np.any(patterns[:, :-1] > patterns[:, 1:], axis=1)
    return falls


def _merge_patterns(
    patterns: np.ndarray, partner: np.ndarray, missing: int, block: int, follow: int | None
) -> np.ndarray:
    """The distinct results of one bitonic merge of every pattern with every partner.

    If any are unsorted and ``follow`` is given, only the first ``follow`` of those.
    """
    cases = len(patterns) * len(partner)
    state = np.concatenate(
        [np.repeat(patterns, len(partner), axis=0).T, np.tile(partner, (len(patterns), 1)).T]
    )
    wires = len(state)
    state = np.packbits(state, axis=1)  # (wires, cases / 8): eight cases in one byte
    descending = (missing >> (block + 1)) & 1
    for stage in range(block + 1):
        distance = 2 ** (block - stage)
        wire = np.arange(missing, missing + wires - distance)
        a = wire[(wire & distance) == 0] - missing
        b = a + distance
        lo, hi = (b, a) if descending else (a, b)
        state[lo], state[hi] = state[a] & state[b], state[a] | state[b]
    upwards = state[::-1] if descending else state
    unsorted = np.bitwise_or.reduce(upwards[:-1] & ~upwards[1:], axis=0)
    if not unsorted.any():  # one pattern per number of ones
        ones = np.unique(patterns.sum(axis=1)[:, None] + partner.sum(axis=1)[None, :])
        sorted_up = np.arange(wires)[None, :] >= wires - ones[:, None]
        return sorted_up[:, ::-1] if descending else sorted_up
    if follow is not None:
        state = state[:, np.flatnonzero(unsorted)[:follow]]
        cases = min(cases, 8 * state.shape[1])
    return np.unique(np.unpackbits(state, axis=1, count=cases).T.astype(bool), axis=0)
