"""VeRA: parity with the formula and with PEFT's layer, gradients, adapters, what is kept, refusals."""

import copy
from collections import Counter

import hypothesis
import pytest
import torch
import torch._dynamo.testing
from hypothesis import strategies as st
from vera_layers import (
    Layer,
    arguments_of,
    composed,
    layer,
    peft_layer,
    pooled,
    values_and_gradients,
)

import fmkernels
from fmkernels import _library, testing
from fmkernels.ops.vera_expand import VERA_EXPAND, VERA_EXPAND_BACKWARD, cpp
from fmkernels.ops.vera_linear import VERA_DENSE, VERA_DENSE_BACKWARD
from fmkernels.ops.vera_linear.formulation import formulation
from fmkernels.ops.vera_linear.products import VERA_PRODUCTS, VERA_PRODUCTS_BACKWARD
from fmkernels.ops.vera_shrink import VERA_SHRINK, VERA_SHRINK_BACKWARD
from fmkernels.testing import assert_parity

NATIVE = cpp.multiplies_bfloat16()
NAMES = ("y", "grad of x", "grad of lambda_d", "grad of lambda_b")
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])

# (tokens, in, out, rank): widths that divide nothing, rank below, equal to and above them
SIZES = [
    (1, 1, 1, 1),
    (7, 5, 6, 4),
    (50, 33, 17, 8),
    (33, 16, 16, 40),
    (129, 20, 9, 9),
    (0, 5, 6, 4),
]
PROBLEMS = 5
FORMS = [{"merge": False}, {"merge": True}, {}]


def check_all(problems, where, **settings):
    """Fail unless ours errs at most twice as much as the formula in the dtype of these problems."""
    adapters = {name: ids for name, ids in settings.items() if name == "adapter_ids"}
    found = pooled(values_and_gradients(fmkernels.vera_linear, x, **settings) for x in problems)
    plain = pooled(values_and_gradients(composed, x, **adapters) for x in problems)
    exact = pooled(
        values_and_gradients(composed, x.to(torch.float64), **adapters) for x in problems
    )
    check(found, plain, exact, where)


def check(found, plain, exact, where):
    for name, a, same, right in zip(NAMES, found, plain, exact, strict=True):
        if a.dtype == torch.float64:  # where both have float64's rounding
            assert (a - right).norm() <= 1e-13 * right.norm(), f"{name}, {where}"
        else:  # gradients of float32 vectors have the precision of the products
            narrow = found[0].dtype
            assert_parity(a.to(narrow), same.to(narrow), right, name=f"{name}, {where}")


@every_dtype
def test_parity_with_the_formula(dtype):
    """The vectors in float32, as users have them over a half-precision base, or in x's dtype."""
    for size in SIZES:
        for vectors in {dtype, torch.promote_types(dtype, torch.float32)}:
            problems = [layer(*size, bias=size[0] != 7).to(dtype, vectors) for _ in range(PROBLEMS)]
            for form in FORMS:
                if form.get("merge") and dtype in (torch.float16, torch.bfloat16):
                    continue  # rounds the update: see below
                check_all(problems, f"{size}, {form}", **form)


@every_dtype
def test_parity_of_many_adapters(dtype):
    wide = torch.promote_types(dtype, torch.float32)
    for size in SIZES:
        problems = [layer(*size, adapters=5).to(dtype, wide) for _ in range(PROBLEMS)]
        ids = torch.randint(-1, 4, size[:1])  # of the last one there is no row
        check_all(problems, f"{size}", adapter_ids=ids)
        found = values_and_gradients(fmkernels.vera_linear, problems[0], adapter_ids=ids)
        assert all((grad[4] == 0).all() for grad in found[2:])


@every_dtype
def test_the_reference_too(dtype):
    for size in SIZES[:4]:
        problems = [layer(*size).to(dtype) for _ in range(PROBLEMS)]
        with fmkernels.backend("reference"):
            for form in ({"merge": False}, {}):
                if dtype in (torch.float32, torch.float64) or form:
                    check_all(problems, f"{size}, {form}", **form)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_merging_in_a_half_type_rounds_as_peft_s_merge_does(dtype):
    problem = layer(60, 24, 20, 40).to(dtype, torch.float32)
    update = fmkernels.vera_delta_weight(problem.A[:, :24], *problem[4:])
    merged = (problem.weight.double() + update.double()).to(dtype)
    found = fmkernels.vera_linear(*problem, merge=True)
    exact = problem.x.double() @ merged.double().mT + problem.bias.double()
    error = (found.double() - exact).norm() / exact.norm()
    assert error < 2 * torch.finfo(dtype).eps
    default = fmkernels.vera_linear(*problem)
    assert torch.equal(default, fmkernels.vera_linear(*problem, merge=False))


