"""VeRA in PyTorch's modes: opcheck, compiled, autocast, torch.func, checkpointing, threads."""

import copy

import pytest
import torch
import torch._dynamo.testing
from vera_layers import SIZES_OF, layer, of_shared_u, values_and_gradients

import fmkernels
from fmkernels import _library
from fmkernels.ops.vera_expand import VERA_EXPAND, VERA_EXPAND_BACKWARD, cpp
from fmkernels.ops.vera_linear.dense import VERA_DENSE, VERA_DENSE_BACKWARD
from fmkernels.ops.vera_linear.products import (
    VERA_EXPANDED,
    VERA_PRODUCTS,
    VERA_PRODUCTS_BACKWARD,
)
from fmkernels.ops.vera_shrink import VERA_SHRINK, VERA_SHRINK_BACKWARD


@pytest.mark.parametrize("suffix", ["", "_reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_opcheck(suffix, dtype):
    def check(op, *arguments):
        torch.library.opcheck(getattr(torch.ops.fmkernels, op.name + suffix).default, arguments)

    one, many = layer(6, 5, 4, 3).to(dtype), layer(6, 5, 4, 3, 2).to(dtype)
    ids = torch.tensor([1, 0, -1, 1, 1, 0])
    base, u = torch.randn(6, 4, dtype=dtype), torch.randn(6, 3, dtype=dtype)
    check(VERA_SHRINK, one.x, one.A)
    check(VERA_SHRINK_BACKWARD, u, one.A, 5)
    for matrix in (True, False):
        vectors = (one.lambda_d.detach()[None], one.lambda_b.detach()[None])
        check(VERA_EXPAND, base, u.clone().requires_grad_(), *vectors, one.B, None, matrix)
        check(VERA_EXPAND_BACKWARD, base, u, *vectors, one.B, None, matrix, True, not matrix)
    check(VERA_EXPAND, base, u, *many[5:], many.B, ids, False)
    detached = [x.detach() for x in many[5:]]
    check(VERA_EXPAND_BACKWARD, base, u, *detached, many.B, ids, False, False, True)
    for matrix, problem, given in ((True, one, None), (False, many, ids)):
        vectors = [x.reshape(-1, x.shape[-1]) for x in problem[5:]]
        for folds in ((False, False), (False, True), (True, True))[: 3 if matrix else 1]:
            check(VERA_PRODUCTS, *problem[:5], *vectors, given, matrix, *folds)
            for known in (u, u.clone().requires_grad_()):
                adapter = known, problem.A, problem.B, *vectors, given, matrix
                check(VERA_EXPANDED, *problem[:3], *adapter, *folds)
            constant = (x.detach() for x in vectors)
            check(
                VERA_PRODUCTS_BACKWARD, base, problem.weight, u, problem.A, problem.B, *constant,
                given, matrix, folds[1], True, True,
            )  # fmt: skip
    vectors = [x.detach()[None] for x in one[5:]]
    for merged in (True, False):
        check(VERA_DENSE, *one[:3], one.A, one.B, *vectors, merged)
        check(
            VERA_DENSE_BACKWARD, base, one.x.detach(), one.weight, one.weight, one.A, one.B,
            *vectors, merged, True, True,
        )  # fmt: skip


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("form", [*SIZES_OF, "adapters", "dropout", "shared"])
def test_compile_gives_the_same(form, dynamic):
    torch._dynamo.reset()
    several = 3 if form == "adapters" else None
    settings = {"dropout_p": 0.4, "training": True, "seed": 3} if form == "dropout" else {}
    settings |= {"merge": False} if form == "apart" else {}
    function = of_shared_u if form == "shared" else fmkernels.vera_linear
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic)
    most, *sizes = SIZES_OF.get(form, (30, 8, 9, 4))
    for tokens in (most - 1, most):
        problem = layer(tokens, *sizes, several).to(torch.float32)
        if several:
            settings = {"adapter_ids": torch.randint(-1, 3, (tokens,))}
        found = values_and_gradients(compiled, problem, **settings)
        expected = values_and_gradients(function, problem, **settings)
        for a, e in zip(found, expected, strict=True):
            torch.testing.assert_close(a, e)


@pytest.mark.parametrize(
    ("form", "sizes"),
    [
        ("products", (400, 300, 4)),
        ("folded", (64, 50, 4)),
        ("refolded", (8, 9, 4)),
        ("dense", (8, 9, 40)),
        ("adapters", (8, 9, 4)),
        ("dropout", (8, 9, 4)),
        ("halves", (8, 9, 4)),
    ],
)
def test_other_batches_and_seeds_are_no_new_graphs(form, sizes):
    """After the second size: the limit of a compiled function is eight."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    several = 3 if form == "adapters" else None
    problem = layer(60, *sizes, several).to(torch.float32)

    def run(x, ids, seed):
        if form == "halves":
            base = torch.nn.functional.linear(x, *problem[1:3])
            return fmkernels.vera_expand(
                base, fmkernels.vera_shrink(x, problem.A), *problem[5:], problem.B
            )
        settings = {"adapter_ids": ids} if several else {}
        if form == "dropout":
            settings = {"dropout_p": 0.5, "training": True, "seed": seed}
        return fmkernels.vera_linear(x, *problem[1:], **settings)

    compiled = torch.compile(run, backend=counter, fullgraph=True)
    for tokens in range(30, 60, 3):
        x, ids = problem.x[:tokens].detach(), torch.randint(-1, 3, (tokens,))
        torch.testing.assert_close(compiled(x, ids, tokens), run(x, ids, tokens))
    assert counter.frame_count <= 3


@pytest.mark.parametrize("merge", [None, True])
@pytest.mark.parametrize("form", ["products", "refolded", "merged"])
def test_autocast(form, merge):
    """As in PyTorch's own layers: a float32 model computes in bfloat16, gradients in float32."""
    problem = layer(*SIZES_OF[form]).to(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = fmkernels.vera_linear(*problem, merge=merge)
        half = problem.to(torch.bfloat16, torch.float32)
        expected = fmkernels.vera_linear(*half, merge=merge)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected)
    leaves = (problem.x, *problem[5:])
    assert all(grad.dtype == torch.float32 for grad in torch.autograd.grad(y.sum(), leaves))


@pytest.mark.parametrize("form", [*SIZES_OF, "adapters", "expand"])
def test_backward_inside_autocast_of_a_forward_outside(form):
    several = 3 if form == "adapters" else None
    problem = layer(*SIZES_OF.get(form, (30, 8, 9, 4)), several).to(torch.float32)
    settings = {"merge": False} if form == "apart" else {}
    if several:
        settings["adapter_ids"] = torch.randint(-1, 3, (30,))
    leaves = (problem.x, *problem[5:])
    for backend in ("auto", "reference"):
        with fmkernels.backend(backend):
            if form == "expand":
                u = fmkernels.vera_shrink(problem.x, problem.A)
                base = torch.nn.functional.linear(*problem[:3])
                y = fmkernels.vera_expand(base, u, *problem[5:], problem.B)
                leaves = problem[5:]  # PyTorch's own layer multiplies in bfloat16 there
            else:
                y = fmkernels.vera_linear(*problem, **settings)
            expected = torch.autograd.grad(y.sum(), leaves, retain_graph=True)
            with torch.autocast("cpu", torch.bfloat16):
                found = torch.autograd.grad(y.sum(), leaves)
        for a, e in zip(found, expected, strict=True):
            assert a.dtype == torch.float32
            torch.testing.assert_close(a, e)


def test_what_is_changed_between_forward_and_backward_is_refused():
    for form, sizes in SIZES_OF.items():
        for index in (0, 4, 5, 6) if form in ("apart", "merged") else (3, 4, 5, 6):
            problem = layer(*sizes).to(torch.float32)
            x = problem.x * 1.0
            y = fmkernels.vera_linear(x, *problem[1:])
            with torch.no_grad():
                (x, *problem[1:])[index].mul_(2)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.sum().backward()


def test_under_torch_func():
    problem = layer(20, 6, 7, 3).to(torch.float64)

    def loss(d):
        return fmkernels.vera_linear(*problem[:5], d, problem.lambda_b).square().sum()

    found = torch.func.grad(loss)(problem.lambda_d.detach())
    torch.testing.assert_close(
        found, torch.autograd.grad(loss(problem.lambda_d), problem.lambda_d)[0]
    )


@pytest.mark.parametrize("several", [None, 5])
def test_bitwise_the_same_over_runs_and_threads(several):
    """What is our own is; a stock product may change with the number of threads."""
    problem = layer(300, 40, 33, 24, several).to(torch.float32)
    ids = None if several is None else torch.randint(-1, 5, (300,))
    first = values_and_gradients(fmkernels.vera_linear, problem, adapter_ids=ids)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        runs = [
            values_and_gradients(fmkernels.vera_linear, problem, adapter_ids=ids) for _ in range(3)
        ]
        for again in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(again, runs[0], strict=True))
        for a, b in zip(runs[0], first, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(_library.native is None, reason="needs the extension")
def test_our_own_sums_are_bitwise_the_same_over_threads():
    x, y, ids = torch.randn(700, 600), torch.randn(700, 600), torch.randint(-1, 7, (700,))
    M, B, d, b = torch.randn(700, 90), torch.randn(700, 90), torch.randn(1, 90), torch.randn(1, 700)
    first = None
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        found = (cpp._sum_rows(x, y, ids, 7), *cpp.contract(M, B, d, b))
        first = first or found
        assert all(torch.equal(a, e) for a, e in zip(found, first, strict=True))


def test_no_double_backward_and_no_vmap():
    problem = layer(5, 4, 3, 2).to(torch.float32)
    y = fmkernels.vera_linear(*problem)
    (grad,) = torch.autograd.grad(y.sum(), problem.lambda_d, create_graph=True)
    with pytest.raises(RuntimeError, match=r"vera_\w+: double backward is not supported"):
        grad.sum().backward()
    with pytest.raises(NotImplementedError, match="vera_shrink: vmap is not supported"):
        torch.func.vmap(lambda x: fmkernels.vera_shrink(x, problem.A))(problem.x.detach()[:, None])


def test_checkpointing_and_deepcopy_of_a_module():
    class Adapted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            problem = layer(0, 6, 6, 3).to(torch.float32)
            for name in ("weight", "A", "B"):
                self.register_buffer(name, getattr(problem, name))
            self.d = torch.nn.Parameter(problem.lambda_d.detach())
            self.b = torch.nn.Parameter(problem.lambda_b.detach())

        def forward(self, x):
            return fmkernels.vera_linear(
                x, self.weight, None, self.A, self.B, self.d, self.b, dropout_p=0.5, training=True
            )

    module = Adapted()
    x = torch.randn(9, 6, requires_grad=True)
    torch.manual_seed(3)
    plain = torch.autograd.grad(module(x).square().sum(), [x, *module.parameters()])
    torch.manual_seed(3)
    again = torch.utils.checkpoint.checkpoint(copy.deepcopy(module).forward, x, use_reentrant=False)
    copied = torch.autograd.grad(again.square().sum(), x)
    assert torch.equal(copied[0], plain[0])
