"""VeRA's shared matrices: golden values, corners, PEFT's own, statistics, refusals."""

import hashlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fmkernels
from fmkernels import _library
from fmkernels.ops.vera_matrices import INITS, VERA_MATRICES, reference
from fmkernels.ops.vera_matrices.config import LARGEST_SIZE, limits, tile

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SEED = 2**40 + 3
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
# (r, m, n): one entry; words that are not used up; more than a register of counters; several parts
SIZES = [(1, 1, 1), (5, 20, 7), (3, 130, 65), (70, 33, 260), (2, 1030, 300)]


def by_position(*sizes, **settings):
    return fmkernels.vera_matrices(*sizes, init="position", **settings)


def equal(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def numbers(*hexadecimal):
    return [float.fromhex(number) for number in hexadecimal]


GOLDEN = {
    "kaiming_uniform": (
        numbers("0x1.de417cp-1", "-0x1.0eb98p+0", "0x1.270a2p+0", "0x1.cf4dc8p-1", "0x1.302ff8p+0", "-0x1.15941ap+0"),
        numbers("-0x1.299ef8p+0", "0x1.a5fa84p-1", "-0x1.9de7d4p+0", "0x1.b63f7ap+0"),
    ),
    "kaiming_normal": (
        numbers("-0x1.96fe66p-2", "-0x1.f8d9c8p-2", "-0x1.d29ebep-2", "0x1.170e58p-1", "-0x1.4a1d54p-3", "0x1.96163p+0"),
        numbers("-0x1.66d5f2p+0", "-0x1.866de4p-1", "0x1.432e68p-1", "-0x1.cc5b72p-1"),
    ),
    "position": (
        numbers("-0x1.2cf064p-1", "-0x1.6f8604p-1", "-0x1.5dea94p-3", "0x1.315d28p+0", "0x1.052726p+0", "-0x1.5e532cp+0"),
        numbers("0x1.d70d08p-2", "0x1.67ae3ep-1", "-0x1.dd1c5p-1", "0x1.caf542p-2"),
    ),
}  # fmt: skip
"""Rank 2, three inputs, two outputs, seed 5."""


@pytest.mark.parametrize("init", INITS)
def test_entries_are_those_of_every_release(init):
    """A change here changes everyone's checkpoints: it must never happen."""
    matrices = fmkernels.vera_matrices(2, 3, 2, init=init, seed=5)
    for found, expected in zip(matrices, GOLDEN[init], strict=True):
        values = torch.tensor(expected).view_as(found)
        # a logarithm's and a cosine's last bits may depend on the processor
        error = 1e-6 if init == "kaiming_normal" else 0
        torch.testing.assert_close(found, values, rtol=error, atol=0)


def test_many_entries_are_those_of_every_release():
    """Past a register of counters, with a seed whose upper word is used."""
    for backend in ("auto", "reference"):
        with fmkernels.backend(backend):
            A, B = by_position(37, 530, 300, seed=SEED)
        digests = [hashlib.sha256(x.numpy().tobytes()).hexdigest()[:16] for x in (A, B)]
        assert digests == ["d0a5dbad32dcfa9d", "d255ab445eda6caa"]


@every_dtype
@pytest.mark.parametrize("seed", [0, SEED, 2**63 - 1])
def test_the_kernel_s_are_the_reference_s(dtype, seed):
    for sizes in SIZES:
        found = by_position(*sizes, seed=seed, dtype=dtype)
        with fmkernels.backend("reference"):
            expected = by_position(*sizes, seed=seed, dtype=dtype)
        assert equal(found, expected)
        assert [x.dtype for x in found] == [dtype, dtype]
        rank, into, out = sizes
        assert [x.shape for x in found] == [(rank, into), (out, rank)]
        assert equal(found, [x.to(dtype) for x in by_position(*sizes, seed=seed)])


def test_entries_are_the_documented_ones():
    """By Philox's words one at a time, in exact integers and one rounding."""
    A, B = by_position(3, 9, 6, seed=SEED)
    for stream, matrix in ((7, A), (8, B)):
        for i, j in np.ndindex(*matrix.shape):
            counter = tuple(torch.tensor([x]) for x in (j // 4, i, 0, stream * 2**24))
            words = reference.philox4x32(counter, (SEED % 2**32, SEED // 2**32))
            odd = 2 * (int(words[j % 4]) // 2**8) + 1 - 2**24
            assert matrix[i, j].item() == np.float32(odd) * np.float32(math.sqrt(3) / 2**24)


@given(
    st.tuples(*[st.integers(1, 12), st.integers(1, 70), st.integers(1, 70)] * 2),
    st.integers(0, 2**63 - 1),
)
def test_smaller_matrices_are_corners_of_larger_ones(sizes, seed):
    rank, into, out = (min(pair) for pair in zip(sizes[:3], sizes[3:], strict=True))
    small = by_position(rank, into, out, seed=seed)
    for large in (sizes[:3], sizes[3:]):
        A, B = by_position(*large, seed=seed)
        assert equal(small, (A[:rank, :into], B[:out, :rank]))


@pytest.mark.parametrize("init", INITS)
def test_mean_and_variance_and_independence(init):
    rank, into, out = 256, 500, 400
    A, B = fmkernels.vera_matrices(rank, into, out, init=init, seed=1)
    for matrix, fan in ((A, into), (B, rank)):
        x = matrix.double()
        variance = 1.0 if init == "position" else 2 / fan
        mean_error = math.sqrt(variance / x.numel())
        kurtosis = 3.0 if init == "kaiming_normal" else 1.8
        assert abs(x.mean()) < 4 * mean_error
        spread = math.sqrt((kurtosis - 1) / x.numel())
        assert abs(x.square().mean() / variance - 1) < 4 * spread
        if init != "kaiming_normal":
            assert x.abs().max() < math.sqrt(3 * variance)
        # of neighbours in a row (words of one counter) and in a column
        for first, second in ((x[:, 1:], x[:, :-1]), (x[1:], x[:-1])):
            correlation = (first * second).mean() / variance
            assert abs(correlation) < 4 / math.sqrt(first.numel())
    same, other = A[:, :256].double(), B[:256].double()
    correlation = (same * other).mean() / (same.std() * other.std())
    assert abs(correlation) < 4 / 256


def test_seeds_give_independent_matrices():
    """Both words of the seed count."""
    base = by_position(64, 64, 64)[0].double()
    for seed in (1, 2**32, 2**62):
        other = by_position(64, 64, 64, seed=seed)[0].double()
        assert abs((base * other).mean()) < 4 / 64


def test_the_scale_that_belongs_into_lambda_d():
    """With it, products have the variance of kaiming_uniform's: over many outputs."""
    rank, into, out = 64, 96, 20_000
    scale = 2 / math.sqrt(into * rank)
    x = torch.randn(8, into, dtype=torch.float64)
    sizes = []
    for init, factor in (("position", scale), ("kaiming_uniform", 1.0)):
        squares = []
        for seed in range(1, 21):  # 0 is that of x
            A, B = fmkernels.vera_matrices(
                rank, into, out, init=init, seed=seed, dtype=torch.float64
            )
            squares.append(((factor * (x @ A.mT)) @ B.mT).square().mean())
        sizes.append(torch.stack(squares).mean() / x.square().sum(1).mean())
    exact = 4 / into
    # 20 · 8 sums of 64 squares that depend on A
    assert all(abs(size / exact - 1) < 4 * math.sqrt(2 / (20 * 64)) for size in sizes)


class Base(nn.Module):
    """Layers of different sizes: the largest of each kind counts."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(12, 20), nn.Linear(20, 7)


@every_dtype
@pytest.mark.filterwarnings("ignore")  # PEFT's and those of what it imports
def test_kaiming_uniform_is_peft_s(dtype):
    """Over a base of half precision PEFT keeps the rounded numbers, in float32."""
    peft = pytest.importorskip("peft")
    config = peft.VeraConfig(r=5, target_modules=["first", "second"], projection_prng_key=SEED)
    model = peft.get_peft_model(Base().to(dtype), config).base_model
    found = fmkernels.vera_matrices(5, 20, 20, seed=SEED, dtype=dtype)
    assert equal(
        [x.to(model.vera_A["default"].dtype) for x in found],
        (model.vera_A["default"], model.vera_B["default"]),
    )


@every_dtype
def test_kaiming_is_torch_s(dtype):
    for init in INITS[:2]:
        fill = getattr(nn.init, init + "_")
        generator = torch.Generator().manual_seed(SEED)
        expected = [fill(torch.empty(shape), generator=generator) for shape in ((6, 33), (20, 6))]
        before = torch.random.get_rng_state()
        found = fmkernels.vera_matrices(6, 33, 20, init=init, seed=SEED, dtype=dtype)
        assert torch.equal(torch.random.get_rng_state(), before)
        assert equal(found, [x.to(dtype) for x in expected])


@pytest.mark.parametrize("init", INITS)
def test_what_surrounds_a_call_changes_nothing(init):
    """Threads, PyTorch's default dtype and device, its generator."""
    sizes = (64, 1030, 900)
    expected = fmkernels.vera_matrices(*sizes, init=init)
    torch.manual_seed(1)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert equal(fmkernels.vera_matrices(*sizes, init=init), expected)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert equal(fmkernels.vera_matrices(*sizes, init=init), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_defaults():
    A, B = fmkernels.vera_matrices(2, 3, 4)
    assert equal((A, B), fmkernels.vera_matrices(2, 3, 4, init="kaiming_uniform", seed=0))
    assert A.dtype == B.dtype == torch.float32
    assert not A.requires_grad
    sizes = (np.int64(2), np.int32(3), np.int64(4))
    assert equal((A, B), fmkernels.vera_matrices(*sizes, seed=np.int64(0)))


@pytest.mark.parametrize("init", INITS)
def test_on_the_meta_device(init):
    A, B = fmkernels.vera_matrices(2, 3, 4, init=init, device="meta", dtype=torch.bfloat16)
    assert (A.shape, B.shape) == ((2, 3), (4, 2))
    assert A.is_meta
    assert B.is_meta
    assert A.dtype == B.dtype == torch.bfloat16


@pytest.mark.parametrize("suffix", ["", "_reference"])
def test_opcheck(suffix):
    op = getattr(torch.ops.fmkernels, "vera_matrices" + suffix).default
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(op, (torch.tensor(SEED), 4, 5, 6, dtype))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_gives_the_same(dynamic):
    torch._dynamo.reset()

    def adapter(x, seed):
        A, B = by_position(4, x.shape[1], 6, seed=seed, dtype=x.dtype)
        return A, B, x @ A.mT @ B.mT

    compiled = torch.compile(adapter, fullgraph=True, dynamic=dynamic)
    for width in (5, 9):
        x = torch.randn(3, width)
        for seed in (SEED, 2**63 - 1):
            found, expected = compiled(x, seed), adapter(x, seed)
            assert equal(found[:2], expected[:2])
            torch.testing.assert_close(found[2], expected[2])


def test_tiles_and_limits():
    for columns in (1, 3, 4, 5, 64, 65, 256, 5000):
        plan = tile(columns)
        assert plan.rows * plan.groups == 256
        assert plan.groups == 64 or 4 * plan.groups >= columns
    seed = torch.tensor(0)
    assert limits(seed, 8, LARGEST_SIZE, 9, torch.float32) is None
    assert "32 bits" in limits(seed, 8, LARGEST_SIZE + 1, 9, torch.float32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rank": 0}, ValueError, r"vera_matrices: rank: expected an integer >= 1, got 0"),
        ({"rank": 4.0}, ValueError, r"rank: expected an integer >= 1, got 4.0"),
        ({"in_features": -1}, ValueError, r"in_features: expected an integer >= 1, got -1"),
        ({"out_features": None}, ValueError, r"out_features: expected an integer >= 1, got None"),
        ({"out_features": 2**31}, ValueError, r"out_features: expected an integer from 1 to 2,147,482,624, got 2147483648"),
        ({"init": "uniform"}, ValueError, r"init: expected one of kaiming_uniform, kaiming_normal, position, got 'uniform'"),
        ({"seed": -1}, ValueError, r"seed: expected an integer from 0 to 2\*\*63 - 1, got -1"),
        ({"seed": 2**63}, ValueError, r"seed: expected an integer from 0 to 2\*\*63 - 1, got 9223372036854775808"),
        ({"seed": None}, ValueError, r"seed: expected an integer from 0 to 2\*\*63 - 1, got None"),
        ({"seed": True}, ValueError, r"seed: expected an integer"),
        ({"dtype": torch.int32}, TypeError, r"dtype: expected one of torch.float64, torch.float32, torch.float16, torch.bfloat16, got torch.int32"),
        ({"dtype": torch.float8_e4m3fn}, TypeError, r"dtype: expected one of"),
        ({"dtype": "float32"}, TypeError, r"dtype: expected one of .*got 'float32'"),
        ({"device": "nowhere"}, ValueError, r"device: expected a device that PyTorch has here"),
    ],
)  # fmt: skip
def test_refusals(change, error, message):
    arguments = {"rank": 4, "in_features": 5, "out_features": 6, "init": "position"} | change
    with pytest.raises(error, match=message):
        fmkernels.vera_matrices(**arguments)


@pytest.mark.skipif(_library.native is None, reason="needs the extension")
def test_the_kernel_refuses_what_the_public_function_never_passes():
    for seed, rank in (
        (torch.tensor(0.0), 4),
        (torch.zeros(2).long(), 4),
        (torch.tensor(0), 2**32),
    ):
        with pytest.raises(RuntimeError, match="vera_matrices"):
            VERA_MATRICES(seed, rank, 5, 6, torch.float32)
