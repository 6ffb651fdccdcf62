"""The Triton kernels of VeRA in Triton's interpreter, through the functions that a GPU calls.

Beside the reference in float64 by the parity rule. Tiles are the smallest that there are, so that a
few rows make several of each kind.
"""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from fmkernels.ops.dvora_linear import gpu as dvora_gpu
from fmkernels.ops.dvora_linear import reference as dvora
from fmkernels.ops.dvora_linear.gpu_config import Rows, rows_plan
from fmkernels.ops.vera_dropout import gpu as dropout_gpu
from fmkernels.ops.vera_dropout import reference as dropout
from fmkernels.ops.vera_expand import gpu, gpu_config, reference
from fmkernels.ops.vera_expand.blocks import blocks_of
from fmkernels.ops.vera_expand.gpu_config import Contraction
from fmkernels.ops.vera_linear import gpu as fused_gpu
from fmkernels.ops.vera_linear.gpu_config import fused_tile, fuses
from fmkernels.ops.vera_shrink import gpu as shrink_gpu
from fmkernels.ops.vera_shrink import gpu_config as shrink_config
from fmkernels.ops.vera_shrink import reference as shrink
from fmkernels.ops.vera_shrink.gpu_config import Shrink, Tile, shrink_plan
from fmkernels.testing import assert_parity

DTYPES = (torch.float32, torch.float16)
SMALLEST = Tile(16, 16, 16, 4, 2)
NAMES = ("grad_u", "grad_d", "grad_b")

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
not_finite = pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")  # NumPy's
sizes = pytest.mark.parametrize(
    ("tokens", "width", "rank"), [(37, 19, 23), (1, 1, 1), (16, 50, 33), (5, 16, 70)]
)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(gpu, "tile_of", lambda *_, **__: SMALLEST)
    monkeypatch.setattr(gpu, "grad_u_tile", lambda *_: SMALLEST)
    monkeypatch.setattr(gpu, "block_tile", lambda *_: SMALLEST)
    monkeypatch.setattr(gpu, "rows_of_a_block", lambda *_: 16)
    monkeypatch.setattr(gpu_config, "fit", lambda size, most: 16)
    monkeypatch.setattr(gpu_config, "LEAST_ROWS", 16)
    monkeypatch.setattr(shrink_config, "fit", lambda size, most: 16)
    monkeypatch.setattr(shrink_config, "LEAST_FEATURES", 16)
    monkeypatch.setattr(fused_gpu, "fused_tile", lambda *_, **__: SMALLEST)
    monkeypatch.setattr(fused_gpu, "SIDE", 2)


def inputs(tokens, width, rank, dtype=torch.float32, adapters=1):
    """base, u, d, b, B; the shared matrix is that of a wider layer, the vectors of float32.

    Behind the vectors lies what makes products overflow, of which NumPy warns.
    """

    def vectors(size):
        behind = torch.full((1, size), torch.finfo(torch.float32).max)
        return torch.cat([torch.randn(adapters, size), behind])[:-1]

    return (
        torch.randn(tokens, width).to(dtype),
        torch.randn(tokens, rank).to(dtype),
        vectors(rank),
        vectors(width),
        (torch.randn(width + 3, rank) / rank**0.5).to(dtype),
    )


def wide(tensors):
    return [
        x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in tensors
    ]


def check_expand(*arguments):
    found = gpu.vera_expand(*arguments, False)
    assert_parity(
        found,
        reference.vera_expand(*arguments, False),
        reference.vera_expand(*wide(arguments), False),
    )
    return found


def check_backward(grad, *arguments, of_u=True, of_vectors=True):
    """The vector form of the reference, whatever the kernels do."""
    arguments = grad, *arguments, False, of_u, of_vectors
    found = gpu.vera_expand_backward(*arguments)
    same_dtype = reference.vera_expand_backward(*arguments)
    exact = reference.vera_expand_backward(*wide(arguments))
    for name, *tensors in zip(NAMES, found, same_dtype, exact, strict=True):
        assert_parity(*tensors, name=name)
    return found


@dtypes
@sizes
def test_one_adapter(tokens, width, rank, dtype):
    base, *rest = inputs(tokens, width, rank, dtype)
    check_expand(base, *rest, None)
    check_backward(torch.randn_like(base), *rest, None)


