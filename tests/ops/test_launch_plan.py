"""Launches of the GPU kernels are values that need no GPU."""

from dataclasses import replace

import pytest

from fmkernels._tuned import TUNED
from fmkernels.ops.soft_sort.config import (
    MAX_GRID,
    MAX_TRITON_SIZE,
    RESERVED_BYTES,
    WORKSPACE_BYTES,
    Config,
    block_plan,
    heuristic,
    launch_plan,
    padded,
)
from fmkernels.ops.soft_sort.networks import NETWORKS, layers

H200 = 132
"""Multiprocessors."""


def test_the_canonical_step():
    plan = launch_plan(31_360, 49, len(layers("bitonic", 49)), H200, heuristic(49))
    assert plan.grid == 4 * H200
    assert plan.wires == 64
    assert plan.slot == 21 * 64 * (7 + 8)
    assert 4 * plan.workspace < 50e6  # an H200's level-2 cache


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("n", [1, 2, 16, 17, 64, 65, 128, MAX_TRITON_SIZE])
def test_every_size_has_a_plan_within_bounds(n, network):
    depth = len(layers(network, n))
    for queries in (1, 3, 31_360, 2**31 // n + 1, 2**40):
        plan = launch_plan(queries, n, depth, H200, heuristic(n))
        assert 1 <= plan.grid <= queries
        assert 4 * plan.workspace <= WORKSPACE_BYTES
        assert plan.wires >= n
        assert plan.slot >= depth * plan.wires * (7 + plan.config.rows)
        assert plan.slot < 2**31  # offsets inside of a slot are 32-bit
        assert plan.config.max_registers * plan.config.num_warps * 32 <= 65536
        assert plan.config.rows <= plan.wires


def test_work_does_not_change_the_scratch():
    sizes = (10**4, 10**6, 10**12)
    plans = [launch_plan(queries, 49, 21, H200, heuristic(49)) for queries in sizes]
    assert plans[0] == plans[1] == plans[2]


@pytest.fixture
def measured(monkeypatch):
    """Sets what was measured on a device of capability 9.9."""

    def measured(backend, wires, **values):
        monkeypatch.setitem(TUNED, "9.9", {"soft_sort": {backend: {str(wires): values}}})

    return measured


def test_what_was_measured_takes_the_place_of_what_was_counted(measured):
    measured("triton", 64, rows=4, num_warps=2, programs_per_sm=8)
    config = heuristic(49, "9.9")
    assert config == heuristic(64, "9.9") == Config(rows=4, num_warps=2, programs_per_sm=8)
    plan = launch_plan(10**6, 49, 21, 100, config)
    assert (plan.grid, plan.slot) == (800, 21 * 64 * (7 + 4))
    for counted in (heuristic(32, "9.9"), heuristic(32, "9.0"), heuristic(32)):
        assert counted == Config(rows=16, num_warps=4, programs_per_sm=4)


def test_measured_passes_are_taken_where_a_block_holds_them(measured):
    measured("cuda", 64, passes=3)
    plan = block_plan(9, 49, shared_bytes=shared_bytes, capability="9.9", **H100_BYTES)
    assert (plan.rows, plan.blocks_per_sm) == (17, 5)
    assert block_plan(9, 49, shared_bytes=shared_bytes, capability="9.0", **H100_BYTES).rows == 49
    measured("cuda", 64, passes=1)
    small = {"block_limit": 60_000, "sm_limit": 100_000, "shared_bytes": shared_bytes}
    assert block_plan(9, 49, capability="9.9", **small).rows == 17


def test_wires_are_powers_of_two():
    assert [padded(n) for n in (1, 16, 17, 49, 64, 256)] == [16, 16, 32, 64, 64, 256]


H100_BYTES = {"block_limit": 232_448, "sm_limit": 233_472}
"""Shared memory; an A100 has 166,912 and 167,936."""


def shared_bytes(rows):
    """Of the loss and its gradient at n = 49, bitonic."""
    lanes = -(-rows // 32) * 32
    return 4 * (7 * 483 + 270 * (rows | 1) + 2 * 49 * lanes + 5 * 49)


def test_a_block_of_the_canonical_step():
    plan = block_plan(31_360, 49, shared_bytes=shared_bytes, **H100_BYTES)
    assert (plan.rows, plan.threads, plan.blocks_per_sm) == (49, 64, 2)
    assert plan.grid == 31_360
    assert plan.shared_bytes == shared_bytes(49)
    beside = block_plan(31_360, 49, shared_bytes=shared_bytes, with_teacher=True, **H100_BYTES)
    assert beside == replace(plan, threads=128)


def test_rows_are_taken_in_passes_where_memory_is_short():
    plan = block_plan(1, 49, block_limit=60_000, sm_limit=100_000, shared_bytes=shared_bytes)
    assert (plan.rows, plan.blocks_per_sm) == (17, 2)
    assert plan.blocks_per_sm * (plan.shared_bytes + RESERVED_BYTES) <= 100_000
    assert block_plan(1, 49, 40_000, 100_000, shared_bytes) is None


def test_a_grid_is_never_larger_than_cuda_allows():
    assert block_plan(2**40, 49, shared_bytes=shared_bytes, **H100_BYTES).grid == MAX_GRID


def test_the_sizes_are_those_of_the_kernels():
    pytest.importorskip("fmkernels._cuda")
    from fmkernels.ops.soft_sort import cuda

    assert cuda.sizes("bitonic", 49) == (483, 270)
    for rows in (49, 25, 17):
        assert cuda._cuda.shared_bytes(49, 483, 270, rows, True, True) == shared_bytes(rows)
