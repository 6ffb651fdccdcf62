"""Exact nearest neighbours: against float64 and faiss, on hard banks, in every plan; refusals."""

import faiss
import neighbors
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from neighbors import HARD, check_exact, problem

import fmkernels
from fmkernels import _library, testing
from fmkernels.ops.knn import config, cpp, reference, search
from fmkernels.ops.knn.config import CpuPlan, Level

METRICS = reference.METRICS
every_metric = pytest.mark.parametrize("metric", METRICS)
needs_kernel = pytest.mark.skipif(_library.native is None, reason="needs the extension")

INT8, BF16, F32 = (Level(x, x) for x in (torch.int8, torch.bfloat16, torch.float32))
SMALL_TILES = CpuPlan((INT8, BF16, F32), 7, chunk=5, rows=37, tile=256, capacity=200, crowd=10**9)
PLANS = {
    "int8": SMALL_TILES,
    "bfloat16": SMALL_TILES._replace(levels=(BF16, F32)),
    "float32": SMALL_TILES._replace(levels=(F32,)),
    "few queries": SMALL_TILES._replace(
        levels=(Level(torch.bfloat16, torch.float32), F32), chunk=3
    ),
    "few queries, int8": SMALL_TILES._replace(
        levels=(Level(torch.int8, torch.float32), F32), chunk=3
    ),
    "one part": CpuPlan((INT8, BF16, F32), 100, 100, rows=2048, tile=512, capacity=150, crowd=16),
}
FUSED = CpuPlan(  # small parts, because the first one's products are oneDNN's
    (INT8._replace(vectors=2), F32._replace(vectors=1)), 100, 100, 20, 256, capacity=150, crowd=16
)
PLANS |= {
    "fused": FUSED,
    "fused, wide": FUSED._replace(
        levels=(INT8._replace(vectors=4), F32._replace(vectors=3)), rows=256
    ),
    "fused, float32": FUSED._replace(levels=(F32._replace(vectors=4),), chunk=21),
    "fused, full pools": FUSED._replace(
        levels=(INT8._replace(vectors=4), F32), rows=300, capacity=130
    ),
}
every_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)


def always(plan):
    """The plan for any problem; without int8 where the rows are too short for it."""

    def can(level):
        return level.vectors if config._is_fused(level.product) else 0

    def cpu_plan(queries, dim, *_):
        levels = plan.levels if dim in config.INT8_DIMS else (plan.levels[-1],)
        return plan._replace(levels=tuple(x._replace(vectors=can(x)) for x in levels))

    return cpu_plan


@pytest.fixture
def use(monkeypatch):
    def use(plan):
        monkeypatch.setattr(cpp, "cpu_plan", always(plan))

    return use


@every_metric
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("queries", "rows", "dim", "k"),
    [(1, 1, 1, 1), (7, 33, 129, 5), (3, 200, 7, 33), (33, 129, 33, 129), (2, 5000, 16, 2048)],
)
def test_neighbors_are_those_of_float64(metric, dtype, queries, rows, dim, k):
    q, b = torch.randn(queries, dim).to(dtype), torch.randn(rows, dim).to(dtype)
    check_exact(q, b, k, metric, *fmkernels.knn(q, b, k, metric=metric))


@every_plan
@every_metric
@pytest.mark.parametrize("kind", HARD, ids=lambda kind: kind.__name__)
def test_hard_banks(use, plan, metric, kind):
    use(plan)
    for seed, (queries, rows, dim, k) in enumerate(
        [(9, 150, 24, 5), (4, 90, 64, 60), (3, 70, 1, 2)]
    ):
        q, b = problem(kind, seed, queries, rows, dim)
        check_exact(q, b, k, metric, *fmkernels.knn(q, b, k, metric=metric))


@every_metric
@pytest.mark.parametrize("vectors", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("queries", "rows", "dim"), [(17, 257, 16), (65, 1500, 33), (130, 770, 100), (64, 6, 384)]
)
def test_groups_and_panels_of_every_size(use, metric, vectors, queries, rows, dim):
    for level in (INT8, F32):
        levels = (level._replace(vectors=vectors), F32)
        use(FUSED._replace(levels=levels, queries=200, chunk=130, rows=1024, crowd=10**9))
        q, b = torch.randn(queries, dim), torch.randn(rows, dim)
        b[::3] *= 10
        check_exact(q, b, 20, metric, *fmkernels.knn(q, b, 20, metric=metric))