@dtypes
@sizes
def test_an_adapter_for_each_row(tokens, width, rank, dtype):
    """In any order, repeated, missing, none."""
    base, *rest = inputs(tokens, width, rank, dtype, adapters=5)
    ids = torch.randint(-1, 4, (tokens,))  # the last is never used
    y = check_expand(base, *rest, ids)
    assert torch.equal(y[ids < 0], base[ids < 0])
    grad_u, grad_d, grad_b = check_backward(torch.randn_like(base), *rest, ids)
    assert (grad_u[ids < 0] == 0).all()
    missing = [i for i in range(5) if i not in ids.tolist()]
    assert (grad_d[missing] == 0).all()
    assert (grad_b[missing] == 0).all()


@pytest.mark.parametrize("ids", [[-1] * 20, [2] * 20, [*range(20)], [0] * 19 + [-1]])
def test_ids(ids):
    base, *rest = inputs(20, 17, 18, adapters=20)
    check_expand(base, *rest, torch.tensor(ids))
    check_backward(torch.randn_like(base), *rest, torch.tensor(ids))


@not_finite
def test_what_is_not_finite_stays_in_its_row():
    base, u, *rest = inputs(20, 17, 18, adapters=2)
    ids = torch.arange(20) % 3 - 1
    u[0], u[1] = torch.nan, torch.inf
    y = gpu.vera_expand(base, u, *rest, ids, False)
    assert torch.equal(y[0], base[0])
    assert not y[1].isfinite().any()
    assert y[2:].isfinite().all()


@pytest.mark.parametrize("adapters", [1, 3])
@pytest.mark.parametrize(("of_u", "of_vectors"), [(True, False), (False, True)])
def test_only_what_is_asked_for(of_u, of_vectors, adapters):
    base, *rest = inputs(20, 17, 18, adapters=adapters)
    ids = None if adapters == 1 else torch.arange(20) % 4 - 1
    found = check_backward(torch.randn_like(base), *rest, ids, of_u=of_u, of_vectors=of_vectors)
    assert [x.numel() > 0 for x in found] == [of_u, of_vectors, of_vectors]


@pytest.mark.parametrize("adapters", [1, 3])
def test_no_rows(adapters):
    base, *rest = inputs(0, 17, 18, adapters=adapters)
    ids = None if adapters == 1 else torch.zeros(0, dtype=torch.int64)
    assert gpu.vera_expand(base, *rest, ids, False).shape == (0, 17)
    grad_u, grad_d, grad_b = gpu.vera_expand_backward(base, *rest, ids, False, True, True)
    assert grad_u.shape == (0, 18)
    assert torch.equal(grad_d, torch.zeros(adapters, 18))
    assert torch.equal(grad_b, torch.zeros(adapters, 17))


@pytest.mark.parametrize("adapters", [1, 3])
def test_any_strides_and_dtypes(adapters):
    base, u, d, b, B = inputs(20, 17, 18, adapters=adapters)
    ids = None if adapters == 1 else torch.stack([torch.arange(20) % 4 - 1] * 2, 1)[:, 0]
    grad = torch.randn_like(base)
    plain = [gpu.vera_expand(base, u, d, b, B, ids, False)]
    plain += gpu.vera_expand_backward(grad, u, d, b, B, ids, False, True, True)
    base, grad, u, B = (x.mT.contiguous().mT for x in (base, grad, u, B))
    u = torch.stack([u, u], 2)[..., 0]
    found = [gpu.vera_expand(base, u, d, b, B, ids, False)]
    found += gpu.vera_expand_backward(grad, u, d, b, B, ids, False, True, True)
    assert all(torch.equal(x, y) for x, y in zip(found, plain, strict=True))
    check_expand(base.half(), u, d, b.half(), B.half(), ids)
    check_backward(grad.half(), u, d.half(), b, B.half(), ids)
    check_expand(base, u.half(), d, b, B, ids)


def test_whole_tiles(monkeypatch):
    """Those that are shipped, of which a tensor may be a part."""
    monkeypatch.undo()
    base, *rest = inputs(70, 40, 35, torch.float16)
    check_expand(base, *rest, None)
    check_backward(torch.randn_like(base), *rest, None)
    base, *rest = inputs(70, 40, 35, torch.float16, adapters=2)
    ids = torch.randint(-1, 2, (70,))
    check_expand(base, *rest, ids)
    check_backward(torch.randn_like(base), *rest, ids)


