"""VeRA's shared matrices on a GPU: bit for bit those of a CPU."""

import pytest
import torch
from gpu.target import BACKENDS, DRY_RUN, running

import fmkernels
from fmkernels.ops.vera_matrices import VERA_MATRICES

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
SIZES = [
    (1, 1, 1),
    (5, 20, 7),
    (3, 130, 65),
    (256, 4096, 11_008),
    (1024, 768, 768),
    (7, 50_000, 33),
]
if DRY_RUN:  # the arithmetic is tested in tests/interpreter; this is about what surrounds it
    SIZES = SIZES[:3]
SEEDS = [0, 2**63 - 1]


@pytest.fixture(params=[name for name in BACKENDS if name in VERA_MATRICES.gpu_kernels])
def backend(request):
    return request.param


def make(device, *sizes, **settings):
    A, B = fmkernels.vera_matrices(*sizes, init="position", device=device, **settings)
    assert A.device == B.device == torch.empty(0, device=device).device
    return A.cpu(), B.cpu()


def equal(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_what_the_reference_gives(dtype, backend, verifies, device):
    if DRY_RUN and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter has no bfloat16")
    verifies("vera_matrices")
    for sizes in SIZES:
        for seed in SEEDS:
            with running(backend):
                found = make(device, *sizes, seed=seed, dtype=dtype)
            with fmkernels.backend("reference"):
                assert equal(found, make("cpu", *sizes, seed=seed, dtype=dtype))


def test_the_reference_too(device):
    with fmkernels.backend("reference"):
        assert equal(make(device, 5, 200, 70, seed=3), make("cpu", 5, 200, 70, seed=3))


@pytest.mark.parametrize("init", ["kaiming_uniform", "kaiming_normal"])
def test_peft_s_are_those_of_the_cpu(init, device):
    found = fmkernels.vera_matrices(5, 200, 70, init=init, seed=3, device=device)
    assert equal([x.cpu() for x in found], fmkernels.vera_matrices(5, 200, 70, init=init, seed=3))


@pytest.mark.gpu
def test_in_a_graph(backend, verifies, device):
    verifies("vera_matrices")
    with running(backend):
        expected = make(device, 64, 768, 768, seed=3)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = fmkernels.vera_matrices(64, 768, 768, init="position", seed=3, device=device)
        for x in found:
            x.zero_()
        graph.replay()
    assert equal([x.cpu() for x in found], expected)


@pytest.mark.gpu
def test_entries_past_two_to_the_31(backend, verifies, device, alone):
    """The last rows of a matrix of 4.3 GB in bfloat16 are those of a narrow one."""
    verifies("vera_matrices")
    rows = 2**31 // 256 + 5000
    with running(backend):
        _, B = fmkernels.vera_matrices(
            256, 1, rows, init="position", dtype=torch.bfloat16, device=device
        )
        _, few = fmkernels.vera_matrices(
            3, 1, rows, init="position", dtype=torch.bfloat16, device=device
        )
    assert torch.equal(B[-6000:, :3], few[-6000:])
    assert torch.equal(B[-1, 252:].isnan(), torch.zeros(4, dtype=torch.bool, device=device))
