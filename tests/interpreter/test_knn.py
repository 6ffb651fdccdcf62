"""The Triton kernels of knn in Triton's interpreter, through the driver that a GPU has.

The answer must be the reference's: the same rows in the same order wherever float64 tells them
apart, and scores but for the rounding of float64. Buffers and tiles are small, so that few rows make
several levels, several parts of a level and queries that overflow.
"""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

import fmkernels
from fmkernels.ops.knn import gpu, gpu_bound, gpu_launch, reference, search
from fmkernels.ops.knn.gpu_config import Plan, Product, Segment, head, segments
from fmkernels.ops.knn.reference import BFLOAT16, FELL_BACK, METRICS, REFERENCE

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")  # NumPy's

metrics = pytest.mark.parametrize("metric", METRICS)


def small_plan(queries, dim, k, low):
    capacity = max(64, 1 << (8 * k - 1).bit_length())
    return Plan(capacity, queries=4, rows=400)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(gpu, "search_plan", small_plan)
    monkeypatch.setattr(gpu, "product", lambda *_: Product(16, 128, 64, 4, 2))
    for name in ("PREPARED", "SCORED", "MERGED"):  # the interpreter takes its time for an operation
        monkeypatch.setattr(gpu_launch, name, 128)


def check(queries, bank, k, metric, *rest, paths=None, near_ties=False):
    """Returns how many rows were scored, per query.

    near_ties: of rows whose scores differ by float64's rounding, either may come first.
    """
    scores, indices, candidates, taken = gpu.knn(queries, bank, k, metric, *rest)
    expected, expected_indices, *_ = reference.knn(queries, bank, k, metric)
    assert scores.dtype == torch.float64
    error = rounding(queries, bank, metric, expected)
    assert torch.where(scores == expected, True, (scores - expected).abs() <= error).all()
    if near_ties:
        found = reference.exact_scores(queries, bank, metric).gather(1, indices)
        assert ((found - expected).abs() <= error).all()
        assert all(len(row.unique()) == k for row in indices)
    else:
        assert torch.equal(indices, expected_indices)
    if paths is not None:
        assert set(taken.tolist()) <= {paths}
    return candidates


def rounding(queries, bank, metric, scores):
    """Of a sum of D products in float64, each of which may be rounded twice, here and there."""
    one = torch.ones(1, dtype=torch.float64)
    norms = [x.double().norm(dim=1).nan_to_num(0, 0, 0) for x in (queries, bank)]
    size = one if metric == "cosine" else norms[0][:, None] * torch.cat([norms[1], one]).amax()
    size = size + scores.abs().nan_to_num(0, 0, 0)
    return 4 * queries.shape[1] * 2.0**-53 * size


@metrics
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize(("queries", "rows", "dim", "k"), [(5, 600, 33, 5), (3, 300, 64, 1)])
def test_parity(metric, dtype, queries, rows, dim, k):
    """Rows of 64 numbers in float16 are multiplied as they are, others are copied."""
    q, bank = torch.randn(queries, dim).to(dtype), torch.randn(rows, dim).to(dtype)
    candidates = check(q, bank, k, metric, paths=BFLOAT16)
    assert (candidates < rows / 2).all()


@metrics
def test_dtypes_may_differ(metric):
    q, bank = torch.randn(3, 64), torch.randn(200, 64)
    for one, other in ((torch.float32, torch.float16), (torch.float64, torch.float32)):
        check(q.to(one), bank.to(other), 4, metric)
        check(q.to(other), bank.to(one), 4, metric)


@metrics
@pytest.mark.parametrize(
    ("queries", "rows", "k"), [(2, 10, 20), (1, 1, 1), (2, 64, 64), (2, 65, 3)]
)
def test_small_banks(metric, queries, rows, k):
    path = REFERENCE if rows <= small_plan(queries, 7, k, None).capacity else BFLOAT16
    check(torch.randn(queries, 7), torch.randn(rows, 7), k, metric, paths=path)


