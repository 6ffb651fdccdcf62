"""How the GPU kernels of the sort are launched: pure functions of sizes and device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fmkernels._tuned import tuned

MAX_TRITON_SIZE = 256
"""Longer rows are sorted by the reference."""

WORKSPACE_BYTES = 2**28
"""No launch takes more scratch memory than this."""


@dataclass(frozen=True)
class Config:
    """What can be tuned of a Triton kernel."""

    rows: int
    """R: rows of X that a program carries at the same time."""
    num_warps: int
    programs_per_sm: int

    @property
    def max_registers(self) -> int:
        """Of a thread, so that the programs share a multiprocessor's 65,536.

        Left alone, ptxas aims at fewer and spills one or two of them now and then.
        """
        return min(255, 65536 // (self.programs_per_sm * self.num_warps * 32))


@dataclass(frozen=True)
class Plan:
    """One launch: ``grid`` programs, each with a slot of the workspace; queries go round robin."""

    grid: int
    wires: int
    """n, rounded up to a power of two."""
    slot: int
    """Elements of float32 of a program's scratch."""
    config: Config

    @property
    def workspace(self) -> int:
        """Elements of float32 in all."""
        return self.grid * self.slot


WEIGHT_ARRAYS = 7
"""Per comparator: keep and swap of the teacher; keep, swap, slope, elastic, their gradient."""


ROWS = {16: 16, 32: 16, 64: 8, 128: 8, 256: 4}
"""By wires: tiles of 256 to 1,024 states, whose kernels need no stack within 128 registers.

At n = 49 the scratch is 81 KB, 43 MB for four programs on each of 132 multiprocessors, which the
50 MB of a level-2 cache hold; 16 rows would need 65 MB. Counted, not measured.
"""


def heuristic(n: int, capability: str | None = None) -> Config:
    """The configuration for rows of n values: measured on such a device, or counted.

    Args:
        n: values per row.
        capability: of the device, such as ``"9.0"``.
    """
    measured = tuned(capability, "soft_sort", "triton", str(padded(n)))
    if measured is not None:
        return Config(**measured)
    return Config(rows=ROWS[padded(n)], num_warps=4, programs_per_sm=4)


def padded(n: int) -> int:
    """The number of wires that the kernel pretends to have."""
    return max(16, 1 << (n - 1).bit_length())


def launch_plan(queries: int, n: int, layers: int, multiprocessors: int, config: Config) -> Plan:
    """The launch for so many queries of n values on a device.

    Args:
        queries: rows of scores; at least 1.
        n: values per row.
        layers: of the network.
        multiprocessors: of the device.
        config: the heuristic's, or one to be tried.
    """
    wires = padded(n)
    slot = max(1, layers) * wires * (WEIGHT_ARRAYS + config.rows)  # one value has no layer
    fitting = max(1, WORKSPACE_BYTES // (4 * slot))
    grid = min(queries, multiprocessors * config.programs_per_sm, fitting)
    return Plan(grid, wires, slot, config)


MAX_CUDA_SIZE = 128
"""Longer rows go to the Triton kernel."""

RESERVED_BYTES = 1024
"""Of shared memory, which the driver takes for every block."""

MAX_GRID = 2**31 - 1

MAX_THREADS = 128
"""Of a block; a phase with more items than threads takes them in turns."""


@dataclass(frozen=True)
class BlockPlan:
    """One launch of a CUDA kernel: a block sorts one query at a time, in its shared memory."""

    grid: int
    threads: int
    rows: int
    """Of X that a block carries at the same time, one per thread."""
    shared_bytes: int
    blocks_per_sm: int


def all_passes(n: int) -> range:
    """In how many passes a block may take the n rows of X.

    Fewer than 16 rows at a time would leave more than half of a warp idle.
    """
    return range(1, max(1, n // 16) + 1)


def block_plan(
    queries: int,
    n: int,
    block_limit: int,
    sm_limit: int,
    shared_bytes: Callable[[int], int],
    capability: str | None = None,
    *,
    with_teacher: bool = False,
) -> BlockPlan | None:
    """The launch for so many queries of n values, or None where no block is small enough.

    A block takes its rows in as many passes as were measured to be best on such a device, if it is
    small enough then; else in as few as keep most rows of X on a multiprocessor.

    Args:
        queries: rows of scores; at least 1.
        n: values per row.
        block_limit: shared bytes that a block may take on the device.
        sm_limit: shared bytes of a multiprocessor.
        shared_bytes: of a block that carries so many rows.
        capability: of the device, such as ``"9.0"``.
        with_teacher: its rows have threads of their own.
    """
    best, most = None, 0.0
    measured = tuned(capability, "soft_sort", "cuda", str(padded(n)))
    for passes in all_passes(n):
        rows = -(-n // passes)
        needed = shared_bytes(rows)
        if needed > block_limit:
            continue
        blocks = max(1, sm_limit // (needed + RESERVED_BYTES))
        resident = blocks * n / passes
        chosen = measured is not None and passes == measured["passes"]
        if resident > most or chosen:
            threads = -(-rows // 32) * 32 * (2 if with_teacher else 1)
            threads = min(MAX_THREADS, max(64, threads))
            best = BlockPlan(min(queries, MAX_GRID), threads, rows, needed, blocks)
            most = resident
        if chosen:
            break
    return best
