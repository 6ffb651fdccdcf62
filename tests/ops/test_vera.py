"""VeRA: values and gradients beside the formula and PEFT's layer, for any shape and layout."""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from vera_layers import (
    Layer,
    arguments_of,
    composed,
    layer,
    of_shared_u,
    peft_layer,
    pooled,
    values_and_gradients,
)

import fmkernels
from fmkernels import testing
from fmkernels.testing import assert_parity

NAMES = ("y", "grad of x", "grad of lambda_d", "grad of lambda_b")
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])

# (tokens, in, out, rank): widths that divide nothing, rank below, equal to and above them
SIZES = [
    (1, 1, 1, 1),
    (5, 40, 33, 7),
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
    for size in SIZES[:5]:
        problems = [layer(*size).to(dtype) for _ in range(PROBLEMS)]
        with fmkernels.backend("reference"):
            for form in ({"merge": False}, {}):
                if dtype in (torch.float32, torch.float64) or form:
                    check_all(problems, f"{size}, {form}", **form)


@every_dtype
@pytest.mark.parametrize("by", ["auto", "reference"])
def test_parity_of_a_u_that_is_known(dtype, by):
    """Of large ranks, too, which would take a dense form otherwise; of one adapter, and of many."""
    wide = torch.promote_types(dtype, torch.float32)
    for size in SIZES:
        for adapters in (None, 5):
            ids = {"adapter_ids": torch.randint(-1, 5, size[:1])} if adapters else {}
            problems = [
                layer(*size, adapters, bias=size[0] != 7).to(dtype, wide) for _ in range(PROBLEMS)
            ]
            with fmkernels.backend(by):
                found = pooled(values_and_gradients(of_shared_u, x, **ids) for x in problems)
            plain = pooled(values_and_gradients(composed, x, **ids) for x in problems)
            exact = (values_and_gradients(composed, x.to(torch.float64), **ids) for x in problems)
            check(found, plain, pooled(exact), f"{size}, {adapters}")


def test_a_known_u_is_what_the_layer_multiplies_by():
    """Not X Aᵀ once more; and layers that share it give one gradient of it."""
    problem = layer(9, 5, 6, 4).to(torch.float64)
    u = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    y = fmkernels.vera_linear(*problem, u=u)
    expected = torch.nn.functional.linear(*problem[:3])
    expected = expected + problem.lambda_b * ((u * problem.lambda_d) @ problem.B[:6].mT)
    torch.testing.assert_close(y, expected)
    leaves = (problem.x, u, problem.lambda_d, problem.lambda_b)
    found = torch.autograd.grad(y.square().sum(), leaves)
    for a, e in zip(found, torch.autograd.grad(expected.square().sum(), leaves), strict=True):
        torch.testing.assert_close(a, e)
    trained = problem._replace(weight=problem.weight.requires_grad_())
    torch.testing.assert_close(fmkernels.vera_linear(*trained, u=u), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("merge", [None, True])
def test_y_is_the_same_whether_or_not_there_will_be_a_backward_pass(dtype, merge):
    for size in (*SIZES, (40, 64, 64, 256)):
        problem = layer(*size).to(dtype, torch.float32)
        u = fmkernels.vera_shrink(problem.x.detach(), problem.A)
        for known in (None, u):
            y = fmkernels.vera_linear(*problem, u=known, merge=merge)
            with torch.no_grad():
                assert torch.equal(fmkernels.vera_linear(*problem, u=known, merge=merge), y), size


@pytest.mark.parametrize("how", ["few rows", "many rows", "adapters", "trained"])
def test_of_a_u_without_a_graph_x_gets_all_of_its_gradient(how):
    tokens = 2 if how == "few rows" else 40
    problem = layer(tokens, 5, 6, 4, 3 if how == "adapters" else None).to(torch.float64)
    ids = torch.randint(-1, 3, (tokens,)) if how == "adapters" else None
    if how == "trained":
        problem = problem._replace(weight=problem.weight.requires_grad_())

    def with_u(x, *rest, **settings):
        u = fmkernels.vera_shrink(x.detach(), problem.A)
        return fmkernels.vera_linear(x, *rest, u=u, **settings)

    found = values_and_gradients(with_u, problem, adapter_ids=ids)
    for a, e in zip(found, values_and_gradients(composed, problem, adapter_ids=ids), strict=True):
        torch.testing.assert_close(a, e)


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
