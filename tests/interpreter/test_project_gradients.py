"""The Triton kernels of project_gradients in Triton's interpreter, through the driver of a GPU.

A pass has few rows, so that small batches make several, some of which end within a sample.
"""

import os

import pytest
import torch
from gradients import KINDS, materialized, pair, projections
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.runtime.interpreter import InterpreterBuilder

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from fmkernels.ops.project_gradients import gpu, gpu_config, gpu_launch, philox, reference
from fmkernels.testing import assert_parity

every_kind = pytest.mark.parametrize("kind", KINDS)
a_few_kinds = pytest.mark.parametrize("kind", ["count_sketch", "rademacher", "khatri_rao"])
"""For what is about a sample as a whole: each has its kernels."""


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Few parts and few rows at a time."""
    monkeypatch.setattr(gpu_config, "PARTS", 4)
    monkeypatch.setattr(gpu_config, "GROUP_PARTS", 2)
    monkeypatch.setattr(gpu, "pairs_of_a_pass", lambda pairs, numbers: max(1, min(pairs, 3)))


def project(delta, a, projection, offsets=None):
    rows = delta.shape[1] if delta.ndim == 3 else 1
    return gpu.project_gradients(
        delta.reshape(-1, delta.shape[-1]), a.reshape(-1, a.shape[-1]), offsets, rows,
        *projection.settings(),
    )  # fmt: skip


def check(delta, a, projection):
    found = project(delta, a, projection)
    assert found.dtype == torch.float32
    same_dtype = materialized(delta, a, projection, torch.float32)
    assert_parity(found, same_dtype, materialized(delta, a, projection, torch.float64))
    return found


CASES = [
    (torch.float32, (7, 5, 3)),
    (torch.float16, (9, 33, 40)),
    (torch.float64, (5, 140, 16)),
    (torch.float32, (1, 1, 1)),
]


@every_kind
@pytest.mark.parametrize(("dtype", "layer"), CASES)
def test_parity(kind, dtype, layer):
    bias = layer[0] != 9
    check(*pair(2, 2, *layer[:2], dtype), projections(*layer, bias)[kind])


@pytest.mark.parametrize(
    ("kind", "dim"), [*((kind, 70) for kind in KINDS), ("count_sketch", 3), ("kronecker", 6)]
)
def test_entries_are_the_reference_s(kind, dim, monkeypatch):
    """Gradients with one entry, or only the bias's, read the matrix out: more than a word, a group
    and a tile of it."""
    monkeypatch.setattr(gpu, "pairs_of_a_pass", lambda pairs, numbers: pairs)
    out, into = 3, 140
    projection = projections(out, into, dim, seed=2**40 + 3, layer=5)[kind]
    entry = torch.linspace(0, out * (into + 1) - 1, 16).long()
    row, column = entry // (into + 1), entry % (into + 1)
    column[::4] = torch.tensor([0, 31, 127, 128])
    row[-2:], column[-2:] = torch.tensor([1, 2]), into
    delta, a = torch.eye(out)[row], torch.eye(into + 1)[column, :into]
    found = project(delta, a, projection)
    matrix = projection.materialize().unflatten(1, (out, into + 1))
    expected = matrix[:, row, into] + torch.where(column < into, matrix[:, row, column], 0)
    if kind in ("khatri_rao", "kronecker"):  # products of whole factors
        torch.testing.assert_close(found, expected.mT, rtol=3e-7, atol=1e-7)
    else:
        scale = projection.settings().scale
        assert torch.equal((found / scale).round(), (expected.mT / scale).round())
        torch.testing.assert_close(found, expected.mT, rtol=2e-7, atol=0)


@a_few_kinds
def test_samples_of_any_number_of_rows(kind):
    """As lists of pairs come; the others' rows change nothing, bit for bit."""
    projection = projections(5, 9, 8)[kind]
    counts = [0, 4, 1, 0, 0, 5, 2, 0]
    delta, a = pair(sum(counts), None, 5, 9)
    offsets = torch.tensor([0, *counts]).cumsum(0)
    found = project(delta, a, projection, offsets)
    for b in (1, 5):
        part = slice(int(offsets[b]), int(offsets[b + 1]))
        assert torch.equal(found[b], project(delta[None, part], a[None, part], projection)[0])
    assert found.any(dim=1).tolist() == [count > 0 for count in counts]


@a_few_kinds
def test_bitwise_the_same_over_passes_and_batch_splits(kind, monkeypatch):
    projection = projections(6, 9, 8)[kind]
    delta, a = pair(4, 2, 6, 9)
    whole = project(delta, a, projection)
    assert torch.equal(project(delta[1:], a[1:], projection), whole[1:])
    monkeypatch.setattr(gpu, "pairs_of_a_pass", lambda pairs, numbers: pairs)
    assert torch.equal(project(delta, a, projection), whole)