@hypothesis.given(
    tokens=st.integers(0, 40), into=st.integers(1, 40), out=st.integers(1, 40),
    rank=st.integers(1, 60), adapters=st.sampled_from([None, 1, 3]), bias=st.booleans(),
    merge=st.sampled_from([None, False]),
)  # fmt: skip
def test_any_shape(tokens, into, out, rank, adapters, bias, merge):
    problem = layer(tokens, into, out, rank, adapters, bias).to(torch.float32)
    several = adapters is not None
    ids = {"adapter_ids": torch.randint(-1, adapters, (tokens,))} if several else {}
    found = values_and_gradients(
        fmkernels.vera_linear, problem, merge=None if several else merge, **ids
    )
    exact = values_and_gradients(composed, problem.to(torch.float64), **ids)
    for name, a, b in zip(NAMES, found, exact, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm() + 1e-6, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("into", "out", "rank"), [(24, 40, 16), (16, 16, 64)])
def test_is_peft_s_layer(dtype, into, out, rank):
    """Over bfloat16 PEFT computes in float32: ours errs like the formula in bfloat16."""
    found, peft, plain, exact = [], [], [], []
    for _ in range(PROBLEMS):
        problem = layer(50, into, out, rank).to(dtype)
        theirs = peft_layer(problem.weight, problem.bias, rank)
        ours = arguments_of(theirs, problem.x)
        assert torch.equal(ours.A.float(), theirs.vera_A["default"].float())
        vectors = (theirs.vera_lambda_d["default"], theirs.vera_lambda_b["default"])
        given = ours._replace(lambda_d=vectors[0], lambda_b=vectors[1])
        peft.append(values_and_gradients(lambda x, *_, theirs=theirs: theirs(x), given))
        found.append(values_and_gradients(fmkernels.vera_linear, ours))
        plain.append(values_and_gradients(composed, ours))
        exact.append(values_and_gradients(composed, ours.to(torch.float64)))
    found, peft, plain, exact = map(pooled, (found, peft, plain, exact))
    check(found, plain, exact, "PEFT's layer")
    for name, a, b in zip(NAMES, found, peft, strict=True):
        assert a.dtype == b.dtype
        assert (a.double() - b.double()).norm() <= 4 * torch.finfo(dtype).eps * b.double().norm(), (
            name
        )


@pytest.mark.parametrize("mean", [0.0, 0.5])
@pytest.mark.parametrize(("width", "rank"), [(96, 128), (256, 64)])
@pytest.mark.parametrize("by", ["extension", "reference"])
def test_bfloat16_gradients_err_no_more_than_peft_s_under_autocast(
    width, rank, mean, by, monkeypatch
):
    """Of sums over 2,048 tokens, also where x and the gradient have a mean; in every form."""
    monkeypatch.setattr(cpp, "multiplies_bfloat16", lambda: by == "extension" and NATIVE)
    if by == "extension" and not NATIVE:
        pytest.skip("needs the extension and AVX512-BF16")
    problem = layer(2048, width, width, rank, wider=0)
    problem = problem._replace(x=problem.x + mean)
    theirs = peft_layer(problem.weight.bfloat16(), problem.bias.bfloat16(), rank)
    ours = arguments_of(theirs, problem.x.bfloat16())
    generator = torch.Generator().manual_seed(5)
    grad = torch.randn(2048, width, dtype=torch.float64, generator=generator)
    grad = (
        grad + 0.4 * mean * torch.randn(width, dtype=torch.float64, generator=generator)
    ).bfloat16()

    def gradients(function, arguments):
        y = function(*arguments)
        leaves = (arguments[0], *arguments[5:])
        return torch.autograd.grad(y, leaves, grad.to(y.dtype))

    def under_autocast(x, *_):
        with torch.autocast("cpu", torch.bfloat16):
            return theirs(x)

    def expanded(x, weight, bias, A, B, d, b):
        base = torch.nn.functional.linear(x, weight, bias)
        return fmkernels.vera_expand(base, fmkernels.vera_shrink(x, A), d, b, B)

    vectors = (theirs.vera_lambda_d["default"], theirs.vera_lambda_b["default"])
    peft = gradients(under_autocast, (*ours[:5], *vectors))
    exact = gradients(composed, ours.to(torch.float64))
    for function in (fmkernels.vera_linear, expanded):
        found = gradients(function, ours)
        for name, a, b, right in zip(NAMES[1:], found, peft, exact, strict=True):
            mine, its = ((x.double() - right).norm() / right.norm() for x in (a, b))
            # of x both are one rounding, and a few of what was rounded before
            assert mine <= (1.0 if name != "grad of x" else 1.05) * its, (
                f"{name}: {mine:.2e}, PEFT {its:.2e}"
            )


