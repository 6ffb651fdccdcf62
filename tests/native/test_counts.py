"""What the pages of docs/kernels count is what the kernels do: plans, scratch, shared memory."""

import json
from pathlib import Path

import numpy as np
import pytest

from fmkernels.ops.soft_sort.networks import NETWORKS, sorts

ROOT = Path(__file__).parents[2]


@pytest.fixture
def counts(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import counts

    return counts


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("most_rows", [1, 4])
def test_rows_walk_as_in_the_plan(native, counts, network, most_rows):
    for n in (1, 2, 7, 16, 33, 49, 64, 100, 196):
        if not sorts(network, n):
            continue
        walk = counts.Walk(network, n, most_rows)
        packed = native.packed_plan(network, n, most_rows)
        _, comparators, _, segments, groups, tape, quads, pairs = packed[:8]
        assert (walk.comparators, walk.tape) == (comparators, tape)
        assert sum(len(s.members) for s in walk.segments) == quads + pairs
        active = np.array(packed[len(packed) - 3 * groups * segments :]).reshape(
            groups, segments, 3
        )
        rows = np.array(packed[len(packed) - 3 * groups * segments - 2 * groups :][: 2 * groups])
        assert [group.rows for group in walk.groups] == rows[1::2].tolist()
        visited = (active[..., 1] - active[..., 0]).tolist()
        assert [list(group.visited) for group in walk.groups] == visited


@pytest.mark.parametrize("n", [49, 196])
def test_scratch_of_a_thread(native, counts, n):
    for register_bytes in (16, 32, 64):
        counted = sum(counts.cpu_arrays(n).values()) * register_bytes
        assert native.scratch_bytes("bitonic", n, register_bytes) == counted


def test_shared_memory_of_a_block(counts):
    _cuda = pytest.importorskip("fmkernels._cuda")
    for problem in counts.CUDA_PROBLEMS:
        walk = counts.Walk("bitonic", problem.n, 1)
        kind = (problem.chains == 2, problem.taped > 0)
        for rows in (17, 25, 49):
            counted = sum(counts.cuda_arrays(problem, rows).values())
            sizes = (problem.n, walk.comparators, walk.tape, rows)
            assert _cuda.shared_bytes(*sizes, *kind) == counted


def test_slot_of_a_program(counts):
    for problem in counts.PROBLEMS:
        counted = sum(counts.triton_arrays(problem).values())
        assert 4 * counts.triton_plan(problem).slot == counted


def test_the_order_of_the_gpu_kernels_is_that_of_the_counts(counts):
    order = json.loads((ROOT / "fmkernels" / "configs" / "gpu_order.json").read_text())
    expected = {
        "cuda": counts.cuda_milliseconds(counts.STEP),
        "triton": counts.triton_milliseconds(counts.STEP),
    }
    assert order["ms"] == {name: round(ms, 1) for name, ms in expected.items()}
    assert order["order"] == sorted(expected, key=expected.get)
