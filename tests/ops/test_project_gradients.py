"""Gradient projections: parity with the materialised product, entries, properties."""

import copy
import hashlib
import math
import pickle
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest
import torch
from gradients import KINDS, gradients, materialized, pair, projections
from hypothesis import strategies as st

import fmkernels
from fmkernels import _library, testing
from fmkernels.ops.project_gradients import philox, project
from fmkernels.testing import assert_parity

ROOT = Path(__file__).parent.parent.parent
every_kind = pytest.mark.parametrize("kind", KINDS)
needs_kernel = pytest.mark.skipif(_library.native is None, reason="needs the extension")

# (out, in, K): blocks of a count sketch that are rows, parts of rows, and several rows; one entry;
# outputs that fill no tile; words that are not full
LAYERS = [
    (1, 1, 1),
    (7, 5, 3),
    (33, 64, 16),
    (20, 48, 48),
    (9, 33, 40),
    (40, 129, 7),
    (12, 130, 129),
    (65, 16, 300),
    (3, 900, 33),
    (300, 32, 16),
]


@every_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_parity_with_the_materialized_product(kind, dtype):
    for number, (out, into, dim) in enumerate(LAYERS):
        bias = number % 2 == 0
        projection = projections(out, into, dim, bias)[kind]
        for samples, rows in ((1, None), (40, None), (3, 5), (2, 41)):
            delta, a = pair(samples, rows, out, into, dtype)
            found = fmkernels.project_gradients(delta, a, projection)
            assert found.shape == (samples, dim)
            assert found.dtype == torch.float32
            same_dtype = materialized(delta, a, projection, torch.float32)
            exact = materialized(delta, a, projection, torch.float64)
            assert_parity(found, same_dtype, exact, name=f"{out} x {into} to {dim}, {rows} rows")


@every_kind
def test_the_reference_too(kind):
    projection = projections(33, 40, 30)[kind]
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        delta, a = pair(70, 2, 33, 40, dtype)
        with fmkernels.backend("reference"):
            found = fmkernels.project_gradients(delta, a, projection)
        same_dtype = materialized(delta, a, projection, torch.float32)
        assert_parity(found, same_dtype, materialized(delta, a, projection, torch.float64))


@pytest.mark.parametrize("dim", [384, 768, 1000, 4096])
@pytest.mark.parametrize("kind", ["CountSketch", "KhatriRao", "Kronecker"])
def test_the_sizes_of_vision_transformers(kind, dim):
    """A gradient of 590,592 entries: against the reference in its own tiles."""
    projection = getattr(fmkernels, kind)(768, 768, dim)
    delta, a = pair(2, None, 768, 768, size=1e-8)
    found = fmkernels.project_gradients(delta, a, projection)
    with fmkernels.backend("reference"):
        expected = fmkernels.project_gradients(delta, a, projection)
    assert ((found - expected).norm(dim=1) < 2e-6 * expected.norm(dim=1)).all()
    norms = gradients(delta, a).norm(dim=1)
    spread = math.sqrt({"CountSketch": 2, "KhatriRao": 8}.get(kind, 16 * math.sqrt(dim)) / dim)
    assert ((found.norm(dim=1) / norms).square() - 1).abs().max() < 5 * spread


@every_kind
@pytest.mark.parametrize("bias", [True, False])
def test_every_entry_is_that_of_the_materialized_matrix(kind, bias):
    """Gradients with one entry read the matrix out, exactly."""
    for out, into, dim in [(5, 7, 20), (3, 140, 130), (150, 32, 16), (2, 65, 300)]:
        projection = projections(out, into, dim, bias, seed=2**33 + 5, layer=9)[kind]
        rows, columns = torch.arange(out), torch.arange(into)
        delta = torch.eye(out).repeat_interleave(into, dim=0)
        a = torch.eye(into).repeat(out, 1)
        read = fmkernels.project_gradients(delta, a, projection)  # bias entry included
        matrix = projection.materialize().unflatten(1, (out, into + bias))
        expected = matrix[:, rows[:, None], columns].flatten(1).mT
        if bias:
            of_bias = fmkernels.project_gradients(
                torch.eye(out), torch.zeros(out, into), projection
            )
            torch.testing.assert_close(of_bias, matrix[:, :, into].mT, rtol=2e-7, atol=0)
            expected = expected + of_bias.repeat_interleave(into, dim=0)
        one_rounding = 2e-7 * projection.settings().scale
        torch.testing.assert_close(read, expected, rtol=2e-7, atol=one_rounding)


