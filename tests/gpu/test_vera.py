"""VeRA and DVoRA on a GPU: values and gradients of every kernel, beside float64 on the device."""

import pytest
import torch
from gpu.target import BACKENDS, DRY_RUN, running

import fmkernels
from fmkernels.ops.dvora_linear import DVORA_SCALE, DVORA_SCALE_BACKWARD
from fmkernels.ops.vera_dropout import VERA_DROPOUT, vera_dropout
from fmkernels.ops.vera_expand import VERA_EXPAND, VERA_EXPAND_BACKWARD
from fmkernels.ops.vera_linear.products import VERA_EXPANDED, VERA_PRODUCTS, VERA_PRODUCTS_BACKWARD
from fmkernels.ops.vera_shrink import VERA_SHRINK
from fmkernels.testing import assert_parity

HALF = [torch.float16, torch.bfloat16]
DTYPES = [torch.float32, *HALF]
EXPAND = ("vera_expand", "vera_expand_backward")

# tokens, in, out, rank
SIZES = [(1, 1, 1, 1), (7, 33, 50, 3), (64, 768, 1000, 256), (2048, 768, 768, 1024)]
SIZES += [(515, 1000, 4096, 256), (1000, 384, 130, 16)]
LARGE = (8192, 1024, 1024, 256)
if DRY_RUN:  # the arithmetic is tested in tests/interpreter; this is about what surrounds it
    SIZES, LARGE = [(5, 4, 3, 2)], (20, 4, 3, 2)

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
halves = pytest.mark.parametrize("dtype", HALF, ids=lambda dtype: str(dtype)[6:])
counts = pytest.mark.parametrize("adapters", [None, 5], ids=["one adapter", "several"])


@pytest.fixture(params=[name for name in BACKENDS if name in VERA_EXPAND.gpu_kernels])
def backend(request):
    return request.param


@pytest.fixture(autouse=True)
def no_bfloat16_in_the_interpreter(request):
    if DRY_RUN and "bfloat16" in request.node.name:
        pytest.skip("Triton's interpreter has no bfloat16")


def layer(sizes, dtype, device, adapters=None):
    """x, weight, bias, A, d, b, B, ids."""
    tokens, into, out, rank = sizes

    def random(*shape):
        return torch.randn(shape, device=device)

    ids = None if adapters is None else torch.randint(-1, adapters, (tokens,), device=device)
    return (
        random(tokens, into).to(dtype),
        (random(out, into) / into**0.5).to(dtype),
        random(out).to(dtype),
        (random(rank, into + 8) / into**0.5).to(dtype),
        random(adapters or 1, rank),
        random(adapters or 1, out),
        (random(out + 8, rank) / rank**0.5).to(dtype),
        ids,
    )


def wide(values):
    return [
        x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in values
    ]


def on_reference(op, *arguments):
    """The reference, whatever runs; under float64 if the arguments are."""
    return op.run(True, *arguments)


def check(op, *arguments):
    """Every result by the parity rule; returns them."""
    found = op.run(False, *arguments)
    results = (found, on_reference(op, *arguments), on_reference(op, *wide(arguments)))
    results = [x if isinstance(x, tuple) else (x,) for x in results]
    for i, tensors in enumerate(zip(*results, strict=True)):
        assert_parity(*tensors, name=f"{op.name}, result {i}")
    return found


@dtypes
@counts
def test_expand(dtype, adapters, backend, verifies, device):
    verifies(*EXPAND)
    with running(backend):
        for sizes in SIZES:
            *_, d, b, B, ids = layer(sizes, dtype, device, adapters)
            base, grad = torch.randn(2, sizes[0], sizes[2], device=device).to(dtype).unbind()
            u = torch.randn(sizes[0], sizes[3], device=device).to(dtype)
            y = check(VERA_EXPAND, base, u, d, b, B, ids, False)
            check(VERA_EXPAND_BACKWARD, grad, u, d, b, B, ids, False, True, True)
            if ids is not None:
                assert torch.equal(y[ids < 0], base[ids < 0])


@dtypes
def test_shrink(dtype, backend, verifies, device):
    verifies("vera_shrink")
    with running(backend):
        for sizes in SIZES:
            x, _, _, A, *_ = layer(sizes, dtype, device)
            check(VERA_SHRINK, x, A)
            check(VERA_SHRINK, x[:3], A)


@halves
@counts
def test_base_layer_and_adapter_together(dtype, adapters, backend, verifies, device):
    verifies("vera_products", "vera_products_backward", "vera_expanded", *EXPAND)
    with running(backend):
        for sizes in SIZES:
            x, weight, bias, A, d, b, B, ids = layer(sizes, dtype, device, adapters)
            unfolded, folded = (False, False), (True, True)
            check(VERA_PRODUCTS, x, weight, bias, A, B, d, b, ids, False, *unfolded)
            one = A, B, d[:1], b[:1], None, True
            check(VERA_PRODUCTS, x[:3], weight, None, *one[:-1], False, *unfolded)
            check(VERA_PRODUCTS, x, weight, bias, *one, *folded)
            u, grad = on_reference(VERA_SHRINK, x, A), torch.randn(len(x), len(weight)).to(x)
            check(VERA_EXPANDED, x, weight, bias, u, A, B, d, b, ids, False, *unfolded)
            check(VERA_PRODUCTS_BACKWARD, grad, weight, u, *one, True, True, True)
            given = grad, weight, u, A, B, d, b, ids, False, False
            found = VERA_PRODUCTS_BACKWARD(*given, True, True)
            expected = VERA_EXPAND_BACKWARD(grad, u, d, b, B, ids, False, True, True)
            own_A = A[:, : weight.shape[1]].to(grad.dtype)
            assert torch.equal(found[0], (grad @ weight).addmm_(expected[0], own_A))
            assert all(torch.equal(a, e) for a, e in zip(found[1:], expected[1:], strict=True))


