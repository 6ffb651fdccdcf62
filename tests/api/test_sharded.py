"""A bank in shards is searched as if one process had it; ranks that fail do not leave others hanging."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sharded_search
import torch

import fmkernels
from fmkernels import api

SUPPORT = Path(__file__).parent.parent / "support"


def start(program, world, folder, *more):
    environment = os.environ | {"PYTHONPATH": str(SUPPORT), "GLOO_SOCKET_IFNAME": "lo"}
    return [
        subprocess.Popen(
            [sys.executable, SUPPORT / program, str(rank), str(world), folder, *more],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]


@pytest.fixture(scope="module", params=[2, 3])
def results(request, tmp_path_factory):
    """What each of two or three processes has found."""
    world = request.param
    folder = tmp_path_factory.mktemp("sharded")
    processes = start("sharded_search.py", world, folder)
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * world, errors
    return [torch.load(folder / f"result{rank}.pt", weights_only=True) for rank in range(world)]


def test_every_rank_has_the_answer_of_one_process(results):
    searched = [result["searched"] for result in results]
    for name, sizes, kind, metric, k in sharded_search.cases(len(results)):
        bank = sharded_search.rows(kind, sum(sizes))
        expected = fmkernels.knn(sharded_search.queries(kind), bank, k, metric=metric)
        for found in searched:
            assert torch.equal(found[name][1], expected[1]), name
            assert torch.equal(found[name][0], expected[0]), name
    assert all(found["no queries"][1].shape == (0, 3) for found in searched)


def test_ties_are_across_shards():
    """Or the case above would show nothing: equal scores of rows in different shards."""
    sizes = (1, 1100, 2)
    bank = sharded_search.rows("ties", sum(sizes))
    scores, indices = fmkernels.knn(sharded_search.queries("ties"), bank, sum(sizes))
    shards = torch.bucketize(indices, torch.tensor(sizes).cumsum(0), right=True)
    ties = (scores[:, 1:] == scores[:, :-1]) & (shards[:, 1:] != shards[:, :-1])
    assert ties.any()


@pytest.mark.parametrize("results", [3], indirect=True)
def test_shards_of_any_kind(results):
    bank = sharded_search.rows("random", 90)
    expected = fmkernels.knn(bank[:6].view(2, 3, -1), bank, 7, metric="l2")
    for result in results:
        for found, one in zip(result["kinds"], expected, strict=True):
            assert torch.equal(found, one)


@pytest.mark.parametrize("results", [3], indirect=True)
def test_some_of_the_processes(results):
    bank = sharded_search.rows("random", 20)
    expected = fmkernels.knn(
        sharded_search.queries("random"), torch.cat([bank[1::3], bank[2::3]]), 4
    )
    for result in results[1:]:
        assert torch.equal(result["part"][1], expected[1])
    assert "expected one that this process is a member of" in results[0]["part"]


OF_ALL = {
    "k": r"ValueError: sharded_search: k: expected the same in every process, got 3 on rank 0 and 4 on rank 1",
    "metric": r"ValueError: sharded_search: metric: .* got cosine on rank 0 and l2 on rank 1",
    "shape": r"ValueError: sharded_search: queries: .* got \[10, 16\] on rank 0 and \[9, 16\] on rank 1",
    "dim": r"ValueError: sharded_search: queries: .* got \[10, 16\] on rank 0 and \[10, 8\] on rank 1",
    "numbers": r"ValueError: sharded_search: numbers in queries: expected the same",
    "dtype": r"ValueError: sharded_search: dtype of queries: .* got torch.float32 on rank 0",
    "none": r"ValueError: sharded_search: k: expected an integer >= 1, got 0",
}
OF_ONE = {
    "own dim": r"ValueError: sharded_search: queries: expected 8 numbers per query",
    "broken": r"OSError: no disk …",
    "own metric": r"ValueError: sharded_search: metric: expected None or the shard's own, 'cosine'",
}


def test_processes_that_disagree_are_told_so(results):
    for rank, result in enumerate(results):
        for name, pattern in OF_ALL.items():
            assert re.match(pattern, result["refusals"][name]), (rank, name)


def test_the_error_of_one_reaches_all(results):
    for rank, result in enumerate(results):
        for name, pattern in OF_ONE.items():
            if rank != 1:
                pattern = "RuntimeError: sharded_search: shard: .* failed; rank 1: " + pattern
            assert re.match(pattern, result["refusals"][name]), (rank, name)


def test_the_widest_bank_gives_the_dtype(results):
    for result in results:
        assert result["refusals"]["dtypes"] == ["torch.float64", "torch.float32"]


@pytest.mark.parametrize("signal", ["SIGKILL", "SIGSTOP"])
def test_a_rank_that_dies_or_hangs(tmp_path, signal):
    processes = start("sharded_death.py", 3, tmp_path, signal)
    try:
        for rank in (0, 2):  # they end, too, although the group's own timeout is half an hour
            out, errors = processes[rank].communicate(timeout=60)
            assert processes[rank].returncode == 7, errors
            said = re.match(
                rf"([\d.]+) s: sharded_search: group: rank {rank} of 3 expected an answer of every "
                r"process within 3 s, but one has ended or hangs",
                out,
            )
            assert said, out
            assert float(said[1]) < 10
    finally:
        processes[1].kill()
        processes[1].communicate()


def test_refusals_without_a_group():
    with pytest.raises(RuntimeError, match=r"call torch\.distributed\.init_process_group"):
        api.sharded_search(torch.eye(3), torch.eye(3), 1)
    with pytest.raises(ValueError, match="timeout: expected a finite number >= 0, got -1"):
        api.sharded_search(torch.eye(3), torch.eye(3), 1, timeout=-1)
    with pytest.raises(ValueError, match="timeout: expected seconds > 0, got 0"):
        api.sharded_search(torch.eye(3), torch.eye(3), 1, timeout=0)


def test_the_guides_program(tmp_path):
    guide = (Path(__file__).parents[2] / "docs" / "guides" / "several_machines.md").read_text()
    (tmp_path / "search.py").write_text(guide.split("```python\n")[1].split("```")[0])
    generator = np.random.default_rng(0)
    bank = generator.standard_normal((50, 8), dtype=np.float32)
    for name, rows in (("shard-0", bank[:30]), ("shard-1", bank[30:]), ("queries", bank[25:35])):
        np.save(tmp_path / f"{name}.npy", rows)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    subprocess.run(
        [*launcher, "--nproc-per-node", "2", "search.py"],
        cwd=tmp_path,
        env=os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
        timeout=120,
    )
    expected = fmkernels.knn(*map(torch.from_numpy, (bank[25:35], bank)), 30)[1]
    assert np.array_equal(np.load(tmp_path / "neighbours.npy"), expected)
