"""The benchmark tools: pairs, intervals, bytes kept, peak memory. No test here asserts a speed."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def measure():
    spec = importlib.util.spec_from_file_location("measure", BENCHMARKS / "measure.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["measure"] = module
    spec.loader.exec_module(module)
    return module


def test_the_same_code_against_itself_has_an_interval_around_its_median(measure):
    x = torch.randn(64, 64)
    ratio = measure.compare(lambda: x @ x, lambda: x @ x, pairs=9)
    assert ratio.low <= ratio.ratio <= ratio.high
    assert ratio.pairs == 9


def test_bootstrap_of_a_constant(measure):
    assert measure.bootstrap([2.0] * 9) == (2.0, 2.0)


def test_bytes_kept_leaves_out_the_inputs(measure):
    x = torch.randn(10, requires_grad=True)
    assert measure.bytes_kept(lambda: x.exp(), x) == 40
    assert measure.bytes_kept(lambda: x * 2.0, x) == 0


def test_peak_memory_of_a_step(measure):
    assert (
        measure.peak_extra_bytes("workloads", "soft-sort-matrix-64", "fmkernels")
        > 392 * 64 * 64 * 4
    )