@pytest.mark.parametrize("rank", [8, 200])
def test_sums_over_many_rows_do_not_overflow_in_float16(rank):
    problem = layer(4096, 64, 64, rank)
    problem = problem._replace(x=problem.x.abs()).to(torch.float16, torch.float32)
    y = fmkernels.vera_linear(*problem, merge=False)
    grads = torch.autograd.grad(y, problem[5:], torch.full_like(y, 16.0))
    assert all(grad.isfinite().all() for grad in grads)


def test_products_of_bfloat16_with_sums_in_float32():
    if not NATIVE:
        pytest.skip("needs the extension and AVX512-BF16")
    for inner, rows, columns in ((1, 1, 1), (7, 5, 3), (33, 17, 70), (2051, 13, 129), (2, 100, 64)):
        g, u = (1 + torch.randn(inner, n).bfloat16() for n in (rows, columns))
        exact = g.double().mT @ u.double()
        assert (cpp.sum_of_outer(g, u) - exact).norm() <= 2e-6 * exact.norm()
        S, A = 3 + torch.randn(rows, inner), torch.randn(columns, inner).bfloat16()
        exact = S.double() @ A.double().mT
        assert (cpp.product_of_rows(S, A) - exact).norm() <= 1e-5 * (
            S.norm() * A.norm() / inner**0.5
        )
        threads = torch.get_num_threads()
        torch.set_num_threads(3)
        assert torch.equal(cpp.sum_of_outer(g, u), _with_threads(1, cpp.sum_of_outer, g, u))
        torch.set_num_threads(threads)


def _with_threads(count, function, *arguments):
    torch.set_num_threads(count)
    return function(*arguments)


@pytest.mark.parametrize(
    "form", [{"merge": False}, {}, {"adapter_ids": torch.tensor([1, -1, 0, 1, 0])}]
)
def test_gradients_of_the_reference_are_those_of_finite_differences(form):
    several = 2 if "adapter_ids" in form else None
    for rank in (3, 9):
        problem = layer(5, 4, 3, rank, several).to(torch.float64)

        def run(x, d, b, problem=problem):
            return fmkernels.vera_linear(x, *problem[1:5], d, b, **form)

        with fmkernels.backend("reference"):
            assert torch.autograd.gradcheck(run, (problem.x, *problem[5:]))


@pytest.mark.parametrize(
    "form", [{"merge": False}, {}, {"adapter_ids": torch.tensor([1, -1, 0] * 10)}]
)
@pytest.mark.parametrize("rank", [3, 20])
def test_every_memory_layout_gives_the_same(form, rank):
    """But for the rounding of stock products, which depends on the strides of a matrix."""
    several = 2 if "adapter_ids" in form else None
    problem = layer(30, 8, 9, rank, several).to(torch.float32)

    def check(found, where):
        for a, e in zip(found, expected, strict=True):
            torch.testing.assert_close(a, e, msg=where)

    expected = values_and_gradients(fmkernels.vera_linear, problem, **form)
    for index, value in enumerate(problem):
        for name, laid_out in testing.layouts(value):
            laid_out.requires_grad_(value.requires_grad)
            changed = Layer(*problem[:index], laid_out, *problem[index + 1 :])
            found = values_and_gradients(fmkernels.vera_linear, changed, **form)
            check(found, f"{Layer._fields[index]}, {name}")
    y = fmkernels.vera_linear(*problem, **form)
    leaves = (problem.x, *problem[5:])
    for grad in (torch.randn(y.shape), torch.ones(y.shape)):
        expected = torch.autograd.grad(y, leaves, grad, retain_graph=True)
        for name, laid_out in testing.layouts(grad):
            check(torch.autograd.grad(y, leaves, laid_out, retain_graph=True), f"gradient, {name}")