@dtypes
@pytest.mark.parametrize("settings", [{}, {"dropout_p": 0.3, "training": True, "seed": 5}])
def test_a_layer(settings, dtype, backend, verifies, device):
    """Its form is the one that is chosen; gradients beside those of the same layer in float64."""
    verifies(*EXPAND, "vera_dropout")
    x, weight, bias, A, d, b, B, ids = layer(LARGE, dtype, device, 3)

    def values(x, weight, bias, A, d, b, B):
        leaves = [t.clone().requires_grad_() for t in (x, d, b)]
        y = fmkernels.vera_linear(
            leaves[0], weight, bias, A, B, *leaves[1:], adapter_ids=ids, **settings
        )
        grad = torch.randn(y.shape, device=device, generator=torch.Generator(device).manual_seed(0))
        return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))]

    arguments = (x, weight, bias, A, d, b, B)
    found = values(*arguments)  # on any backend: the base layer has no kernel of ours
    with fmkernels.backend("reference"):
        same_dtype, exact = values(*arguments), values(*wide(arguments))
    for i, tensors in enumerate(zip(found, same_dtype, exact, strict=True)):
        assert_parity(*tensors, name=f"result {i}")


@dtypes
def test_dropout(dtype, backend, verifies, device):
    verifies("vera_dropout")
    with running(backend):
        for tokens, into, *_ in SIZES:
            x = torch.randn(tokens, into, device=device).to(dtype)
            found = vera_dropout(x, 0.25, seed=2**40 + 7)
            expected = on_reference(VERA_DROPOUT, x.cpu(), torch.tensor(2**40 + 7), 0.25)
            assert torch.equal(found.cpu(), expected)


@dtypes
def test_magnitude(dtype, backend, verifies, device):
    verifies("dvora_scale", "dvora_scale_backward")
    with running(backend):
        for tokens, _, out, _ in SIZES:
            before, grad = torch.randn(2, tokens, out, device=device).to(dtype).unbind()
            magnitude, norms = torch.randn(out, device=device), 0.5 + torch.rand(out, device=device)
            magnitude[0] = 0
            check(DVORA_SCALE, before, magnitude, norms, magnitude.to(dtype))
            check(DVORA_SCALE, before, magnitude.to(dtype), norms, None)
            check(DVORA_SCALE_BACKWARD, grad, before, magnitude, norms)


@pytest.mark.gpu  # for the interpreter, tests/interpreter has fewer
@counts
def test_every_memory_layout_gives_the_same(adapters, backend, verifies, device):
    verifies(*EXPAND)
    *_, d, b, B, ids = layer((6, 4, 5, 7), torch.float32, device, adapters)
    base, u = (torch.randn(6, n, device=device).requires_grad_() for n in (5, 7))
    d, b = d.requires_grad_(), b.requires_grad_()
    with running(backend):
        fmkernels.testing.check_gradient_layouts(
            lambda base, u, d, b: VERA_EXPAND(base, u, d, b, B, ids, False), base, u, d, b
        )


@counts
def test_bitwise_the_same_over_runs(adapters, backend, verifies, device):
    verifies(*EXPAND, "dvora_scale_backward")
    tokens, _, out, rank = LARGE
    *_, d, b, B, ids = layer(LARGE, torch.float16, device, adapters)
    grad = torch.randn(tokens, out, device=device).half()
    u = torch.randn(tokens, rank, device=device).half()
    norms = 0.5 + torch.rand(out, device=device)
    with running(backend):

        def once():
            return (
                VERA_EXPAND(grad, u, d, b, B, ids, False),
                *VERA_EXPAND_BACKWARD(grad, u, d, b, B, ids, False, True, True),
                *DVORA_SCALE_BACKWARD(grad, grad, norms, norms),
            )

        first = once()
        for _ in range(1 if DRY_RUN else 5):
            assert all(torch.equal(x, y) for x, y in zip(once(), first, strict=True))


@pytest.mark.gpu
@counts
def test_in_a_graph(adapters, backend, verifies, device):
    """Several adapters, too: the host never waits for the ids."""
    verifies(*EXPAND)
    tokens, _, out, rank = LARGE
    *_, d, b, B, ids = layer(LARGE, torch.bfloat16, device, adapters)
    grad = torch.randn(tokens, out, device=device).bfloat16()
    u = torch.randn(tokens, rank, device=device).bfloat16()
    arguments = grad, u, d, b, B, ids, False, True, True
    with running(backend):
        expected = VERA_EXPAND_BACKWARD(*arguments)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = VERA_EXPAND_BACKWARD(*arguments)
        for x in found:
            x.zero_()
        graph.replay()
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.gpu
def test_rows_past_two_to_the_31(backend, verifies, device, alone):
    """The last rows of a base of 4.3 GB are those of a small one."""
    verifies("vera_expand", "vera_dropout")
    width, rank = 4096, 16
    tokens = 2**31 // width + 100
    *_, d, b, B, _ = layer((1, 1, width, rank), torch.bfloat16, device)
    base = torch.zeros(tokens, width, dtype=torch.bfloat16, device=device)
    u = torch.randn(tokens, rank, device=device).bfloat16()
    with running(backend):
        y = VERA_EXPAND(base, u, d, b, B, None, False)
        few = VERA_EXPAND(base[-200:], u[-200:], d, b, B, None, False)
        assert torch.equal(y[-200:], few)
        dropped = vera_dropout(y, 0.5, seed=1)
    expected = on_reference(VERA_DROPOUT, y, torch.tensor(1, device=device), 0.5)
    assert torch.equal(dropped[-200:], expected[-200:])