def test_any_strides():
    projection = projections(6, 5, 8)["khatri_rao"]
    delta, a = torch.randn(6, 3), torch.randn(3, 10)
    expected = project(delta.T.contiguous(), a[:, ::2].contiguous(), projection)
    assert torch.equal(project(delta.T, a[:, ::2], projection), expected)
    same = project(delta.T[:1].expand(3, 6), a[:, ::2], projection)
    assert torch.equal(same[0], expected[0])


@pytest.mark.parametrize("kind", ["count_sketch", "khatri_rao"])
def test_size_is_no_matter(kind):
    projection = projections(6, 5, 8, bias=False)[kind]
    delta, a = pair(2, 2, 6, 5)
    expected = project(delta, a, projection)
    for power in (-100, 100):
        assert torch.equal(project(delta * 2.0**power, a * 2.0**-power, projection), expected)
    for power in (-1000, 1000):
        wide = delta.double() * 2.0**power, a.double() * 2.0**-power
        assert torch.equal(project(*wide, projection), expected)
    for dtype in (torch.float16, torch.float32):
        tiny = torch.finfo(dtype).smallest_normal
        check((tiny * delta).to(dtype), a.to(dtype), projections(6, 5, 8)[kind])
        check((tiny * delta).to(dtype), (tiny * a).to(dtype), projections(6, 5, 8)[kind])
    large = 1e37 * delta.sign(), 1e3 * a.sign()
    check(large[0], 1e-6 * large[1], projections(6, 5, 8)[kind])


@pytest.mark.parametrize("kind", ["count_sketch", "khatri_rao"])
@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")  # NumPy's
def test_what_is_not_finite_stays_in_its_sample(kind):
    projection = projections(6, 5, 8)[kind]
    delta, a = pair(5, 2, 6, 5)
    clean = project(delta, a, projection)
    for value in (torch.nan, -torch.inf):
        delta[1, 1, 3], a[3, 0, 4] = value, value
        found = project(delta, a, projection)
        assert found[[1, 3]].isnan().all()
        assert torch.equal(found[[0, 2, 4]], clean[[0, 2, 4]])


@pytest.mark.parametrize("kind", ["count_sketch", "khatri_rao"])
def test_zeros_and_nothing(kind):
    projection = projections(6, 5, 8)[kind]
    delta, a = pair(2, 2, 6, 5)
    assert torch.equal(project(0 * delta, a, projection), torch.zeros(2, 8))
    assert project(delta[:0], a[:0], projection).shape == (0, 8)
    none = torch.zeros(3, dtype=torch.int64)
    assert torch.equal(project(delta[0, :0], a[0, :0], projection, none), torch.zeros(2, 8))


@pytest.mark.parametrize(("kind", "dim"), [("count_sketch", 3), ("rademacher", 3)])
def test_nothing_is_read_past_the_rows(kind, dim, monkeypatch):
    prepare, load = gpu_launch.prepare, InterpreterBuilder.create_masked_load
    ends = []

    def with_room_behind(*arguments, **named):
        scaled, exponent = prepare(*arguments, **named)
        roomy = torch.zeros(scaled.numel() + 1000)
        end = roomy.data_ptr() + scaled.nbytes
        ends.append((end, end + 4000))
        return roomy[: scaled.numel()].view(scaled.shape).copy_(scaled), exponent

    def checked(builder, pointers, mask, *rest):
        read = pointers.data[mask.data]
        assert not any(((start <= read) & (read < end)).any() for start, end in ends)
        return load(builder, pointers, mask, *rest)

    monkeypatch.setattr(gpu_launch, "prepare", with_room_behind)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", checked)
    check(*pair(2, 1, 6, 5), projections(6, 5, dim)[kind])


@settings(max_examples=5)
@given(
    st.sampled_from(KINDS), st.integers(1, 6), st.integers(1, 140), st.integers(16, 70),
    st.booleans(), st.integers(0, 2**63 - 1),
)  # fmt: skip
def test_agrees_with_the_reference(kind, out, into, dim, bias, seed):
    given_seed = {} if kind == "from_matrix" else {"seed": seed, "layer": seed % philox.LAYERS}
    projection = projections(out, into, dim, bias, **given_seed)[kind]
    delta, a = pair(2, None, out, into)
    found = project(delta, a, projection)
    expected = reference.project_gradients(delta, a, None, 1, *projection.settings())
    size = (delta.norm(dim=1) * a.norm(dim=1).hypot(torch.ones(2))).unsqueeze(1)
    size = size * (dim if kind == "from_matrix" else 1)
    assert ((found - expected).abs() <= 1e-5 * size).all()
