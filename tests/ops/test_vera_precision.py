"""VeRA: gradients in half types beside PEFT's, and the sums that stay in float32."""

import pytest
import torch
from vera_layers import (
    arguments_of,
    composed,
    layer,
    peft_layer,
)

import fmkernels
from fmkernels.ops.vera_expand import cpp

NATIVE = cpp.multiplies_bfloat16()
NAMES = ("y", "grad of x", "grad of lambda_d", "grad of lambda_b")


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


@pytest.mark.parametrize("mean", [0.0, 0.5])
@pytest.mark.parametrize("size", [0.0, 1e-3, 0.1, 10.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_gradient_of_x_by_the_folded_weight_errs_no_more_than_a_sum_of_two(dtype, size, mean):
    """However small the update is: neither the sum nor the weight has room for it."""

    def of_two(x, weight, bias, A, B, d, b):
        u = fmkernels.vera_shrink(x, A)
        return fmkernels.vera_linear(x, weight, bias, A, B, d, b, u=u)

    def of_x(function, problem, grad):
        y = function(*problem)
        return torch.autograd.grad(y, problem.x, grad.to(y.dtype))[0]

    errors = {fmkernels.vera_linear: 0.0, of_two: 0.0}
    for _ in range(8):
        problem = layer(512, 96, 80, 8, wider=0)
        problem = problem._replace(lambda_b=size * problem.lambda_b).to(dtype, torch.float32)
        grad = (mean + torch.randn(512, 80)).to(dtype)
        exact = of_x(composed, problem.to(torch.float64), grad)
        for function in errors:
            error = of_x(function, problem, grad) - exact
            errors[function] += (error.norm() / exact.norm()).item()
    folded, added = errors.values()
    assert folded <= 1.02 * added


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
    for inner, rows, columns in (
        (1, 1, 1),
        (7, 5, 3),
        (33, 17, 70),
        (2051, 13, 129),
        (2, 100, 64),
        (1030, 200, 70),
        (0, 7, 3),
    ):
        g, u = (1 + torch.randn(inner, n).bfloat16() for n in (rows, columns))
        exact = g.double().mT @ u.double()
        assert (cpp.sum_of_outer(g, u) - exact).norm() <= 2e-6 * exact.norm()
        S, A = 3 + torch.randn(rows, inner), torch.randn(columns, inner).bfloat16()
        exact = S.double() @ A.double().mT
        assert (cpp.product_of_rows(S, A) - exact).norm() <= 1e-5 * (
            S.norm() * A.norm() / max(inner, 1) ** 0.5
        )
        threads = torch.get_num_threads()
        torch.set_num_threads(3)
        assert torch.equal(cpp.sum_of_outer(g, u), _with_threads(1, cpp.sum_of_outer, g, u))
        torch.set_num_threads(threads)


def _with_threads(count, function, *arguments):
    torch.set_num_threads(count)
    return function(*arguments)


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