def test_leading_dimensions_and_what_is_not_changed():
    problem = layer(24, 8, 9, 4, 3).to(torch.float32)
    ids = torch.randint(-1, 3, (24,), dtype=torch.int32)
    flat = fmkernels.vera_linear(*problem, adapter_ids=ids)
    x = problem.x.unflatten(0, (2, 3, 4))
    cube = fmkernels.vera_linear(x, *problem[1:], adapter_ids=ids.view(2, 3, 4))
    assert torch.equal(cube.flatten(0, 2), flat)
    one = fmkernels.vera_linear(problem.x[0], *problem[1:], adapter_ids=ids[0])
    torch.testing.assert_close(one, flat[0])
    base = torch.nn.functional.linear(*problem[:3]).detach()
    before = base.clone()
    u = fmkernels.vera_shrink(problem.x, problem.A)
    fmkernels.vera_expand(base, u, *problem[5:], problem.B, adapter_ids=ids)
    assert torch.equal(base, before)
    assert fmkernels.vera_linear(x[:0], *problem[1:], adapter_ids=ids[:0].view(0, 3, 4)).shape == (
        0,
        3,
        4,
        9,
    )


def test_rows_without_an_adapter_are_the_base_s_exactly():
    problem = layer(20, 8, 9, 4, 3).to(torch.float32)
    d, b = problem.lambda_d.detach().clone(), problem.lambda_b.detach().clone()
    d[2], b[2] = torch.nan, torch.inf  # nobody's
    ids = torch.randint(-1, 2, (20,))
    base = torch.nn.functional.linear(*problem[:3])
    found = fmkernels.vera_linear(*problem[:5], d, b, adapter_ids=ids)
    assert torch.equal(found[ids < 0], base[ids < 0])
    assert found.isfinite().all()


def test_adapters_one_by_one():
    """Every row, and every adapter's gradient, is that of a call with this adapter alone."""
    problem = layer(40, 8, 9, 4, 6).to(torch.float64)
    ids = torch.tensor([5, 0, 5, 3, -1, 0, 2, 2, 2, 1] * 4)
    found = values_and_gradients(fmkernels.vera_linear, problem, adapter_ids=ids)
    generator = torch.Generator().manual_seed(5)
    grad = torch.randn(40, 9, dtype=torch.float64, generator=generator)
    for adapter in range(6):
        rows = ids == adapter
        d, b = (x[adapter].detach().requires_grad_() for x in problem[5:])
        x = problem.x[rows].detach().requires_grad_()
        y = fmkernels.vera_linear(x, *problem[1:5], d, b)
        alone = [y, *torch.autograd.grad(y, (x, d, b), grad[rows])]
        mixed = [found[0][rows], found[1][rows], found[2][adapter], found[3][adapter]]
        for a, e in zip(mixed, alone, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)
    assert (found[2][4] == 0).all()


def products(function):
    """The sizes (rows, inner, columns) of the matrix products of a call, and how many there are."""
    with torch.profiler.profile(record_shapes=True) as profiled:
        function()
    sizes = Counter()
    for event in profiled.events():
        if event.name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            a, b = event.input_shapes[:2] if event.name == "aten::mm" else event.input_shapes[1:3]
            sizes[a[0], a[1], b[1]] += 1
    return sizes


def test_query_key_and_value_share_one_u_and_one_gradient_of_x():
    tokens, width, rank = 30, 8, 3
    x = torch.randn(tokens, width, requires_grad=True)
    A, B = torch.randn(rank, width), torch.randn(width, rank)

    def step():
        u = fmkernels.vera_shrink(x, A)
        total = 0
        for _ in range(3):
            d, b = torch.randn(rank, requires_grad=True), torch.randn(width, requires_grad=True)
            total = total + fmkernels.vera_expand(torch.zeros(tokens, width), u, d, b, B)
        total.sum().backward()

    assert products(step) == {
        (tokens, width, rank): 1 + 3,  # U; and of each dU
        (tokens, rank, width): 3 + 1,  # Y of each; and dX
        (width, tokens, rank): 3,  # M of each
    }


