"""Gradient projections on a GPU, beside the product with the whole matrix in float64."""

import pytest
import torch
from gpu.target import BACKENDS, DRY_RUN, running
from gradients import KINDS, materialized, pair, projections

import fmkernels
from fmkernels.ops.project_gradients import project
from fmkernels.testing import assert_parity

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
LAYERS = [(33, 64, 16), (9, 33, 40), (130, 257, 130), (192, 192, 192)]
BATCHES = [(1, None), (70, None), (3, 49)]
if DRY_RUN:  # the arithmetic is tested in tests/interpreter; this is about what surrounds it
    KINDS = ("count_sketch", "from_matrix")
    DTYPES, LAYERS, BATCHES = DTYPES[:2], [(3, 5, 4)], [(2, 2)]

every_kind = pytest.mark.parametrize("kind", KINDS)
drawn_kinds = pytest.mark.parametrize(
    "make", [fmkernels.CountSketch, fmkernels.Rademacher, fmkernels.KhatriRao]
)


@pytest.fixture(params=[name for name in BACKENDS if name in project.gpu_kernels])
def backend(request):
    return request.param


def on(device, delta, a, projection):
    found = fmkernels.project_gradients(delta.to(device), a.to(device), projection.to(device))
    return found.cpu()


@every_kind
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_parity(kind, dtype, backend, verifies, device):
    verifies("project_gradients")
    with running(backend):
        for out, into, dim in LAYERS:
            projection = projections(out, into, dim)[kind]
            for samples, rows in BATCHES:
                delta, a = pair(samples, rows, out, into, dtype, size=1e-3)
                found = on(device, delta, a, projection)
                same_dtype = materialized(delta, a, projection, torch.float32)
                assert_parity(found, same_dtype, materialized(delta, a, projection, torch.float64))


@every_kind
def test_what_the_cpu_gives(kind, backend, verifies, device):
    """Entries are the same on every device."""
    verifies("project_gradients")
    width, dim = (5, 4) if DRY_RUN else (256, 300)
    projection = projections(width, width, dim, seed=2**40 + 3)[kind]
    delta, a = pair(2, 3, width, width, size=1e-8)
    with running(backend):
        found = on(device, delta, a, projection)
    with fmkernels.backend("reference"):
        expected = fmkernels.project_gradients(delta.double(), a.double(), projection)
    assert ((found - expected).norm(dim=1) < 2e-6 * expected.norm(dim=1)).all()


@every_kind
def test_lists_of_pairs(kind, backend, verifies, device):
    verifies("project_gradients")
    projection = projections(6, 5, 8)[kind].to(device)
    sizes = [(2, None), (1, 3)] if DRY_RUN else [(3, None), (2, 4), (1, 3)]
    pairs = [[x.to(device) for x in pair(samples, rows, 6, 5)] for samples, rows in sizes]
    with running(backend):
        together = fmkernels.project_gradients(*map(list, zip(*pairs, strict=True)), projection)
        for (delta, a), found in zip(pairs, together, strict=True):
            assert torch.equal(found, fmkernels.project_gradients(delta, a, projection))


@every_kind
def test_bitwise_the_same_over_runs_and_batch_splits(kind, backend, verifies, device):
    verifies("project_gradients")
    sizes, samples = ((6, 5, 8), 3) if DRY_RUN else ((192, 384, 384), 150)
    projection = projections(*sizes)[kind].to(device)
    delta, a = (x.to(device) for x in pair(samples, 2, *sizes[:2]))
    with running(backend):
        first = fmkernels.project_gradients(delta, a, projection)
        for _ in range(1 if DRY_RUN else 5):
            assert torch.equal(fmkernels.project_gradients(delta, a, projection), first)
        for start, stop in [(1, 2)] if DRY_RUN else [(0, 1), (1, 2), (2, samples), (37, 141)]:
            part = slice(start, stop)
            found = fmkernels.project_gradients(delta[part], a[part], projection)
            assert torch.equal(found, first[part])


@every_kind
def test_any_strides_and_what_is_not_finite(kind, backend, verifies, device):
    verifies("project_gradients")
    projection = projections(6, 5, 8)[kind].to(device)
    delta, a = torch.randn(6, 4, device=device).T, torch.randn(4, 10, device=device)[:, ::2]
    with running(backend):
        expected = fmkernels.project_gradients(delta.contiguous(), a.contiguous(), projection)
        assert torch.equal(fmkernels.project_gradients(delta, a, projection), expected)
        delta[1, 2] = torch.nan
        found = fmkernels.project_gradients(delta, a, projection)
    assert found[1].isnan().all()
    assert torch.equal(found[[0, 2, 3]], expected[[0, 2, 3]])


@pytest.mark.gpu
@every_kind
def test_in_a_graph(kind, backend, verifies, device):
    verifies("project_gradients")
    projection = projections(192, 384, 384)[kind].to(device)
    delta, a = (x.to(device) for x in pair(70, 2, 192, 384))
    with running(backend):
        expected = fmkernels.project_gradients(delta, a, projection)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = fmkernels.project_gradients(delta, a, projection)
        found.zero_()
        graph.replay()
    assert torch.equal(found, expected)


@pytest.mark.gpu
@drawn_kinds
def test_at_the_size_of_a_vision_transformer(make, backend, verifies, device):
    """Many parts, and several passes, one of which ends within a sample."""
    verifies("project_gradients")
    projection = make(768, 768, 768)
    delta, a = (x.to(device) for x in pair(340, 3, 768, 768, size=1e-8))
    with running(backend):
        found = fmkernels.project_gradients(delta, a, projection)
        alone = fmkernels.project_gradients(delta[-2:], a[-2:], projection)
    assert torch.equal(found[-2:], alone)
    with fmkernels.backend("reference"):
        expected = fmkernels.project_gradients(delta[-2:].double(), a[-2:].double(), projection)
    assert ((alone - expected).norm(dim=1) < 2e-6 * expected.norm(dim=1)).all()


@pytest.mark.gpu
@drawn_kinds
def test_memory_does_not_grow_with_the_gradients(make, backend, verifies, device, alone):
    verifies("project_gradients")
    samples, dim, peaks = 4096, 256, []
    for width in (256, 1024):
        projection = make(width, width, dim)
        delta, a = (x.to(device) for x in pair(samples, None, width, width))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with running(backend):
            fmkernels.project_gradients(delta, a, projection)
        rows = 2 * samples * (width + 1) * 4
        peaks.append(torch.cuda.max_memory_allocated() - before - rows)
    assert max(peaks) < 2**27 + samples * dim * 16


@pytest.mark.gpu
def test_rows_past_two_to_the_31(backend, verifies, device, alone):
    verifies("project_gradients")
    width, rows = 4096, 2**19 + 64
    delta = torch.randn(rows, width, device=device, dtype=torch.bfloat16)
    a = torch.randn(rows, width, device=device, dtype=torch.bfloat16)
    projection = fmkernels.KhatriRao(width, width, 64)
    with running(backend):
        found = fmkernels.project_gradients(delta, a, projection)
        last = fmkernels.project_gradients(delta[-8:], a[-8:], projection)
    assert torch.equal(found[-8:], last)