@metrics
def test_nothing_to_search(metric):
    for queries, rows in ((0, 5), (3, 0), (0, 0)):
        check(torch.zeros(queries, 7), torch.zeros(rows, 7), 2, metric)


@metrics
def test_near_ties(metric):
    """Rows that differ by 1e-7: no low precision tells them apart, float64 does."""
    q = torch.randn(3, 16)
    bank = torch.randn(300, 16)
    bank[::3] = q[0] + 1e-7 * torch.randn(100, 16)
    # of cosines near 1, a change of 1e-7 is one of 1e-14
    check(q, bank, 5, metric, near_ties=metric == "cosine")
    bank = bank.double()
    bank[::3] = q[1] + 1e-7 * torch.randn(100, 16)
    check(q, bank, 5, metric, near_ties=metric == "cosine")


@metrics
def test_equal_rows_go_to_the_lower_index(metric):
    """More of them than there is room for: every row is scored."""
    q = torch.randn(3, 8)
    bank = torch.randn(200, 8)
    bank[50:180] = q[1]
    candidates = check(q, bank, 6, metric)
    if metric != "inner_product":
        assert candidates[1] > 200
    check(q, bank[:1].expand(150, 8), 6, metric, paths=FELL_BACK)


@metrics
def test_few_equal_rows_need_no_second_search(metric):
    q = torch.randn(3, 8)
    bank = torch.randn(50, 8).repeat(4, 1)
    check(q, bank, 6, metric, paths=BFLOAT16)


@metrics
def test_rows_in_order_of_their_neighbours(metric):
    """All neighbours lie together, as in a bank that is sorted by class; nothing overflows."""
    q = torch.nn.functional.normalize(torch.randn(4, 16), dim=1)
    classes = torch.nn.functional.normalize(torch.randn(4, 16), dim=1)
    bank = torch.repeat_interleave(classes, 150, 0) + 0.3 * torch.randn(600, 16)
    q = classes[[0, 1, 2, 3]] + 0.1 * q
    check(q, bank, 4, metric, paths=BFLOAT16)


BAD = (float("nan"), float("inf"), -float("inf"))


@metrics
@pytest.mark.parametrize("bad", BAD)
def test_bad_rows(metric, bad):
    q, bank = torch.randn(3, 9), torch.randn(200, 9)
    bank[[0, 77, 125, 199], [1, 3, 5, 7]] = bad
    bank[123] = bad
    check(q, bank, 5, metric)
    check(q, torch.full((100, 9), bad), 3, metric)


@metrics
@pytest.mark.parametrize("bad", BAD)
def test_bad_queries(metric, bad):
    q, bank = torch.randn(4, 9), torch.randn(100, 9)
    q[1, 4] = bad
    q[3] = bad
    check(q, bank, 5, metric)


@metrics
def test_zeros(metric):
    q, bank = torch.randn(3, 9), torch.randn(100, 9)
    q[1] = 0
    bank[50:60] = 0
    check(q, bank, 5, metric)
    check(q, 0 * bank, 5, metric)


@metrics
@pytest.mark.parametrize("scale", [1e-30, 1e-42, 1e18, 1e30])
def test_scales(metric, scale):
    """Of everything, of the queries, of the bank, of a few rows."""
    if metric == "l2" and scale == 1e-42:
        pytest.skip("float32 has so few bits there that distances are equal by the hundred")
    q, bank = torch.randn(3, 9), torch.randn(150, 9)
    once = BFLOAT16 if scale != 1e-42 else None  # there is little left of float32
    check(scale * q, scale * bank, 5, metric, paths=once)
    check(scale * q, bank, 5, metric)
    check(q, scale * bank, 5, metric)
    bank[::50] *= scale
    check(q, bank, 5, metric)


@metrics
def test_norms_of_all_sizes(metric):
    q, bank = torch.randn(4, 9), torch.randn(200, 9)
    bank *= torch.logspace(-20, 15, 200)[torch.randperm(200), None]
    q *= torch.tensor([1e-18, 1e-3, 1.0, 1e14])[:, None]
    check(q, bank, 5, metric)