def digest(projection):
    """Of the signs of all entries, and of which are zero."""
    entries = projection.materialize().sign().to(torch.int8).numpy().tobytes()
    return hashlib.sha256(entries).hexdigest()[:16]


GOLDEN = {
    "count_sketch": "ad4d673d5ccdddc6",
    "count_sketch-repeats": "25c566e7b806737e",
    "rademacher": "05c945ffb0a2693f",
    "khatri_rao": "4e15dcdfa6c0dc5b",
    "kronecker": "34312abb6909cb0a",
}


@pytest.mark.parametrize("kind", GOLDEN)
def test_entries_are_those_of_every_release(kind):
    """A change here changes everyone's features: it must never happen."""
    projection = projections(37, 150, 140, seed=2**40 + 3, layer=5)[kind]
    assert digest(projection) == GOLDEN[kind]


def test_blocks_of_a_sketch_beyond_one_counter_s_are_those_of_every_release():
    """One counter has the signs of 128 blocks; here are 402 of them."""
    assert digest(fmkernels.CountSketch(200, 200, 100)) == "dc90e39058ed9265"


def test_philox_gives_the_published_numbers():
    """The known answers that come with Random123."""
    ones = 0xFFFFFFFF
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
    for counter, key, expected in [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ones,) * 4, (ones,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (*pi, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ]:
        words = philox.philox4x32(tuple(torch.tensor([x]) for x in counter), key)
        assert tuple(int(word) for word in words) == expected


@every_kind
def test_several_losses_in_one_pass(kind):
    projection = projections(20, 30, 25)[kind]
    sizes = [(4, None), (4, 12), (3, 49), (0, 2), (2, 0), (5, 1)]
    pairs = [pair(samples, rows, 20, 30) for samples, rows in sizes]
    together = fmkernels.project_gradients(
        *(list(part) for part in zip(*pairs, strict=True)), projection
    )
    for (delta, a), found in zip(pairs, together, strict=True):
        alone = fmkernels.project_gradients(delta, a, projection)
        assert found.shape == alone.shape
        if _library.native is None:  # a matrix product changes with the batch
            torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-4)
        else:
            assert torch.equal(found, alone)
    assert fmkernels.project_gradients([], [], projection) == []


@every_kind
def test_the_default_dtype_changes_nothing(kind):
    projection = projections(20, 30, 25)[kind]
    delta, a = pair(3, 4, 20, 30)
    empty = delta[:, :0], a[:, :0]
    expected = [fmkernels.project_gradients(*x, projection) for x in ((delta, a), empty)]
    matrix = projection.materialize()
    torch.set_default_dtype(torch.float64)
    try:
        for backend in ("auto", "reference"):
            with fmkernels.backend(backend):
                found = [fmkernels.project_gradients(*x, projection) for x in ((delta, a), empty)]
            for one, other in zip(found, expected, strict=True):
                assert one.dtype == torch.float32
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        assert torch.equal(projection.materialize(), matrix)
        assert projection.materialize().dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_lists_may_mix_dtypes():
    projection = fmkernels.CountSketch(6, 5, 8)
    half, brain = pair(3, None, 6, 5, torch.float16), pair(2, 4, 6, 5, torch.bfloat16)
    found = fmkernels.project_gradients([half[0], brain[0]], [half[1], brain[1]], projection)
    for (delta, a), one in zip((half, brain), found, strict=True):
        torch.testing.assert_close(one, fmkernels.project_gradients(delta, a, projection))