def test_every_row_is_in_one_block_of_its_adapter():
    for tokens, adapters, rows in ((1, 1, 16), (100, 3, 16), (50, 70, 16), (64, 1, 32)):
        ids = torch.randint(-1, adapters, (tokens,))
        blocks = blocks_of(ids, adapters, rows)
        assert blocks.groups == adapters + 1
        seen = []
        for i, group in enumerate(blocks.group.tolist()):
            if group < blocks.groups:
                first = blocks.start[group] + (i - blocks.first[group]) * rows
                some = blocks.order[first : min(first + rows, blocks.start[group + 1])]
                assert 0 < len(some) <= rows
                assert (ids[some] == group - 1).all()
                seen += some.tolist()
        assert sorted(seen) == [*range(tokens)]


def test_tiles_of_a_gradient_leave_no_multiprocessor_idle(monkeypatch):
    monkeypatch.undo()
    for tokens, rank, columns in ((8192, 256, 128), (32_768, 256, 256), (8192, 1024, 256)):
        assert gpu_config.grad_u_tile(tokens, 4096, rank, torch.float16).columns == columns
    assert gpu_config.grad_u_tile(32_768, 4096, 256, torch.float32).columns == 64


def test_parts_of_the_contraction():
    """A function of sizes alone; every row is in one part, and no part is empty."""
    for tokens in (1, 511, 8192, 100_003):
        for width, rank in ((768, 1024), (4096, 256), (50, 3)):
            plan = gpu_config.contraction(tokens, width, rank, torch.float16)
            assert isinstance(plan, Contraction)
            assert (plan.parts - 1) * plan.tokens < tokens <= plan.parts * plan.tokens
            assert plan.tokens % plan.tile.inner == 0


@dtypes
@pytest.mark.parametrize(("tokens", "features", "rank"), [(20, 70, 19), (1, 1, 1), (3, 33, 40)])
def test_shrink_of_few_rows(tokens, features, rank, dtype):
    x = torch.randn(tokens, features).to(dtype)
    A = (torch.randn(rank, features + 3) / features**0.5).to(dtype)
    found = shrink_gpu.vera_shrink(x, A)
    assert_parity(found, shrink.vera_shrink(x, A), shrink.vera_shrink(x.double(), A.double()))
    strided = x.mT.contiguous().mT, A.mT.contiguous().mT
    assert torch.equal(shrink_gpu.vera_shrink(*strided), found)


def test_shrink_of_many_rows_is_the_library_s():
    x, A = torch.randn(65, 7), torch.randn(3, 9)
    assert torch.equal(shrink_gpu.vera_shrink(x, A), shrink.vera_shrink(x, A))
    assert shrink_gpu.vera_shrink(x[:0], A).shape == (0, 3)
    assert torch.equal(shrink_gpu.vera_shrink(x[:4, :0], A), torch.zeros(4, 3))


def layer(tokens, features, width, rank, dtype=torch.float32, adapters=1, bias=True):
    """x, weight, bias, u, d, b, B."""
    x, weight = torch.randn(tokens, features).to(dtype), torch.randn(width, features).to(dtype)
    return (
        x,
        weight / features**0.5,
        torch.randn(width).to(dtype) if bias else None,
        *inputs(tokens, width, rank, dtype, adapters)[1:],
    )


def composed(x, weight, bias, *adapter):
    base = torch.nn.functional.linear(x, weight, bias)
    return reference.vera_expand(base, *adapter, False)


def check_fused(*arguments):
    found = fused_gpu.vera_fused(*arguments)
    assert_parity(found, composed(*arguments), composed(*wide(arguments)))
    return found


@not_finite
@dtypes
@pytest.mark.parametrize("sizes", [(37, 21, 50, 19), (1, 1, 1, 1), (70, 40, 18, 33)])
def test_base_layer_and_adapter_together(sizes, dtype):
    tokens, *_, width, _ = sizes
    check_fused(*layer(*sizes, dtype), None)
    arguments = layer(*sizes, dtype, adapters=3, bias=False)
    ids = torch.arange(tokens) % 4 - 1
    arguments[3][ids < 0] = torch.nan  # nobody's u
    y = check_fused(*arguments, ids)
    base = torch.nn.functional.linear(*arguments[:3])
    torch.testing.assert_close(y[ids < 0], base[ids < 0])
    assert y.shape == (tokens, width)


def test_together_with_any_strides_and_whole_tiles(monkeypatch):
    x, weight, bias, u, d, b, B = layer(20, 21, 18, 19, torch.float16)
    found = fused_gpu.vera_fused(x, weight, bias, u, d, b, B, None)
    x, weight, u, B = (value.mT.contiguous().mT for value in (x, weight, u, B))
    arguments = x, weight, bias, u, d, b, B.float(), None
    assert torch.equal(fused_gpu.vera_fused(*arguments), found)
    assert fused_gpu.vera_fused(x[:0], weight, bias, u[:0], d, b, B, None).shape == (0, 18)
    monkeypatch.undo()
    check_fused(*layer(20, 30, 40, 17, torch.float16), None)


