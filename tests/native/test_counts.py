"""What the pages of docs/kernels count is what the kernels do: plans, scratch, shared memory."""

import json
from pathlib import Path

import numpy as np
import pytest

from fmkernels.ops.soft_sort.networks import NETWORKS, sorts

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("most_rows", [1, 4])
def test_rows_walk_as_in_the_plan(native, network, most_rows):
    from walk import Walk

    for n in (1, 2, 7, 16, 33, 49, 64, 100, 196):
        if not sorts(network, n):
            continue
        walk = Walk(network, n, most_rows)
        packed = native.packed_plan(network, n, most_rows)
        _, comparators, _, segments, groups, tape, quads, pairs = packed[:8]
        assert (walk.comparators, walk.tape) == (comparators, tape)
        assert sum(len(s.members) for s in walk.segments) == quads + pairs
        rest, active = np.split(np.array(packed), [len(packed) - 3 * groups * segments])
        rows = rest[-2 * groups :].reshape(groups, 2)[:, 1]
        assert [group.rows for group in walk.groups] == rows.tolist()
        active = active.reshape(groups, segments, 3)
        visited = (active[..., 1] - active[..., 0]).tolist()
        assert [list(group.visited) for group in walk.groups] == visited


@pytest.mark.parametrize("n", [49, 196])
def test_scratch_of_a_thread(native, n):
    import count_cpu

    for register_bytes in (16, 32, 64):
        counted = sum(count_cpu.arrays_of(n).values()) * register_bytes
        assert native.scratch_bytes("bitonic", n, register_bytes) == counted


def test_shared_memory_of_a_block():
    import count_cuda
    from walk import Walk

    _cuda = pytest.importorskip("fmkernels._cuda")
    for problem in count_cuda.PROBLEMS:
        walk = Walk("bitonic", problem.n, 1)
        kind = (problem.chains == 2, problem.taped > 0)
        for rows in (17, 25, 49):
            counted = sum(count_cuda.arrays_of(problem, rows).values())
            sizes = (problem.n, walk.comparators, walk.tape, rows)
            assert _cuda.shared_bytes(*sizes, *kind) == counted


def test_slot_of_a_program():
    import count_triton

    for problem in count_triton.PROBLEMS:
        counted = sum(count_triton.arrays_of(problem).values())
        assert 4 * count_triton.plan_of(problem).slot == counted


def test_the_order_of_the_gpu_kernels_is_that_of_the_counts():
    import count_cuda
    import count_triton
    from problems import STEP

    order = json.loads((ROOT / "fmkernels" / "configs" / "gpu_order.json").read_text())
    expected = {
        "cuda": count_cuda.milliseconds(STEP),
        "triton": count_triton.milliseconds(STEP),
    }
    if order["basis"] == "measured":
        pytest.skip("a GPU has decided")
    assert order["ms"] == {name: round(ms, 1) for name, ms in expected.items()}
    assert order["order"] == sorted(expected, key=expected.get)


def test_the_wiring_in_the_cuda_page(native):
    kilobytes = 4 * len(native.packed_plan("bitonic", 49, 1)) / 1e3
    assert f"of {kilobytes:.0f} kB for all blocks" in (ROOT / "docs/kernels/cuda.md").read_text()