@every_kind
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_of_1e_8_lose_nothing(kind, dtype):
    """What is left of such δ in a half type is projected as exactly as anything."""
    projection = projections(40, 50, 48)[kind]
    delta, a = pair(6, 3, 40, 50, dtype, size=2e-8 if dtype == torch.bfloat16 else 1e-6)
    delta[0] = torch.finfo(dtype).smallest_normal * torch.randn(3, 40)  # subnormal in part
    found = fmkernels.project_gradients(delta, a, projection)
    exact = materialized(delta, a, projection, torch.float64)
    error = (found - exact).norm(dim=1) / exact.norm(dim=1)
    assert (exact.norm(dim=1) > 0).all()
    assert error.max() < 2e-6  # of float32 sums of 6,000 numbers


@every_kind
def test_size_is_no_matter(kind):
    """The scale of a sample is a power of two: the result is the same up to it, bit for bit."""
    projection = projections(20, 30, 25, bias=False)[kind]
    delta, a = pair(4, 2, 20, 30)
    expected = fmkernels.project_gradients(delta, a, projection)
    for power in (-100, -40, 40, 100):
        found = fmkernels.project_gradients(delta * 2.0**power, a * 2.0**-power, projection)
        assert torch.equal(found, expected)
    for power in (-1000, 1000):
        scaled = delta.double() * 2.0**power, a.double() * 2.0**-power
        assert torch.equal(fmkernels.project_gradients(*scaled, projection), expected)


@every_kind
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_in_its_sample(kind, value):
    projection = projections(20, 30, 25)[kind]
    delta, a = pair(5, 2, 20, 30)
    clean = fmkernels.project_gradients(delta, a, projection)
    delta[1, 1, 3], a[3, 0, 29] = value, value
    for backend in ("auto", "reference"):
        with fmkernels.backend(backend):
            found = fmkernels.project_gradients(delta, a, projection)
        assert found[[1, 3]].isnan().all()
        torch.testing.assert_close(found[[0, 2, 4]], clean[[0, 2, 4]])


@every_kind
def test_zeros_and_empty_batches(kind):
    projection = projections(20, 30, 25)[kind]
    delta, a = pair(3, 4, 20, 30)
    for backend in ("auto", "reference"):
        with fmkernels.backend(backend):
            for zero, other in ((0 * delta, a), (delta[:, :0], a[:, :0])):
                found = fmkernels.project_gradients(zero, other, projection)
                assert torch.equal(found, torch.zeros(3, 25))
            for empty in ((delta[:0], a[:0]), (delta[:0, 0], a[:0, 0]), (delta[:0, :0], a[:0, :0])):
                found = fmkernels.project_gradients(*empty, projection)
                assert found.shape == (0, 25)
                assert found.dtype == torch.float32


@every_kind
def test_rows_are_summed(kind):
    projection = projections(20, 30, 25)[kind]
    delta, a = pair(3, 40, 20, 30)
    whole = fmkernels.project_gradients(delta, a, projection)
    each = fmkernels.project_gradients(delta.flatten(0, 1), a.flatten(0, 1), projection)
    exact = materialized(delta, a, projection, torch.float64)
    padded = torch.nn.functional.pad(delta, (0, 0, 3, 9)), torch.nn.functional.pad(a, (0, 0, 3, 9))
    for found in (
        each.unflatten(0, (3, 40)).sum(dim=1),
        fmkernels.project_gradients(*padded, projection),  # rows with δ = 0 change nothing
    ):
        error = (found - exact).norm(dim=1) / exact.norm(dim=1)
        assert max(error) < 1e-6
        assert max((whole - exact).norm(dim=1) / exact.norm(dim=1)) < 1e-6


@every_kind
def test_every_memory_layout_gives_the_same(kind):
    projection = projections(20, 30, 25)[kind]
    for dtype in (torch.float32, torch.float64, torch.float16):
        delta, a = pair(4, 3, 20, 30, dtype)
        expected = fmkernels.project_gradients(delta, a, projection)
        for name, laid_out in testing.layouts(delta):
            assert torch.equal(fmkernels.project_gradients(laid_out, a, projection), expected), name
        for name, laid_out in testing.layouts(a):
            found = fmkernels.project_gradients(delta, laid_out, projection)
            assert torch.equal(found, expected), name
    expanded = delta[:1].expand(4, 3, 20)
    found = fmkernels.project_gradients(expanded, a, projection)
    assert torch.equal(found, fmkernels.project_gradients(expanded.contiguous(), a, projection))