def test_when_they_are_together(monkeypatch):
    monkeypatch.undo()
    assert fuses(torch.bfloat16, 8192, 384)
    assert not fuses(torch.bfloat16, 8192, 768)
    assert fuses(torch.float16, 64, 4096)
    assert not fuses(torch.float16, 65, 4096)
    assert not fuses(torch.float32, 64, 64)
    large = 8192, 4096, 1024, torch.float16
    for device, columns in (("8.0", 256), ("9.0", 256), ("10.0", 128), (None, 256)):
        assert fused_tile(*large, device, gathered=False).columns == columns
    assert fused_tile(64, *large[1:], "9.0", gathered=True).columns == 32


@not_finite
@dtypes
@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_dropout_is_the_reference_s(p, dtype):
    x = torch.randn(530, 7).to(dtype).mT
    x[0, 3], x[1, 5] = torch.nan, torch.inf
    seed = torch.tensor(2**40 + 12345)
    found, expected = dropout_gpu.vera_dropout(x, seed, p), dropout.vera_dropout(x, seed, p)
    assert found.is_contiguous()
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert dropout_gpu.vera_dropout(x[:0], seed, p).shape == (0, 530)


@dtypes
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("tokens", "width"), [(37, 300), (1, 1), (0, 5)])
def test_magnitude(tokens, width, bias, dtype, monkeypatch):
    monkeypatch.setattr(dvora_gpu, "rows_plan", lambda *_: Rows(16, -(-tokens // 16)))
    before = torch.randn(tokens, width).to(dtype)
    magnitude, norms = torch.randn(width).to(dtype), torch.rand(width) + 0.5
    magnitude[0] = 0
    arguments = before, magnitude, norms, torch.randn(width).to(dtype) if bias else None
    exact = dvora.dvora_scale(*wide(arguments))
    found = dvora_gpu.dvora_scale(*arguments)
    assert_parity(found, dvora.dvora_scale(*arguments), exact)
    strided = before.mT.contiguous().mT, *arguments[1:]
    assert torch.equal(dvora_gpu.dvora_scale(*strided), found)
    arguments = torch.randn(tokens, width).to(dtype), *arguments[:3]
    every = zip(
        ("before", "magnitude", "bias"),
        dvora_gpu.dvora_scale_backward(*arguments),
        dvora.dvora_scale_backward(*arguments),
        dvora.dvora_scale_backward(*wide(arguments)),
        strict=True,
    )
    for name, *tensors in every:
        assert_parity(*tensors, name=name)


def test_every_number_of_a_sum_is_in_one_part():
    for tokens in (1, 63, 8192, 100_003):
        for width in (1, 768, 11_008):
            rows = rows_plan(tokens, width)
            assert (rows.parts - 1) * rows.tokens < tokens <= rows.parts * rows.tokens
            assert rows.tokens % rows.rows == 0
    for tokens, features, rank in ((1, 1, 1), (64, 4096, 256), (5, 300, 1024)):
        plan = shrink_plan(tokens, features, rank, torch.float16)
        assert isinstance(plan, Shrink)
        assert (plan.parts - 1) * plan.features < features <= plan.parts * plan.features
        assert plan.features % plan.tile.inner == 0


def test_again_is_the_same():
    base, *rest = inputs(40, 17, 18, torch.float16, adapters=3)
    ids = torch.randint(-1, 3, (40,))
    arguments = torch.randn_like(base), *rest, ids, False, True, True
    first = gpu.vera_expand_backward(*arguments)
    again = gpu.vera_expand_backward(*arguments)
    assert all(torch.equal(x, y) for x, y in zip(again, first, strict=True))


def test_a_folded_update_is_the_library_s_products():
    x, weight, bias, _, d, b, B = layer(20, 21, 18, 5)
    A, grad = torch.randn(5, 30), torch.randn(20, 18)
    u, adapter = x @ A[:, :21].mT, (A, B, d, b, None, True)
    y = fused_gpu.vera_expanded(x, weight, bias, u, *adapter, True, True)
    found = fused_gpu.vera_products_backward(grad, weight, u, *adapter, True, True, False)
    folded = weight + (b.mT * B[:18] * d) @ A[:, :21]
    torch.testing.assert_close(y, torch.nn.functional.linear(x, folded, bias))
    torch.testing.assert_close(found[0], grad @ folded)
    assert found[1].numel() == found[2].numel() == 0
