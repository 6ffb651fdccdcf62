"""Exact search on a GPU, beside float64 on the same device."""

import pytest
import torch
from gpu.target import BACKENDS, DRY_RUN, running

import fmkernels
from fmkernels.ops.knn import PATHS, reference, search
from fmkernels.ops.knn.reference import METRICS

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
SHAPES = [(300, 20_000, 384, 30), (70, 30_000, 33, 1), (3, 100_000, 768, 100), (20, 500, 64, 600)]
if DRY_RUN:  # the arithmetic is tested in tests/interpreter; this is about what surrounds it
    SHAPES = [(2, 150, 7, 3), (2, 5, 7, 8)]
ROWS = 150 if DRY_RUN else 20_000
K = 6 if DRY_RUN else 30

metrics = pytest.mark.parametrize("metric", METRICS)


@pytest.fixture(params=[name for name in BACKENDS if name in search.gpu_kernels])
def backend(request):
    return request.param


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """In a dry run: buffers that few rows overflow, and few but large operations."""
    if DRY_RUN:
        from fmkernels.ops.knn import gpu, gpu_config, gpu_launch

        monkeypatch.setattr(gpu, "search_plan", lambda *_: gpu_config.Plan(64, 64, 1024))
        for name in ("PREPARED", "SCORED", "MERGED"):
            monkeypatch.setattr(gpu_launch, name, 128)


def inputs(queries, rows, dim, dtype, device):
    return (torch.randn(n, dim, device=device).to(dtype) for n in (queries, rows))


def check(queries, bank, k, metric):
    """The rows are the nearest by float64, which may take either of two that it cannot tell apart.

    Returns the information that the search gives.
    """
    scores, indices, info = fmkernels.knn(queries, bank, k, metric=metric, return_info=True)
    exact = reference.exact_scores(queries, bank, metric)
    usable = min(k, len(bank))
    expected = exact.nan_to_num(-torch.inf).topk(usable).values
    found = exact.gather(1, indices[:, :usable])
    size = expected.abs().amax() + 1
    assert ((found - expected).abs() <= 4 * queries.shape[1] * 2.0**-53 * size).all()
    assert all(len(row.unique()) == usable for row in indices[:, :usable])
    assert (indices[:, usable:] == -1).all()
    sign = -1 if metric == "l2" else 1
    spacing = 2.0**-52 if scores.dtype == torch.float64 else 2.0**-23
    allowed = spacing * expected.abs() + 4 * queries.shape[1] * 2.0**-53 * size
    assert ((sign * scores[:, :usable].double() - expected).abs() <= allowed).all()
    return info


@metrics
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_parity(metric, dtype, backend, verifies, device):
    if DRY_RUN and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter has no bfloat16")
    verifies("knn")
    with running(backend):
        for queries, rows, dim, k in SHAPES:
            info = check(*inputs(queries, rows, dim, dtype, device), k, metric)
            if rows > 16 * k:
                assert info.fallbacks == 0
                assert (info.candidates < rows).all()
                assert info.path != PATHS[reference.REFERENCE]


@metrics
def test_near_ties_and_equal_rows(metric, backend, verifies, device):
    verifies("knn")
    queries, bank = inputs(3, ROWS, 64, torch.float32, device)
    bank[::3] = queries[0] + 1e-7 * torch.randn_like(bank[::3])
    with running(backend):
        check(queries, bank, 5, metric)
        bank[ROWS // 10 :: 2] = queries[1]
        _, indices = fmkernels.knn(queries, bank, 5, metric=metric)
    if metric != "inner_product":
        first = ROWS // 10
        assert indices[1].tolist() == list(range(first, first + 10, 2))


@metrics
@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")  # NumPy's, interpreted
def test_bad_rows_are_never_chosen(metric, backend, verifies, device):
    verifies("knn")
    queries, bank = inputs(4, ROWS, 33, torch.float32, device)
    clean = bank.clone()
    bad = torch.arange(0, ROWS, 97, device=device)
    bank[bad, 5] = torch.nan
    clean[bad] = 1e3 if metric == "l2" else 0.0
    if metric != "l2":
        clean[bad] = -1e-3 * queries.sum(0)
    queries[2, 1] = torch.nan
    with running(backend):
        _, indices = fmkernels.knn(queries, bank, 7, metric=metric)
        _, expected = fmkernels.knn(queries, clean, 7, metric=metric)
    assert not torch.isin(indices, bad).any()
    assert (indices[2] == -1).all()
    others = [0, 1, 3]
    assert torch.equal(indices[others], expected[others])


@metrics
def test_any_strides(metric, backend, verifies, device):
    verifies("knn")
    with running(backend):
        for dtype in (torch.float32, torch.float16):
            queries, bank = inputs(128, ROWS, 128, dtype, device)
            for first, second in (
                (queries[:5, ::2], bank[:, ::2]),
                (queries[::50, 64:], bank[:, 64:]),
            ):
                found = fmkernels.knn(first, second, 5, metric=metric)
                same = fmkernels.knn(first.contiguous(), second.contiguous(), 5, metric=metric)
                assert all(torch.equal(a, b) for a, b in zip(found, same, strict=True))


def test_bitwise_the_same_over_runs_and_batch_splits(backend, verifies, device):
    verifies("knn")
    queries, bank = inputs(6 if DRY_RUN else 300, ROWS, 64, torch.float32, device)
    with running(backend):
        first = fmkernels.knn(queries, bank, K)
        for _ in range(1 if DRY_RUN else 5):
            again = fmkernels.knn(queries, bank, K)
            assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))
        for part in (slice(0, 1), slice(1, 4), slice(4, None)):
            again = fmkernels.knn(queries[part], bank, K)
            assert all(torch.equal(a, b[part]) for a, b in zip(again, first, strict=True))


def test_fast(backend, verifies, device):
    verifies("knn")
    queries, bank = inputs(5, ROWS, 64, torch.float32, device)
    with running(backend):
        fast, _ = fmkernels.knn(queries, bank, 10, precision="fast")
        exact, _ = fmkernels.knn(queries, bank, 10)
    assert ((exact - fast) <= 2.0**-9).all()


@pytest.mark.gpu
def test_rows_past_two_to_the_31(backend, verifies, device, alone):
    """A bank of 4.3 GB in float16; the neighbours are its last rows, and rows spread over it."""
    verifies("knn")
    dim = 384
    rows = 2**31 // dim + 50_000
    bank = torch.empty(rows, dim, dtype=torch.float16, device=device)
    for part in bank.split(2**20):
        part.normal_()
    queries = torch.randn(40, dim, device=device)
    places = torch.cat([torch.arange(rows - 20, rows), torch.arange(20) * (rows // 20)]).to(device)
    bank[places] = (queries + 0.1 * torch.randn_like(queries)).half()
    with running(backend):
        _, indices = fmkernels.knn(queries, bank, 1)
    assert torch.equal(indices[:, 0], places)


@pytest.mark.gpu
def test_memory_does_not_grow_with_the_bank(backend, verifies, device, alone):
    verifies("knn")
    queries = torch.randn(4096, 128, device=device)
    peaks = []
    for rows in (4_000_000, 8_000_000):
        bank = torch.randn(rows, 128, device=device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with running(backend):
            fmkernels.knn(queries, bank, K)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del bank
    assert peaks[1] <= 1.05 * peaks[0]
    assert max(peaks) < 2**30