@given(
    kind=st.sampled_from(HARD),
    metric=st.sampled_from(METRICS),
    plan=st.sampled_from(list(PLANS.values())),
    queries=st.integers(0, 9),
    rows=st.integers(0, 700),
    dim=st.integers(1, 70),
    k=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 2**16),
)
def test_any_bank(kind, metric, plan, queries, rows, dim, k, dtype, seed):
    q, b = problem(kind, seed, queries, rows, dim, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpp, "cpu_plan", always(plan))
        check_exact(q, b, k, metric, *fmkernels.knn(q, b, k, metric=metric))


@pytest.mark.parametrize("scale", [1e100, 1e-100, 1e200, 1e-200, 1e-310])
def test_cosines_of_float64_beyond_float32(scale):
    q, b = (torch.randn(n, 16, dtype=torch.float64) for n in (5, 300))
    expected = fmkernels.knn(q, b, 7)
    found = fmkernels.knn(scale * q, scale * b, 7)
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[0], expected[0], rtol=1e-11, atol=0)


@pytest.mark.parametrize("scale", [1e100, 1e-100])
@pytest.mark.parametrize("metric", ["inner_product", "l2"])
def test_products_and_distances_of_float64_beyond_float32(metric, scale):
    q, b = (torch.randn(n, 16, dtype=torch.float64) for n in (5, 300))
    expected = fmkernels.knn(q, b, 7, metric=metric)[1]
    assert torch.equal(fmkernels.knn(scale * q, scale * b, 7, metric=metric)[1], expected)


@every_metric
def test_faiss_finds_the_same(metric):
    q, b = torch.randn(20, 48), torch.randn(3000, 48)
    index = (faiss.IndexFlatL2 if metric == "l2" else faiss.IndexFlatIP)(48)
    unit = reference.unit if metric == "cosine" else lambda x: x
    index.add(unit(b).float().numpy())
    theirs, found = index.search(unit(q).float().numpy(), 10)
    scores, indices = fmkernels.knn(q, b, 10, metric=metric)
    assert np.array_equal(found, indices.numpy())
    np.testing.assert_allclose(scores.numpy(), theirs, rtol=1e-4)


@needs_kernel
@every_metric
@pytest.mark.parametrize("kind", HARD, ids=lambda kind: kind.__name__)
def test_bitwise_the_same_in_every_plan_and_for_every_split_of_the_batch(use, metric, kind):
    q, b = problem(kind, 3, 13, 140, 33)
    expected = fmkernels.knn(q, b, 9, metric=metric)
    for plan in PLANS.values():
        use(plan)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found = fmkernels.knn(q, b, 9, metric=metric)
            assert all(torch.equal(a, x) for a, x in zip(found, expected, strict=True))
        parts = [fmkernels.knn(part, b, 9, metric=metric) for part in q.split(5)]
        for whole, split in zip(expected, zip(*parts, strict=True), strict=True):
            assert torch.equal(torch.cat(split), whole)


@every_metric
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_the_precision_of_products_changes_nothing(use, metric, precision):
    use(PLANS["float32"])
    q, b = torch.randn(9, 64), torch.randn(500, 64)
    before = torch.get_float32_matmul_precision()
    expected = fmkernels.knn(q, b, 20, metric=metric)
    torch.set_float32_matmul_precision(precision)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = fmkernels.knn(q, b, 20, metric=metric)
    finally:
        torch.set_float32_matmul_precision(before)
    assert all(torch.equal(a, x) for a, x in zip(found, expected, strict=True))