def test_float64_past_the_range_of_float32():
    q, bank = torch.randn(3, 9).double(), torch.randn(100, 9).double()
    for scale in (1e200, 1e-300):
        for metric in ("cosine", "inner_product"):
            check(q, scale * bank, 5, metric)
        check(scale * q, scale * bank, 5, "cosine")
        check(scale * q, bank / scale, 5, "cosine")


@metrics
def test_an_outlier_channel(metric):
    q, bank = torch.randn(3, 32), torch.randn(300, 32)
    q[:, 5], bank[:, 5] = 100 + q[:, 5], 100 + bank[:, 5]
    check(q, bank, 5, metric)


@metrics
def test_any_strides(metric):
    q, bank = torch.randn(33, 4), torch.randn(33, 150)
    check(q.T, bank.T, 3, metric)
    for dtype in (torch.float32, torch.float16):
        wide = torch.randn(150, 128).to(dtype)
        check(torch.randn(3, 128).to(dtype)[:, ::2], wide[:, ::2], 3, metric)
        check(torch.randn(4, 64).to(dtype)[::2], wide[1::2, 64:], 3, metric)
        check(wide[:1, :64].expand(2, 64), wide[:, :64], 3, metric)
    # the reference's own product gives equal rows scores that differ by rounding
    check(q.T, bank[:, :1].expand(33, 90).T, 3, metric, near_ties=True)


@metrics
def test_large_k(metric):
    q, bank = torch.randn(2, 5), torch.randn(700, 5)
    check(q, bank, 40, metric, paths=BFLOAT16)


@metrics
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_prepared_bank_gives_the_same(metric, dtype):
    q, bank = torch.randn(3, 64), (3 * torch.randn(200, 64)).to(dtype)
    bank[7] = 0
    shadow, norms, residuals = gpu.shadow_of(bank)
    assert shadow.dtype == torch.float16
    check(q, bank, 5, metric, "exact", None, shadow, norms, residuals, paths=BFLOAT16)
    check(q, bank, 5, metric, "exact", None, shadow, None, None, paths=BFLOAT16)
    check(q, bank, 5, metric, "exact", None, bank.float(), norms, residuals, paths=BFLOAT16)


@metrics
def test_rows_below_the_floor_may_be_missing_others_not(metric):
    q, bank = torch.randn(3, 9), torch.randn(300, 9)
    expected, rows, *_ = reference.knn(q, bank, 5, metric)
    floor = expected[:, 2].clone()
    _, indices, candidates, _ = gpu.knn(q, bank, 5, metric, "exact", floor)
    assert torch.equal(indices[:, :3], rows[:, :3])
    assert (candidates < check(q, bank, 5, metric)).all()


@metrics
def test_fast_scores_fewer_rows_and_finds_nearly_the_same(metric):
    q, bank = torch.randn(2, 32), torch.randn(300, 32)
    bank[::10] = q[0] + 1e-3 * torch.randn(30, 32)
    scores, indices, candidates, _ = gpu.knn(q, bank, 5, metric, "fast")
    expected, _, exact_candidates, _ = gpu.knn(q, bank, 5, metric)
    assert (indices >= 0).all()
    assert candidates.sum() < exact_candidates.sum()
    error = 2.0**-7 * (q.norm(dim=1) * bank.norm(dim=1).amax())[:, None]
    assert ((expected - scores) <= error * (2 if metric == "l2" else 1)).all()


def test_the_answer_does_not_depend_on_tiles(monkeypatch):
    q, bank = torch.randn(4, 33), torch.randn(300, 33)
    first = gpu.knn(q, bank, 5)
    monkeypatch.setattr(gpu, "search_plan", lambda *_: Plan(128, queries=3, rows=60))
    monkeypatch.setattr(gpu, "product", lambda *_: Product(32, 32, 64, 4, 2))
    again = gpu.knn(q, bank, 5)
    assert torch.equal(again[0], first[0])
    assert torch.equal(again[1], first[1])