@needs_kernel
@every_kind
def test_bitwise_the_same_over_runs_threads_and_batch_splits(kind):
    for out, into, dim in [(40, 65, 64), (300, 64, 64)]:
        projection = projections(out, into, dim)[kind]
        for samples, rows in ((45, 1), (17, 3), (11, 33)):
            delta, a = pair(samples, rows, out, into)
            whole = fmkernels.project_gradients(delta, a, projection)
            for threads in (2, 1, 3):
                torch.set_num_threads(threads)
                assert torch.equal(fmkernels.project_gradients(delta, a, projection), whole)
            for part in (slice(0, 1), slice(1, 9), slice(9, samples)):
                found = fmkernels.project_gradients(delta[part], a[part], projection)
                assert torch.equal(found, whole[part])


@hypothesis.given(
    kind=st.sampled_from(KINDS),
    out=st.integers(1, 40),
    into=st.integers(1, 140),
    dim=st.integers(1, 140),
    samples=st.integers(0, 5),
    rows=st.integers(0, 4),
    bias=st.booleans(),
    seed=st.integers(0, 2**63 - 1),
)
@hypothesis.settings(max_examples=60)
def test_kernel_and_reference_agree(kind, out, into, dim, samples, rows, bias, seed):
    settings = {} if kind == "from_matrix" else {"seed": seed, "layer": seed % philox.LAYERS}
    projection = projections(out, into, dim, bias, **settings)[kind]
    delta, a = pair(samples, rows, out, into)
    found = fmkernels.project_gradients(delta, a, projection)
    with fmkernels.backend("reference"):
        expected = fmkernels.project_gradients(delta, a, projection)
    size = gradients(delta, a, bias).norm(dim=1, keepdim=True) * (
        dim if kind == "from_matrix" else 1
    )
    assert ((found - expected).abs() <= 1e-5 * size + 1e-12).all()


@pytest.mark.parametrize("suffix", ["", "_reference"])
@every_kind
def test_opcheck(kind, suffix):
    op = getattr(torch.ops.fmkernels, project.name + suffix).default
    settings = projections(6, 5, 8)[kind].settings()
    delta, a = pair(4, None, 6, 5)
    torch.library.opcheck(op, (delta, a, None, 2, *settings))
    offsets = torch.tensor([0, 3, 3, 4])
    torch.library.opcheck(op, (delta.half(), a.half(), offsets, 1, *settings))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_gives_the_same(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(fmkernels.project_gradients, fullgraph=True, dynamic=dynamic)
    for kind in ("count_sketch", "from_matrix"):
        projection = projections(6, 5, 8)[kind]
        for samples in (2, 5):
            delta, a = pair(samples, 3, 6, 5)
            expected = fmkernels.project_gradients(delta, a, projection)
            torch.testing.assert_close(compiled(delta, a, projection), expected)


def test_autocast_and_matmul_precision_change_nothing():
    delta, a = pair(4, 3, 20, 30)
    for projection in projections(20, 30, 25).values():
        with fmkernels.backend("reference"):
            expected = fmkernels.project_gradients(delta, a, projection)
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("medium")
            try:
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    found = fmkernels.project_gradients(delta, a, projection)
            finally:
                torch.set_float32_matmul_precision(before)
        torch.testing.assert_close(found, expected)


def test_results_are_constants_and_vmap_refuses():
    projection = fmkernels.CountSketch(6, 5, 8)
    delta, a = pair(4, 3, 6, 5)
    found = fmkernels.project_gradients(delta.requires_grad_(), a.requires_grad_(), projection)
    assert not found.requires_grad
    with pytest.raises(NotImplementedError, match=r"project_gradients: vmap is not supported"):
        torch.func.vmap(lambda d, x: fmkernels.project_gradients(d, x, projection))(
            delta.detach(), a.detach()
        )


def test_meta_tensors():
    delta, a = (x.to("meta") for x in pair(4, 3, 6, 5))
    found = fmkernels.project_gradients(delta, a, fmkernels.CountSketch(6, 5, 8))
    assert found.shape == (4, 8)


@every_kind
def test_projections_are_values(kind):
    first, again = (projections(6, 5, 8, layer=2)[kind] for _ in range(2))
    assert first == again
    assert hash(first) == hash(again)
    assert first == copy.deepcopy(first) == pickle.loads(pickle.dumps(first))
    assert first == first.from_state_dict(first.state_dict())
    assert first == fmkernels.Projection.from_state_dict(first.state_dict())
    assert first.to("cpu") == first
    assert first != projections(6, 5, 9, layer=2)[kind]
    assert first != "a projection"
    if kind != "from_matrix":
        assert first != projections(6, 5, 8, layer=3)[kind]
        assert first != projections(6, 5, 8, layer=2, seed=1)[kind]
        assert all(isinstance(x, (int, str, tuple)) for x in first.state_dict().values())
    assert first.columns == 6
    with pytest.raises(AttributeError):
        first.dim = 3
    assert repr(first).startswith(type(first).__name__ + "(out_features=6, in_features=5, dim=8")


def test_a_given_matrix_is_told_from_others():
    matrix = torch.ones(3, 8)
    one = fmkernels.Rademacher.from_matrix(matrix, 2, 3)
    matrix[2, 7] = -1
    assert one != fmkernels.Rademacher.from_matrix(matrix, 2, 3)
    assert one != fmkernels.Rademacher(2, 3, 3, seed=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8, torch.bfloat16, torch.float64])
