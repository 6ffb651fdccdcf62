"""NeCo's sort beside diffsort: speed, memory, bytes kept, host time, instruction sets, linearity.

Parity is checked before a time is taken: a wrong result is never reported as a fast one.
"""

import os
import subprocess
import sys
from pathlib import Path

import measure
import pytest
import torch
from torch.nn import functional as F
from workloads import WORKLOADS, Sorting

import fmkernels
from fmkernels import _library

RATIO_WORKLOADS = [
    "neco-step",
    "neco-196-small",
    "neco-features",
    "soft-sort-matrix",
    "soft-sort-matrix-16",
    "soft-sort-matrix-64",
    "soft-sort-matrix-256",
]


def check_parity(workload, peer):
    """Both gradients are as close as two float32 computations of them are."""
    ours, theirs = workload.step("fmkernels")(), workload.step(peer)()
    scale = theirs.abs().max()
    assert (ours - theirs).abs().max() <= 2e-3 * scale


@pytest.mark.parametrize("name", RATIO_WORKLOADS)
def test_speed(name, record, benchmark):
    workload = WORKLOADS[name]
    check_parity(workload, "diffsort")
    ours, peer = workload.step("fmkernels"), workload.step("diffsort")
    ratio = measure.compare(ours, peer)
    facts = {"diffsort": ratio.as_dict()}
    if isinstance(workload, Sorting):
        roof = measure.roofline()
        seconds = ratio.ours_ms / 1e3
        facts["share_of_matmul_rate"] = round(
            workload.operations() / seconds / 1e9 / roof["float32_gflops"], 3
        )
        facts["share_of_copy_rate"] = round(
            workload.bytes_moved() / seconds / 1e9 / roof["copy_gb_per_s"], 3
        )
        facts["roofline"] = roof
        student, teacher = workload.inputs()
        facts["bytes_kept"] = {
            provider: measure.bytes_kept(workload.forward(provider), student, teacher)
            for provider in ("fmkernels", "diffsort")
        }
    benchmark.extra_info.update(facts)
    benchmark.pedantic(ours, rounds=31, warmup_rounds=3)
    record(name, **facts)


@pytest.mark.parametrize("name", ["neco-step", "soft-sort-matrix"])
def test_speed_beside_the_compiled_peer(name, record):
    workload = WORKLOADS[name]
    try:
        workload.step("diffsort-compiled")()
    except Exception as error:  # a peer that does not compile is a result, too
        record(name, diffsort_compiled=f"failed: {type(error).__name__}")
        return
    check_parity(workload, "diffsort-compiled")
    ratio = measure.compare(workload.step("fmkernels"), workload.step("diffsort-compiled"))
    record(name, diffsort_compiled=ratio.as_dict())


def test_speed_beside_the_reference(record):
    workload = WORKLOADS["neco-step"]
    check_parity(workload, "reference")
    ratio = measure.compare(workload.step("fmkernels"), workload.step("reference"))
    record("neco-step", reference=ratio.as_dict())


@pytest.mark.parametrize("name", ["neco-step", "neco-196", "neco-features", "soft-sort-matrix"])
def test_peak_memory(name, record):
    facts = {"fmkernels": measure.peak_extra_bytes("workloads", name, "fmkernels")}
    if name != "neco-196":  # diffsort would need some 10 GB
        facts["diffsort"] = measure.peak_extra_bytes("workloads", name, "diffsort")
    record(name, peak_extra_bytes=facts)


@pytest.mark.skipif(_library.native is None, reason="needs the extension")
@pytest.mark.parametrize("isa", _library.native.cpu_isas() if _library.native else [])
def test_instruction_sets(isa, record):
    """neco-step in a process of its own; FMKERNELS_CPU_ISA is read when the kernels are loaded."""
    code = (
        "import measure, json, torch; from workloads import WORKLOADS; torch.set_num_threads(2);"
        "w = WORKLOADS['neco-step'];"
        "print(json.dumps(measure.compare(w.step('fmkernels'), w.step('diffsort')).as_dict()))"
    )
    output = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"FMKERNELS_CPU_ISA": isa},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    import json

    record("instruction-sets", **{isa: json.loads(output.splitlines()[-1])})


def test_time_is_linear_in_the_rows(record):
    curve = {}
    for rows in (98, 196, 392, 784, 1568, 3136, 6272):
        step = Sorting(rows, 49).step("fmkernels")
        measure.warm_up(step)
        times = sorted(measure.seconds(step) for _ in range(15))
        curve[rows] = float(f"{times[7] * 1e6 / rows:.4g}")
    record("rows", microseconds_per_row=curve)


def test_host_time_on_tiny_input(record):
    x, y = torch.rand(2, 2, 8).unbind()
    differentiated = x.clone().requires_grad_()
    with torch.no_grad():
        forward = measure.compare(
            lambda: F.softmax(x, dim=-1), lambda: fmkernels.soft_sort_cross_entropy(x, y)
        )
    both = measure.compare(
        lambda: F.softmax(differentiated, dim=-1).sum().backward(),
        lambda: fmkernels.soft_sort_cross_entropy(differentiated, y).backward(),
    )
    record("host-time", forward=forward.as_dict(), forward_backward=both.as_dict())