def kept(function):
    """The tensors that a call keeps for backward."""
    saved = []

    def keep(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        function()
    return saved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("several", [None, 4])
def test_u_and_the_vectors_are_kept_and_nothing_else_of_many_rows(dtype, several):
    problem = layer(90, 32, 24, 4, several).to(dtype, torch.float32)
    ids = None if several is None else torch.randint(-1, 4, (90,))
    saved = kept(lambda: fmkernels.vera_linear(*problem, adapter_ids=ids))
    large = [x for x in saved if x.shape[:1] == (90,) and x.ndim == 2]
    assert [tuple(x.shape) for x in large] == [(90, 4)]
    assert large[0].dtype == dtype
    shared = {x.data_ptr() for x in problem if x is not None}
    rest = [x for x in saved if x.shape[:1] != (90,)]
    assert all(x.data_ptr() in shared for x in rest)


def test_a_dense_form_keeps_x_and_the_update():
    problem = layer(90, 16, 12, 64).to(torch.float32)
    for merge in (False, True):
        saved = kept(lambda merge=merge: fmkernels.vera_linear(*problem, merge=merge))
        own = {x.data_ptr() for x in problem if x is not None}
        assert problem.x.data_ptr() in {x.data_ptr() for x in saved}
        assert [tuple(x.shape) for x in saved if x.data_ptr() not in own] == [(12, 16)]


def test_which_form_is_taken():
    def form(*sizes, dense=True, merge=False):
        return formulation(*sizes, dense=dense, merge=merge)

    roberta, vit, llama = (2048, 768, 768, 1024), (2048, 1024, 1024, 256), (512, 4096, 4096, 256)
    assert form(*roberta) == "apart"
    assert form(*roberta, merge=True) == "merged"
    assert form(*vit) == form(*llama) == "products"
    assert form(*roberta, dense=False, merge=True) == "products"
    assert form(1, 768, 768, 1024, merge=True) == "products"
    for tokens in (1, 16, 300, 5000):
        for rank in (1, 64, 700, 3000):
            costs = {
                "products": tokens * rank * (2 * 640 + 3 * 320),
                "apart": 3 * tokens * 640 * 320 + 2 * 640 * 320 * rank,
            }
            assert form(tokens, 640, 320, rank) == min(costs, key=costs.get)


def test_a_layer_that_is_trained_gets_its_gradients():
    problem = layer(20, 6, 7, 30).to(torch.float64)
    weight, bias = problem.weight.clone().requires_grad_(), problem.bias.clone().requires_grad_()
    arguments = (problem.x, weight, bias, *problem[3:])
    found = values_and_gradients(fmkernels.vera_linear, arguments)
    for a, e in zip(found, values_and_gradients(composed, arguments), strict=True):
        torch.testing.assert_close(a, e)


def test_only_what_is_asked_for_is_differentiated():
    problem = layer(20, 6, 7, 4)
    for rank in (4, 30):
        problem = layer(20, 6, 7, rank).to(torch.float32)
        for wanted in ((0,), (5,), (6,), (5, 6)):
            arguments = [
                x if x is None else x.detach().requires_grad_(i in wanted)
                for i, x in enumerate(problem)
            ]
            found = values_and_gradients(fmkernels.vera_linear, arguments)
            expected = values_and_gradients(composed, arguments)
            for a, e in zip(found, expected, strict=True):
                torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


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
        check(VERA_PRODUCTS, *problem[:5], *vectors, given, matrix)
        vectors = [x.detach() for x in vectors]
        check(
            VERA_PRODUCTS_BACKWARD, base, problem.weight, u, problem.A, problem.B, *vectors,
            given, matrix, True, True,
        )  # fmt: skip
    vectors = [x.detach()[None] for x in one[5:]]
    for merged in (True, False):
        check(VERA_DENSE, *one[:3], one.A, one.B, *vectors, merged)
        check(
            VERA_DENSE_BACKWARD, base, one.x.detach(), one.weight, one.weight, one.A, one.B,
            *vectors, merged, True, True,
        )  # fmt: skip


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("form", ["products", "dense", "adapters", "dropout"])
def test_compile_gives_the_same(form, dynamic):
    torch._dynamo.reset()
    several = 3 if form == "adapters" else None
    rank = 40 if form == "dense" else 4
    settings = {"dropout_p": 0.4, "training": True, "seed": 3} if form == "dropout" else {}
    compiled = torch.compile(fmkernels.vera_linear, fullgraph=True, dynamic=dynamic)
    for tokens in (20, 31):
        problem = layer(tokens, 8, 9, rank, several).to(torch.float32)
        if several:
            settings = {"adapter_ids": torch.randint(-1, 3, (tokens,))}
        found = values_and_gradients(compiled, problem, **settings)
        expected = values_and_gradients(fmkernels.vera_linear, problem, **settings)
        for a, e in zip(found, expected, strict=True):
            torch.testing.assert_close(a, e)


@pytest.mark.parametrize("form", ["products", "dense", "adapters", "dropout", "halves"])
def test_other_batches_and_seeds_are_no_new_graphs(form):
    """After the second size: the limit of a compiled function is eight."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    several = 3 if form == "adapters" else None
    problem = layer(60, 8, 9, 40 if form == "dense" else 4, several).to(torch.float32)

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


@pytest.mark.parametrize("rank", [4, 40])
def test_autocast(rank):
    """As in PyTorch's own layers: a float32 model computes in bfloat16, gradients in float32."""
    problem = layer(30, 8, 9, rank).to(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = fmkernels.vera_linear(*problem)
        expected = fmkernels.vera_linear(*problem.to(torch.bfloat16, torch.float32))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected)
    leaves = (problem.x, *problem[5:])
    assert all(grad.dtype == torch.float32 for grad in torch.autograd.grad(y.sum(), leaves))


@pytest.mark.parametrize("form", ["products", "apart", "merged", "adapters", "expand"])
def test_backward_inside_autocast_of_a_forward_outside(form):
    several = 3 if form == "adapters" else None
    problem = layer(30, 8, 9, 40 if form in ("apart", "merged") else 2, several).to(torch.float32)
    settings = {"merge": form == "merged"} if form in ("apart", "merged") else {}
    if several:
        settings["adapter_ids"] = torch.randint(-1, 3, (30,))
    leaves = (problem.x, *problem[5:])
    for backend in ("auto", "reference"):
        with fmkernels.backend(backend):
            if form == "expand":
                u = fmkernels.vera_shrink(problem.x, problem.A)
                base = torch.nn.functional.linear(*problem[:3])
                y = fmkernels.vera_expand(base, u, *problem[5:], problem.B)
            else:
                y = fmkernels.vera_linear(*problem, **settings)
            expected = torch.autograd.grad(y.sum(), leaves, retain_graph=True)
            with torch.autocast("cpu", torch.bfloat16):
                found = torch.autograd.grad(y.sum(), leaves)
        for a, e in zip(found, expected, strict=True):
            assert a.dtype == torch.float32
            torch.testing.assert_close(a, e, rtol=2e-2, atol=2e-2)


def test_what_is_changed_between_forward_and_backward_is_refused():
    for rank in (2, 40):
        for index in (3, 4, 5, 6) if rank == 2 else (0, 4, 5, 6):
            problem = layer(20, 6, 7, rank).to(torch.float32)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_not_finite_stays_in_rows_without_an_adapter(dtype):
    problem = layer(20, 8, 9, 4, 3).to(dtype, torch.float32)
    ids = torch.arange(20) % 4 - 1
    clean = values_and_gradients(fmkernels.vera_linear, problem, adapter_ids=ids)
    with torch.no_grad():
        problem.x[ids < 0] = torch.nan
    y, grad_x, *grads = values_and_gradients(fmkernels.vera_linear, problem, adapter_ids=ids)
    assert torch.equal(y[ids >= 0], clean[0][ids >= 0])
    assert all(torch.equal(a, e) for a, e in zip((grad_x, *grads), clean[1:], strict=True))


def test_memory_does_not_grow_with_the_number_of_adapters():
    """But for their own rows: what autograd keeps is the same, whatever N."""
    sizes = []
    for count in (2, 500):
        problem = layer(64, 32, 24, 4, count).to(torch.float32)
        ids = torch.randint(-1, count, (64,))
        own = {x.data_ptr() for x in problem if x is not None}
        saved = kept(lambda p=problem, i=ids: fmkernels.vera_linear(*p, adapter_ids=i))
        sizes.append(sum(x.nbytes for x in saved if x.data_ptr() not in own))
    assert sizes[0] == sizes[1]


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


def test_dropout_is_a_function_of_seed_and_position():
    problem = layer(64, 30, 12, 5, bias=False).to(torch.float32)

    def run(problem=problem, **settings):
        settings = {"dropout_p": 0.3, "training": True, "seed": 7} | settings
        return values_and_gradients(fmkernels.vera_linear, problem, **settings)

    first = run()
    assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
    assert not torch.equal(first[0], run(seed=8)[0])
    with fmkernels.backend("reference"):
        for a, b in zip(first, run(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for off in ({"training": False}, {"dropout_p": 0.0}):
        for a, b in zip(
            run(**off), values_and_gradients(fmkernels.vera_linear, problem), strict=True
        ):
            assert torch.equal(a, b)
    torch.manual_seed(1)
    drawn = run(seed=None)
    assert not torch.equal(drawn[0], run(seed=None)[0])
    torch.manual_seed(1)
    assert torch.equal(drawn[0], run(seed=None)[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_drops_its_share_and_backward_drops_the_same(dtype):
    from fmkernels.ops.vera_dropout import vera_dropout
    from fmkernels.ops.vera_dropout.reference import kept as stays

    x = torch.ones(257, 131, dtype=dtype, requires_grad=True)
    for p in (0.1, 0.5, 0.9):
        y = vera_dropout(x, p, seed=2**62 + 1)
        mask = stays(torch.tensor(2**62 + 1), 0, 257, 131, p)
        assert torch.equal(y != 0, mask)
        assert y[mask].unique().item() == torch.tensor(1 / (1 - p), dtype=torch.float64).to(dtype)
        share = (~mask).double().mean().item()
        assert abs(share - p) < 5 * (p * (1 - p) / mask.numel()) ** 0.5
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], y)
    assert (vera_dropout(x, 1.0) == 0).all()
    assert torch.equal(
        vera_dropout(x.mT, 0.5, seed=3).mT == 0,
        vera_dropout(x.mT.contiguous(), 0.5, seed=3).mT == 0,
    )


def test_dropped_numbers_are_those_of_every_release():
    from fmkernels.ops.vera_dropout import vera_dropout

    found = vera_dropout(torch.ones(3, 11), 0.5, seed=2**40 + 3) != 0
    assert ["".join(map(str, row)) for row in found.int().tolist()] == GOLDEN


GOLDEN = ["01110100110", "10010101001", "11111110110"]


def test_delta_weight():
    problem = layer(0, 8, 9, 4)
    d, b = problem[5:]
    exact = b.diag() @ problem.B[:9] @ d.diag() @ problem.A[:, :8]
    for dtype in DTYPES:
        A, B = problem.A[:, :8].to(dtype), problem.B.to(dtype)
        found = fmkernels.vera_delta_weight(A, B, d.float(), b.float())
        right = b.float().double().diag() @ B[:9].double() @ d.float().double().diag() @ A.double()
        assert found.dtype == dtype
        assert (found - right).abs().max() <= 2 * torch.finfo(dtype).eps * right.abs().max()
    leaves = [x.clone().requires_grad_() for x in (problem.A[:, :8], problem.B, d, b)]
    assert torch.autograd.gradcheck(fmkernels.vera_delta_weight, leaves)
    found = fmkernels.vera_linear(
        torch.eye(8).double(), torch.zeros(9, 8).double(), None, *problem[3:]
    )
    torch.testing.assert_close(found.mT, exact)


def test_peft_s_update_is_ours():
    problem = layer(4, 10, 12, 5).to(torch.float32)
    theirs = peft_layer(problem.weight, problem.bias, 5)
    ours = arguments_of(theirs, problem.x)
    found = fmkernels.vera_delta_weight(ours.A[:, :10], *ours[4:])
    torch.testing.assert_close(found, theirs.get_delta_weight("default"))


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


PROBLEM = layer(4, 5, 6, 3).to(torch.float32)
MANY = layer(4, 5, 6, 3, 2).to(torch.float32)
IDS = torch.tensor([0, 1, -1, 0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(4, 7)}, ValueError, r"vera_linear: weight: expected shape \(n, 7\), the inputs of x, got \(6, 5\)"),
        ({"x": torch.zeros(4, 5).int()}, TypeError, r"x: expected a floating-point dtype"),
        ({"x": PROBLEM.x.detach().numpy()}, TypeError, r"x: expected a torch.Tensor, got ndarray"),
        ({"A": torch.zeros(3, 4)}, ValueError, r"A: expected shape \(r, >= 5\) with r >= 1, got \(3, 4\)"),
        ({"A": torch.zeros(0, 5)}, ValueError, r"A: expected shape \(r, >= 5\) with r >= 1, got \(0, 5\)"),
        ({"B": torch.zeros(5, 3)}, ValueError, r"B: expected shape \(>= 6, r\) with r >= 1, got \(5, 3\)"),
        ({"B": torch.zeros(6, 4)}, ValueError, r"B: expected 3 columns, the rank of A, got 4"),
        ({"A": torch.zeros(3, 5).requires_grad_()}, ValueError, r"A: expected a frozen matrix.*A.detach\(\)"),
        ({"B": torch.zeros(6, 3).requires_grad_()}, ValueError, r"B: expected a frozen matrix"),
        ({"lambda_d": torch.zeros(4)}, ValueError, r"lambda_d: expected shape \(3,\), or \(N, 3\) for N >= 1 adapters, got \(4,\)"),
        ({"lambda_b": torch.zeros(5)}, ValueError, r"lambda_b: expected shape \(6,\)"),
        ({"lambda_b": torch.zeros(6).long()}, TypeError, r"lambda_b: expected a floating-point dtype"),
        ({"lambda_d": MANY.lambda_d}, ValueError, r"adapter_ids: expected the adapter of each row, because lambda_d holds 2, got None; for one adapter lambda_d has shape \(3,\)"),
        ({"bias": torch.zeros(5)}, ValueError, r"bias: expected shape \(6,\), got \(5,\)"),
        ({"weight": PROBLEM.weight.to("meta")}, ValueError, r"weight: expected the device of x, cpu, got meta"),
        ({"lambda_d": PROBLEM.lambda_d.to("meta")}, ValueError, r"lambda_d: expected the device of the input, cpu, got meta"),
        ({"training": "yes"}, TypeError, r"training: expected True or False, got 'yes'"),
        ({"dropout_p": 1.5}, ValueError, r"dropout_p: expected a share from 0 to 1, got 1.5"),
        ({"dropout_p": -0.5}, ValueError, r"dropout_p: expected a finite number >= 0"),
        ({"seed": -1, "dropout_p": 0.5, "training": True}, ValueError, r"seed: expected an integer from 0 to 2\*\*63 - 1, got -1"),
    ],
)  # fmt: skip
def test_refusals(change, error, message):
    with pytest.raises(error, match=message):
        fmkernels.vera_linear(**(PROBLEM._asdict() | change))


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (IDS.float(), TypeError, r"adapter_ids: expected integers with a sign, got torch.float32"),
        (IDS.clamp(min=0).to(torch.uint8), TypeError, r"adapter_ids: expected integers with a sign, got torch.uint8"),
        (IDS.tolist(), TypeError, r"adapter_ids: expected a torch.Tensor, got list"),
        (IDS[:3], ValueError, r"adapter_ids: expected one per row, shape \(4,\), got \(3,\)"),
        (IDS + 1, ValueError, r"adapter_ids: expected integers from -1 to 1, got 0 to 2"),
        (IDS - 1, ValueError, r"adapter_ids: expected integers from -1 to 1, got -2 to 0"),
        (IDS.to("meta"), ValueError, r"adapter_ids: expected the device of the input, cpu, got meta"),
    ],
)  # fmt: skip
def test_refusals_of_ids(ids, error, message):
    with pytest.raises(error, match=f"vera_linear: {message}"):
        fmkernels.vera_linear(*MANY, adapter_ids=ids)
    base = torch.zeros(4, 6)
    with pytest.raises(error, match=f"vera_expand: {message}"):
        fmkernels.vera_expand(base, torch.zeros(4, 3), *MANY[5:], MANY.B, adapter_ids=ids)