@needs_kernel
@pytest.mark.parametrize("precision", ["highest", "medium"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dim", [1, 3, 64, 385, 4000])
def test_products_err_less_than_the_bound(dtype, dim, precision):
    """The derivation's points 1 to 4, written out again, on what oneDNN returns."""
    before = torch.get_float32_matmul_precision()
    for queries, rows in [(1, 70), (16, 300), (130, 33)]:
        q, b = torch.randn(queries, dim), torch.randn(rows, dim) * torch.rand(rows, 1)
        u = q.double() / q.double().norm(dim=1, keepdim=True)
        low_u, low_b = u.to(dtype), b.to(dtype)
        torch.set_float32_matmul_precision(precision)
        try:
            products = torch.mm(low_u, low_b.mT).double()
        finally:
            torch.set_float32_matmul_precision(before)
        exact = u @ b.double().mT
        norms, lost = b.double().norm(dim=1), (b.double() - low_b.double()).norm(dim=1)
        lost_u = (u - low_u.double()).norm(dim=1, keepdim=True)
        bound = lost_u * norms + (1 + lost_u) * lost
        bound = bound + dim * 2**-22 * (1 + lost_u) * (norms + lost) + dim * 2.0**-125 * (1 + norms)
        if dtype == torch.bfloat16:
            bound = bound + 2**-8 * products.abs()
        if dtype == torch.float32 and precision == "medium":
            bound = bound + 3 * cpp.ROUNDED_FACTOR * (1 + lost_u) * (norms + lost)
        assert ((exact - products).abs() <= bound).all()


@needs_kernel
@pytest.mark.parametrize("name", ["losing_what_the_query_sees", "losing_what_tells_rows_apart"])
@every_metric
def test_rounding_that_turns_the_order_round(use, metric, name):
    """Problems that come near the bound: with less of it, these fail."""
    use(PLANS["bfloat16"]._replace(rows=1))
    queries, rows = (torch.from_numpy(x).float() for x in getattr(neighbors, name)())
    products = torch.mm(queries.bfloat16(), rows.bfloat16().mT)
    assert products.argmax() == 1  # that product would choose the other
    for order in ([0, 1], [1, 0]):
        bank = rows[order]
        check_exact(queries, bank, 1, metric, *fmkernels.knn(queries, bank, 1, metric=metric))
        assert order[fmkernels.knn(queries, bank, 1, metric=metric)[1].item()] == 0


@needs_kernel
@pytest.mark.parametrize("name", ["losing_the_row_in_int8", "losing_the_query_in_int8"])
@pytest.mark.parametrize("vectors", [0, 1])
@every_metric
def test_int8_that_turns_the_order_round(use, metric, vectors, name):
    """With half of either residual in the bound, these fail."""
    use(PLANS["int8"]._replace(levels=(INT8._replace(vectors=vectors), F32), rows=1))
    q, rows = (torch.from_numpy(x) for x in getattr(neighbors, name)())
    q, rows = reference.unit(q).float(), reference.unit(rows).float()
    codes = [torch.round(x / x.abs().amax(1, keepdim=True) * 127) for x in (q, rows)]
    products = codes[0] @ codes[1].mT * rows.abs().amax(1)
    assert products.argmax() == 1  # that product would choose the other
    for order in ([0, 1], [1, 0]):
        q5 = q.expand(5, -1)  # more than the kernel multiplies in float32
        found = fmkernels.knn(q5, rows[order], 1, metric=metric)[1]
        assert [order[i] for i in found.flatten()] == [0] * 5


@needs_kernel
@every_metric
def test_rounding_of_the_scores(use, metric):
    use(PLANS["bfloat16"])
    for seed in range(5):
        rng = np.random.default_rng(seed)
        q, b = (torch.from_numpy(x).bfloat16() for x in neighbors.rounded_scores(rng))
        check_exact(q, b, 5, metric, *fmkernels.knn(q, b, 5, metric=metric))


@every_metric
def test_leading_dimensions_strides_and_mixed_dtypes(metric):
    q, b = torch.randn(6, 16), torch.randn(50, 16)
    scores, indices = fmkernels.knn(q, b, 4, metric=metric)
    batched = fmkernels.knn(q.reshape(2, 3, 16), b, 4, metric=metric)
    assert torch.equal(batched[0], scores.reshape(2, 3, 4))
    assert torch.equal(batched[1], indices.reshape(2, 3, 4))
    alone = fmkernels.knn(q[0], b, 4, metric=metric)
    assert torch.equal(alone[1], indices[0])
    for _, laid_out in testing.layouts(b):
        assert torch.equal(fmkernels.knn(q, laid_out, 4, metric=metric)[1], indices)
    for _, laid_out in testing.layouts(q):
        assert torch.equal(fmkernels.knn(laid_out, b, 4, metric=metric)[1], indices)
    for dtypes in [(torch.float64, torch.float32), (torch.float32, torch.bfloat16)]:
        mixed = fmkernels.knn(q.to(dtypes[0]), b.to(dtypes[1]), 4, metric=metric)
        assert mixed[0].dtype == torch.promote_types(*dtypes)
        check_exact(q.to(dtypes[0]), b.to(dtypes[1]), 4, metric, *mixed)


@every_metric
def test_few_rows_are_padded(metric):
    worst = torch.inf if metric == "l2" else -torch.inf
    scores, indices = fmkernels.knn(torch.randn(3, 4), torch.randn(2, 4), 5, metric=metric)
    assert (indices[:, 2:] == -1).all()
    assert (scores[:, 2:] == worst).all()
    assert sorted(indices[0, :2].tolist()) == [0, 1]
    scores, indices = fmkernels.knn(torch.randn(3, 4), torch.randn(0, 4), 2, metric=metric)
    assert (indices == -1).all()
    assert (scores == worst).all()
    assert fmkernels.knn(torch.randn(0, 4), torch.randn(9, 4), 2, metric=metric)[0].shape == (0, 2)


@every_metric
def test_ties_go_to_the_lower_index(metric):
    bank = torch.randn(5, 8).repeat(40, 1)
    _, indices = fmkernels.knn(bank[2:3], bank, 6, metric=metric)
    if metric != "inner_product":
        assert indices.tolist() == [[2, 7, 12, 17, 22, 27]]
    for row in indices:
        assert (row.diff() > 0).all()


@every_metric
def test_nan_is_never_chosen(metric):
    bank = torch.randn(9, 4)
    bank[::2, 1] = torch.nan
    scores, indices = fmkernels.knn(torch.randn(3, 4), bank, 9, metric=metric)
    assert sorted(indices[0, :4].tolist()) == [1, 3, 5, 7]
    assert (indices[:, 4:] == -1).all()
    assert not scores.isnan().any()
    _, indices = fmkernels.knn(torch.full((1, 4), torch.nan), bank, 3, metric=metric)
    assert (indices == -1).all()


@every_metric
def test_info(use, metric):
    use(PLANS["bfloat16"])
    q = torch.randn(2, 3, 24)
    if _library.native is None:
        _, _, info = fmkernels.knn(q, torch.randn(90, 24), 5, metric=metric, return_info=True)
        assert info.path == "reference"
        return
    use(PLANS["one part"]._replace(levels=(BF16, F32)))
    _, _, info = fmkernels.knn(q, torch.randn(900, 24), 5, metric=metric, return_info=True)
    assert info.path == "bfloat16"
    assert info.fallbacks == 0
    assert info.candidates.shape == info.paths.shape == (2, 3)
    assert 5 <= info.candidates.min() <= info.candidates.max() < 200  # far from all
    for plan in (PLANS["one part"], PLANS["one part"]._replace(levels=(BF16, F32))):
        use(plan)
        _, _, info = fmkernels.knn(q, torch.ones(900, 24), 5, metric=metric, return_info=True)
        assert info.fallbacks == 6  # rows that nothing separates
        assert (info.paths == reference.FELL_BACK).all()


@needs_kernel
@every_metric
def test_fast_is_near(metric):
    q, b = torch.randn(40, 64), torch.randn(2000, 64)
    scores, indices = fmkernels.knn(q, b, 10, metric=metric)
    fast, found = fmkernels.knn(q, b, 10, metric=metric, precision="fast")
    shared = (found.unsqueeze(-1) == indices.unsqueeze(1)).any(-1).float().mean()
    assert shared > 0.95
    size = (q.norm(dim=1).amax() + b.norm(dim=1).amax()) ** 2 if metric != "cosine" else 1
    assert (fast - scores).abs().max() < 0.01 * size
    assert (fast.diff(dim=1) * (1 if metric == "l2" else -1) >= 0).all()


@needs_kernel
@every_metric
def test_a_better_product_finds_no_row_twice(use, metric):
    """The crowd is noticed after some candidates have been scored and kept."""
    use(PLANS["one part"]._replace(rows=4096, capacity=1200))
    q, b = torch.randn(20, 33), torch.randn(1, 33) + 1e-7 * torch.randn(4000, 33)
    scores, indices, info = fmkernels.knn(q, b, 300, metric=metric, return_info=True)
    assert info.fallbacks > 0
    check_exact(q, b, 300, metric, scores, indices)


@needs_kernel
@every_plan
@every_metric
def test_fast_where_products_tell_nothing(use, plan, metric):
    use(plan)
    q, b = torch.randn(8, 16), torch.randn(300, 16)
    q[:2], q[2, 1], b[5], b[6], b[7, 3] = 0, torch.inf, 1e37 * b[5], 1e-33 * b[6], torch.nan
    scores, indices = fmkernels.knn(q, b, 4, metric=metric, precision="fast")
    exact, expected = fmkernels.knn(q, b, 4, metric=metric)
    if metric == "l2":
        assert torch.equal(indices[2], expected[2])  # whose distances are all infinite
        assert (scores >= 0).all()
    else:
        assert torch.equal(indices[:3], expected[:3])
        assert torch.equal(scores[:3], exact[:3])
    assert (scores[3:].isfinite() == exact[3:].isfinite()).all()
    assert not (indices == 7).any()


@every_plan
def test_rows_that_float64_cannot_tell_apart_from_afar(use, plan):
    """What the products tell about them is not in the score."""
    use(plan)
    q, b = torch.ones(3, 16), 1e-18 * torch.randn(600, 16)
    assert fmkernels.knn(q, b, 3, metric="l2")[1].tolist() == [[0, 1, 2]] * 3
    q, b = 1e6 * torch.randn(5, 16), 1e-8 * torch.randn(600, 16)
    scores = search(q, b, 3, "l2", "exact")[0]
    exact = (q.double()[:, None] - b.double()).square().sum(-1)
    assert torch.allclose(-scores, exact.topk(3, largest=False).values, rtol=1e-14)


@every_metric
@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_gradients_change_no_score(metric, scale):
    q, b = scale * torch.randn(5, 16), scale * torch.randn(60, 16)
    expected = fmkernels.knn(q, b, 3, metric=metric)[0]
    with_grad = fmkernels.knn(q.requires_grad_(), b, 3, metric=metric)[0]
    assert torch.equal(with_grad.detach(), expected)
    with_grad.sum().backward()
    assert q.grad.isfinite().all()
    assert (q.grad != 0).any()


def test_many_more_neighbors_than_rows():
    scores, indices = fmkernels.knn(torch.randn(2, 4), torch.randn(3, 4), 10**6)
    assert indices.shape == (2, 10**6)
    assert (indices[:, 3:] == -1).all()
    assert (scores[:, 3:] == -torch.inf).all()


@every_metric
def test_rows_below_the_floor_may_be_left_out(metric):
    """What streaming rests on: parts of a bank, each told how good the ones before were."""
    q, b = torch.randn(8, 16), torch.randn(400, 16)
    whole = search(q, b, 6, metric, "exact")
    scores, indices = reference.empty_result(q, 6)
    for start in range(0, 400, 90):
        new, number, _, _ = search(q, b[start : start + 90], 6, metric, "exact", scores[:, -1])
        number = torch.where(number < 0, -1, number + start)
        scores, indices = reference.merge(
            torch.cat([scores, new], 1), torch.cat([indices, number], 1), 6
        )
    assert torch.equal(indices, whole[1])
    assert torch.equal(scores, whole[0])


@every_metric
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@every_plan
def test_a_prepared_bank_gives_the_same(use, plan, metric, dtype):
    from fmkernels.ops.knn.bank import prepare

    use(plan)
    q, b = torch.randn(8, 16).to(dtype), torch.randn(400, 16).to(dtype)
    expected = search(q, b, 6, metric, "exact")
    rows, *prepared = prepare(b)
    found = search(q, rows, 6, metric, "exact", None, *prepared)
    assert all(torch.equal(a, x) for a, x in zip(found[:2], expected[:2], strict=True))


@every_metric
def test_scores_are_differentiable(metric):
    q = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    b = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)

    def scores(q, b):
        return fmkernels.knn(q, b, 3, metric=metric)[0]

    assert torch.autograd.gradcheck(scores, (q, b))
    assert torch.autograd.gradgradcheck(scores, (q, b))
    padded = fmkernels.knn(q, b[:2], 3, metric=metric)[0]
    padded[:, :2].sum().backward()
    assert q.grad.isfinite().all()
    testing.check_gradient_layouts(scores, q.detach().float().requires_grad_(), b.detach().float())


@every_metric
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_gives_the_same(metric, dynamic):
    torch._dynamo.reset()

    def function(q, b):
        scores, indices, info = fmkernels.knn(q, b, 4, metric=metric, return_info=True)
        return scores * 2, indices, info.candidates

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic)
    for rows in (30, 50, 70):
        q, b = torch.randn(rows // 10, 12, requires_grad=True), torch.randn(rows, 12)
        expected, found = function(q, b), compiled(q, b)
        torch.testing.assert_close(found, expected)
        for scores in (expected[0], found[0]):
            scores.sum().backward()


@pytest.mark.parametrize("suffix", ["", "_reference"])
def test_opcheck(suffix):
    op = getattr(torch.ops.fmkernels, "knn" + suffix).default
    for metric in METRICS:
        torch.library.opcheck(op, (torch.randn(3, 8), torch.randn(20, 8), 4, metric))
    floor = torch.zeros(3, dtype=torch.float64)
    torch.library.opcheck(op, (torch.randn(3, 8), torch.randn(20, 8), 4, "cosine", "exact", floor))


def test_vmap_and_forward_mode_refuse():
    q, b = torch.randn(3, 2, 8), torch.randn(9, 8)
    with pytest.raises(NotImplementedError, match=r"knn: vmap is not supported"):
        torch.func.vmap(lambda x: fmkernels.knn(x, b, 2)[0])(q)


@needs_kernel
def test_large_k_and_wide_rows():
    q, b = torch.randn(3, 2000), torch.randn(3000, 2000)
    check_exact(q, b, 2500, "cosine", *fmkernels.knn(q, b, 2500))


@pytest.mark.parametrize("prepared", [None, torch.int8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("fast", [(), ("int8",), ("bfloat16",), ("int8", "bfloat16")], ids=str)
def test_plans(monkeypatch, fast, prepared):
    for name in ("int8", "bfloat16"):
        monkeypatch.setattr(config, f"has_fast_{name}", lambda name=name: name in fast)
    for queries in (0, 1, 4, 5, 16, 2048, 10**6):
        for dim in (1, 384, 10**6):
            for rows, k in ((0, 1), (10**5, 1), (10**5, 1024), (2**40, 2048)):
                plan = config.cpu_plan(queries, dim, rows, k, torch.float32, prepared)
                assert plan.chunk * plan.tile <= config.PRODUCTS
                assert plan.rows % plan.tile == plan.tile % config.BUCKET == 0
                assert 1 <= plan.chunk <= plan.queries
                assert plan.capacity >= k + 64
                assert plan.levels[-1][:2] == F32[:2]  # which takes whatever the others leave
                if queries <= config.FEW_QUERIES:
                    assert all(level.product == torch.float32 for level in plan.levels)
                    continue
                products = [level.product for level in plan.levels]
                assert products == [level.shadow for level in plan.levels]
                cast = queries >= config.WORTH_A_CAST
                assert (torch.bfloat16 in products) == (
                    "bfloat16" in fast and (cast or prepared == torch.bfloat16)
                )
                assert torch.int8 not in products or ("int8" in fast and dim == 384)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": 0}, ValueError, r"knn: k: expected an integer >= 1, got 0"),
        ({"k": -3}, ValueError, r"knn: k: expected an integer >= 1, got -3"),
        ({"k": 2.5}, ValueError, r"knn: k: expected an integer >= 1, got 2.5"),
        ({"bank": torch.zeros(5, 3)}, ValueError, r"bank: expected rows of 4 numbers, as queries"),
        ({"bank": torch.zeros(5, 2, 4)}, ValueError, r"bank: expected shape \(M, D\)"),
        ({"bank": torch.zeros(5, 4).int()}, TypeError, r"bank: expected a floating-point dtype"),
        ({"queries": torch.zeros(5, 4).long()}, TypeError, r"queries: expected a floating-point"),
        ({"queries": [[1.0]]}, TypeError, r"queries: expected a torch.Tensor, got list"),
        ({"queries": torch.tensor(1.0)}, ValueError, r"queries: expected at least one dimension"),
        ({"metric": "dot"}, ValueError, r"metric: expected one of cosine, inner_product, l2"),
        ({"precision": "low"}, ValueError, r"precision: expected one of exact, fast, got 'low'"),
        ({"bank": torch.zeros(5, 4, device="meta")}, ValueError, r"bank: expected the device of q"),
    ],
)
def test_refusals(change, error, message):
    arguments = {"queries": torch.zeros(2, 4), "bank": torch.zeros(5, 4), "k": 2} | change
    with pytest.raises(error, match=message):
        fmkernels.knn(**arguments)