def test_a_given_matrix_is_kept_at_one_bit_per_entry(dtype):
    matrix = (torch.randint(0, 2, (48, 64 * 97)) * 2 - 1).to(dtype)
    projection = fmkernels.Rademacher.from_matrix(matrix, 64, 96)
    assert projection.signs.nbytes == 48 * 64 * 97 / 8
    assert torch.equal(projection.materialize(), matrix.float())


PEERS = ROOT / ".peers"
PROGRAM = ROOT / "tests" / "support" / "fungivision_projection.py"


@pytest.mark.skipif(not (PEERS / "fungivision").exists(), reason="needs fungivision in .peers/")
@pytest.mark.parametrize("bias", [True, False])
def test_is_fungivisions(tmp_path, bias):
    """Its matrix, its per-sample gradients and its product, against the packed bits of the matrix."""
    file = tmp_path / "projected.pt"
    command = [sys.executable, "-P", PROGRAM, PEERS, file, str(int(bias))]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    theirs = torch.load(file, weights_only=True)
    projection = fmkernels.Rademacher.from_matrix(theirs["matrix"], 24, 40, bias=bias)
    found = fmkernels.project_gradients(theirs["grad_output"], theirs["activation"], projection)
    exact = theirs["gradients"].double() @ theirs["matrix"].double().mT
    scaling = theirs["scaling"]
    assert_parity(scaling * found, theirs["projected"], scaling.double() * exact)


LAYER = (6, 5, 8)
DELTA, A = torch.zeros(4, 3, 6), torch.zeros(4, 3, 5)


@needs_kernel
def test_the_kernel_refuses_what_the_public_function_never_passes():
    settings = fmkernels.CountSketch(*LAYER).settings()
    delta, a = DELTA.flatten(0, 1), A.flatten(0, 1)
    for arguments in [
        (delta, a, None, 5, *settings),
        (delta, a, torch.tensor([0, 13]), 1, *settings),
        (delta, a, torch.tensor([0, 8, 4, 12]), 1, *settings),
        (delta, a[:3], None, 1, *settings),
        (delta, a, None, 1, None, "fourier", *settings[2:]),
        (delta, a, None, 1, torch.zeros(3).int(), "rademacher", *settings[2:]),
    ]:
        with pytest.raises(RuntimeError, match="project_gradients"):
            project(*arguments)