def test_more_refusals():
    with pytest.raises(
        ValueError,
        match=r"lambda_b: expected as many adapters as lambda_d \(2, 3\) holds, got shape \(3, 6\)",
    ):
        fmkernels.vera_linear(*MANY[:6], torch.zeros(3, 6), adapter_ids=IDS)
    with pytest.raises(
        ValueError, match="merge: expected None or False with adapter_ids, got True"
    ):
        fmkernels.vera_linear(*MANY, adapter_ids=IDS, merge=True)
    with pytest.raises(ValueError, match=r"lambda_d: expected shape .* got \(0, 3\)"):
        fmkernels.vera_linear(*MANY[:5], torch.zeros(0, 3), torch.zeros(0, 6), adapter_ids=IDS)
    with pytest.raises(ValueError, match="merge: expected None or False with dropout, got True"):
        fmkernels.vera_linear(*PROBLEM, merge=True, dropout_p=0.5, training=True)
    with pytest.raises(TypeError, match="merge: expected None, True or False, got 'yes'"):
        fmkernels.vera_linear(*PROBLEM, merge="yes")
    u, base = torch.zeros(4, 3), torch.zeros(4, 6)
    vectors = (PROBLEM.lambda_d, PROBLEM.lambda_b, PROBLEM.B)
    with pytest.raises(
        ValueError, match=r"u: expected shape \(4, r\), the rows of base, got \(3, 3\)"
    ):
        fmkernels.vera_expand(base, u[:3], *vectors)
    with pytest.raises(ValueError, match=r"B: expected 4 columns, the rank of u, got 3"):
        fmkernels.vera_expand(base, torch.zeros(4, 4), *vectors)
    with pytest.raises(ValueError, match=r"vera_shrink: A: expected shape \(r, >= 9\)"):
        fmkernels.vera_shrink(torch.zeros(2, 9), PROBLEM.A)
    with pytest.raises(ValueError, match=r"vera_delta_weight: lambda_d: expected shape \(3,\)"):
        fmkernels.vera_delta_weight(PROBLEM.A, PROBLEM.B, torch.zeros(4), torch.zeros(6))
    with pytest.raises(
        ValueError, match=r"vera_delta_weight: B: expected 3 columns, the rank of A"
    ):
        fmkernels.vera_delta_weight(PROBLEM.A, PROBLEM.B[:, :2], torch.zeros(3), torch.zeros(6))
    with pytest.raises(
        ValueError, match=r"vera_delta_weight: lambda_d: expected shape \(3,\), got \(1, 3\)"
    ):
        fmkernels.vera_delta_weight(PROBLEM.A, PROBLEM.B, torch.zeros(1, 3), torch.zeros(6))
