"""``make gpu`` without a GPU: a dry run from the wheel, and what becomes of results."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from gpu import accept, table

from fmkernels import info

ROOT = Path(__file__).parent.parent
SUITES = ("tests", "sanitizer", "sort", "tune")
"""Of a dry run here; ``compiled`` is a peer alone."""

HEADER = {"dry_run": False, "finished": True, "date": "2026-11-24", "capability": "9.0"}
HEADER |= {"device": "NVIDIA H200", "torch": "2.11.0", "triton": "3.6.0", "revision": "abc1234"}


def suite(results, **changes):
    return HEADER | {"results": results} | changes


def outcomes(*tests):
    """(outcome, backend, ops…) of every test."""
    return {
        str(index): {"outcome": outcome, "verifies": [[op, backend] for op in ops]}
        for index, (outcome, backend, *ops) in enumerate(tests)
    }


GREEN = outcomes(("passed", "cuda", "soft_sort"), ("skipped", "triton", "soft_sort"))


def test_kernels_whose_tests_passed_are_verified():
    assert accept.verified({}, suite(GREEN)) == {"soft_sort": {"cuda": "2026-11-24"}}


@pytest.mark.parametrize(
    ("tests", "sanitizer"),
    [
        (suite(GREEN | {"x": outcomes(("failed", "cuda", "soft_sort"))["0"]}), None),
        (suite(GREEN), {"results": {"cuda": {"racecheck": {"outcome": "found errors"}}}}),
    ],
    ids=["a test failed", "the sanitizer found something"],
)
def test_a_flaw_takes_the_date_away(tests, sanitizer):
    before = {"soft_sort": {"cuda": "2026-01-01", "triton": "2026-01-01"}}
    assert accept.verified(before, tests, sanitizer) == {"soft_sort": {"triton": "2026-01-01"}}


def test_nothing_is_verified_by_half_a_run():
    assert accept.verified({}, suite(GREEN, finished=False)) == {}
    nobodys = {"x": {"outcome": "failed", "verifies": []}}
    assert accept.verified({}, suite(GREEN | nobodys)) == {}


def test_what_the_package_says_is_what_the_committed_results_say():
    assert accept.read(info.VERIFIED) == accept.verified_by(accept.RESULTS)


def launch(ms, **values):
    return {"ms": {"median": ms}, "values": values}


def test_the_fastest_launch_within_the_budget_is_taken():
    results = {
        "triton": {"64": [launch(1.0, rows=32), launch(2.0, rows=8), launch(3.0, rows=4)]},
        "cuda": {"64": [{"failed": "too large", "values": {"passes": 1}}, launch(4.0, passes=2)]},
    }
    before = {"8.0": {"soft_sort": {}}, "9.0": {"soft_sort": {"cuda": {"16": {"passes": 1}}}}}
    assert accept.tuned(before, suite(results), lambda *launch: launch[2] != {"rows": 32}) == {
        "8.0": {"soft_sort": {}},
        "9.0": {
            "soft_sort": {
                "triton": {"64": {"rows": 8}},
                "cuda": {"16": {"passes": 1}, "64": {"passes": 2}},
            }
        },
    }


def test_the_gate_refuses_a_launch_with_a_stack():
    pytest.importorskip("triton")
    keeps = accept.triton_within_budget("9.0")
    assert keeps("triton", "64", {"rows": 8, "num_warps": 4, "programs_per_sm": 4})
    assert not keeps("triton", "256", {"rows": 16, "num_warps": 4, "programs_per_sm": 4})
    assert keeps("cuda", "64", {"passes": 2})


def step(cuda, triton, diffsort):
    found = {"floor_ms": {"bytes": 0.1, "operations": 0.3}}
    for who, ms in (("cuda", cuda), ("triton", triton), ("diffsort", diffsort)):
        found[who] = {"failed": "is not installed"} if ms is None else {"ms": {"median": ms}}
    return suite(
        {"neco-step": found}, roofline={"bytes_per_s": 4e12, "float32_operations_per_s": 5e13}
    )


def test_the_faster_kernel_comes_first():
    order = accept.gpu_order(step(2.0, 1.5, 100.0))
    assert order["order"] == ["triton", "cuda"]
    assert (order["basis"], order["ms"]) == ("measured", {"cuda": 2.0, "triton": 1.5})
    assert accept.gpu_order(step(2.0, None, 100.0)) is None


@pytest.mark.parametrize(
    ("ours", "diffsort", "told"),
    [
        (1.5, 75.0, ["≤ 1.5 ms: met", "≥ 50 × diffsort: met, 50 ×"]),
        (1.6, 75.0, ["≤ 1.5 ms: missed", "≥ 50 × diffsort: missed, 46.9 ×"]),
        (1.4, None, ["≤ 1.5 ms: met"]),
        (None, 75.0, []),
    ],
)
def test_what_is_asked_of_the_canonical_step(ours, diffsort, told):
    found = step(ours, None, diffsort)["results"]["neco-step"]
    assert list(table.verdicts("neco-step", found)) == told


def test_a_section_of_the_readme_has_every_workload():
    lines = table.markdown(step(1.4, None, 98.0))
    assert lines[0].startswith("**NVIDIA H200, torch 2.11.0, Triton 3.6.0**, revision abc1234")
    assert lines[-1] == (
        "| `neco-step` | 0.3 | 1.4 | is not installed |  | 98 | 70 × "
        "| ≤ 1.5 ms: met; ≥ 50 × diffsort: met, 70 × |"
    )


def write(folder, **suites):
    for name, content in suites.items():
        (folder / f"gpu-{name}.json").write_text(json.dumps(content))


def test_accepted_results_are_written_together(tmp_path):
    source, results, configs = (tmp_path / name for name in ("out", "results", "configs"))
    for folder in (source, results, configs):
        folder.mkdir()
    write(source, tests=suite(GREEN), sort=step(1.4, 5.0, 98.0))
    written = {path.name for path in accept.accept(source, results, configs)}
    assert written == {
        "gpu-tests-nvidia-h200.json",
        "gpu-sort-nvidia-h200.json",
        "verified.json",
        "gpu_order.json",
    }
    assert accept.read(configs / "verified.json") == {"soft_sort": {"cuda": "2026-11-24"}}


def test_a_sanitizer_that_runs_later_counts(tmp_path):
    source = tmp_path / "out"
    source.mkdir()
    write(source, tests=suite(GREEN))
    accept.accept(source, tmp_path, tmp_path)
    (source / "gpu-tests.json").unlink()
    write(source, sanitizer=suite({"cuda": {"memcheck": {"outcome": "found errors"}}}))
    accept.accept(source, tmp_path, tmp_path)
    assert accept.read(tmp_path / "verified.json") == {}


NO_RESULTS = {
    "none": None,
    "dry run": suite(GREEN, dry_run=True),
    "a part": suite(GREEN, finished=False),
}


@pytest.mark.parametrize("content", NO_RESULTS.values(), ids=NO_RESULTS)
def test_what_is_no_result_is_refused(tmp_path, content):
    source, target = tmp_path / "out", tmp_path / "configs"
    source.mkdir()
    target.mkdir()
    if content is not None:
        write(source, tests=content)
    with pytest.raises(ValueError, match=r"accept: .*expected .*got"):
        accept.accept(source, target, target)
    assert not list(target.iterdir())


def gpu(*arguments, site=None):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "FMKERNELS"))}
    if site is not None:
        environment["PYTHONPATH"] = str(site)
    return subprocess.run(
        [sys.executable, "-m", "gpu", *map(str, arguments)],
        cwd=ROOT / "benchmarks",
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (
            ["swim"],
            2,
            "some of tests, sort, knn, project_gradients, vera, tune, sanitizer, compiled, got swim",
        ),
        (["--minutes", "0"], 2, "--minutes: expected a positive number, got 0.0"),
        (["--dry-run"], 1, "expected an installed wheel, got the checkout"),
    ],
)
def test_wrong_calls(arguments, code, told):
    done = gpu(*arguments)
    assert done.returncode == code
    assert told in done.stdout