@settings(max_examples=8)
@given(
    st.integers(1, 5), st.integers(1, 300), st.integers(1, 40), st.integers(1, 12),
    st.sampled_from(METRICS), st.booleans(),
)  # fmt: skip
def test_any_shape(queries, rows, dim, k, metric, whole_numbers):
    """Whole numbers have equal scores that are not those of equal rows; a cosine would round."""
    q, bank = torch.randn(queries, dim), torch.randn(rows, dim)
    if whole_numbers and metric != "cosine":
        q, bank = (2 * q).round(), (2 * bank).round()
    check(q, bank, k, metric)


@metrics
@pytest.mark.parametrize("low", [torch.float16, torch.float32])
def test_the_bound_holds_for_every_row(metric, low):
    """v ≤ factor·s + addend − weight·half for every pair, and not by a factor of hundreds."""
    dim = 48
    q, bank = torch.randn(6, dim).double(), torch.randn(200, dim).double()
    bank *= torch.logspace(-3, 3, 200)[:, None]
    queries = gpu.scaled(q, Segment(0, 1, 1, 0, 6), low)
    rows = gpu.scaled(bank, Segment(0, 1, 1, 0, 200), low)
    norms = rows.norm * torch.exp2(rows.exponent)
    torch.testing.assert_close(norms, bank.norm(dim=1))
    bound = gpu_bound.Bound(queries, gpu_bound.scale_exponent(norms), metric, dim)
    factor, addend, half = bound.row_terms(rows)
    products = queries.low.double() @ rows.low.double().T
    upper = products * factor + addend
    middle = products * factor
    if metric == "l2":
        upper, middle = (x - bound.weight()[:, None] * half for x in (upper, middle))
    scores = reference.exact_scores(q, bank, metric)
    v = torch.stack([bound.thresholds(column) for column in scores.T], dim=1).double()
    assert (upper >= v).all()
    error = 2.0**-9 if low == torch.float16 else 2.0**-14
    size = factor * rows.norm
    assert (addend <= error * size + 1e-30).all()
    assert ((middle - v).abs() <= addend + 2.0**-19 * (v.abs() + size)).all()


@metrics
@pytest.mark.parametrize("rounded", ["queries", "rows"])
def test_the_bound_is_needed(metric, rounded):
    """Of one side nothing is rounded, the other's numbers are all rounded down as far as can be."""
    one, other = torch.ones(3, 48).double(), torch.ones(3, 48).double()
    one *= 1 + 2.0**-11 * 0.99  # float16 has 1 and then 1 + 2⁻¹⁰
    q, bank = (one, other) if rounded == "queries" else (other, one)
    whole = Segment(0, 1, 1, 0, 3)
    queries, rows = (gpu.scaled(x, whole, torch.float16) for x in (q, bank))
    bound = gpu_bound.Bound(queries, gpu_bound.scale_exponent(bank.norm(dim=1)), metric, 48)
    factor, addend, half = bound.row_terms(rows)
    v = bound.thresholds(reference.exact_scores(q, bank, metric)[:, 0]).double()
    middle = (queries.low.double() @ rows.low.double().T * factor)[:, 0]
    middle -= bound.weight() * half[0] if metric == "l2" else 0
    assert (middle + addend[0] >= v).all()
    assert (middle + 0.6 * addend[0] < v).all()


def test_the_driver_is_the_op_s_kernel():
    q, bank = torch.randn(3, 9), torch.randn(300, 9)
    with fmkernels.backend("reference"):
        _, expected, *_ = search(q, bank, 4, "cosine")
    assert torch.equal(gpu.knn(q, bank, 4)[1], expected)


def test_every_row_is_in_one_segment():
    for rows, capacity, part in ((1, 4, 9), (5, 4, 1), (1000, 64, 100), (4097, 16, 50)):
        plan = Plan(capacity, 4, part)
        parts = [head(rows, capacity), *segments(rows, plan)]
        found = torch.cat([gpu.rows_of(each, torch.device("cpu")) for each in parts])
        assert torch.equal(found.sort().values, torch.arange(rows))
        assert found.tolist() == [each.row(i) for each in parts for i in range(each.count)]
