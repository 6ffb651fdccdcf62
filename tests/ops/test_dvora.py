"""DVoRA: parity with DoRA over VeRA written out, norms and their cache, magnitudes, refusals."""

import sys
import threading

import pytest
import torch
from torch import nn
from vera_layers import composed_dvora, layer, pooled, values_and_gradients

import fmkernels
from fmkernels import testing
from fmkernels.ops.dvora_linear import DVORA_SCALE, DVORA_SCALE_BACKWARD
from fmkernels.ops.dvora_linear import norms as norms_module
from fmkernels.testing import assert_parity

NAMES = ("y", "grad of x", "grad of lambda_d", "grad of lambda_b", "grad of magnitude")
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
PROBLEMS = 5
SIZES = [(7, 5, 6, 4), (50, 33, 17, 8), (33, 16, 16, 40), (129, 20, 9, 20), (0, 5, 6, 4)]


def arguments(size, dtype=torch.float64, bias=True):
    """Those of a layer, and the magnitude."""
    problem = layer(*size, bias=bias)
    magnitude = problem.weight.norm(dim=1) * (1 + 0.3 * torch.randn(size[2], dtype=torch.float64))
    vectors = torch.promote_types(dtype, torch.float32)
    return (*problem.to(dtype, vectors), magnitude.to(vectors).requires_grad_())


def widened(given):
    """The same numbers in float64."""
    return [x if x is None else x.detach().double().requires_grad_(x.requires_grad) for x in given]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parity_with_dora_over_vera(dtype):
    for size in SIZES:
        problems = [arguments(size, dtype, bias=size[0] != 7) for _ in range(PROBLEMS)]
        exact = pooled(values_and_gradients(composed_dvora, widened(each)) for each in problems)
        plain = pooled(values_and_gradients(composed_dvora, each) for each in problems)
        for backend in ("auto", "reference"):
            with fmkernels.backend(backend):
                found = pooled(values_and_gradients(fmkernels.dvora_linear, x) for x in problems)
            for name, a, same, right in zip(NAMES, found, plain, exact, strict=True):
                where = f"{name}, {size}, {backend}"
                assert a.dtype == same.dtype
                if dtype == torch.float64:
                    assert (a - right).norm() <= 1e-12 * right.norm(), where
                else:
                    assert_parity(a.to(dtype), same.to(dtype), right, name=where)


@pytest.mark.parametrize(
    ("out", "into", "rank"),
    [
        (9, 30, 5),
        (30, 8, 8),
        (12, 8, 20),
        (1, 1, 1),
        (40, 300, 200),
        (20, 300, 300),
        (20, 150, 333),
    ],
)
def test_norms_are_those_of_the_built_matrix(out, into, rank):
    problem = layer(0, into, out, rank)
    built = problem.weight + fmkernels.vera_delta_weight(problem.A[:, :into], *problem[4:])
    exact = built.norm(dim=1)
    found = fmkernels.DvoraNorms(problem.weight, problem.A, problem.B)(*problem[5:])
    assert ((found - exact).abs() <= 1e-12 * exact).all()
    narrow = problem.to(torch.float32)
    plain = narrow.weight + fmkernels.vera_delta_weight(narrow.A[:, :into], *narrow[4:])
    found = fmkernels.DvoraNorms(narrow.weight, narrow.A, narrow.B)(*narrow[5:])
    wide = narrow.to(torch.float64)
    exact = wide.weight + fmkernels.vera_delta_weight(wide.A[:, :into], *wide[4:])
    assert_parity(found, plain.norm(dim=1).detach(), exact.norm(dim=1).detach())
    given = problem.to(torch.bfloat16, torch.float32)
    found = fmkernels.DvoraNorms(given.weight, given.A, given.B)(*given[5:])
    wide = given.to(torch.float64)
    exact = wide.weight + fmkernels.vera_delta_weight(wide.A[:, :into], *wide[4:])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact.norm(dim=1).float(), rtol=2e-6, atol=0)


@pytest.mark.parametrize("rank", [5, 12, 20])
def test_norms_where_rows_of_the_matrix_depend_on_each_other(rank):
    problem = layer(0, 12, 9, rank)
    problem.A[1] = 0
    problem.A[3] = 2 * problem.A[0]
    built = problem.weight + fmkernels.vera_delta_weight(problem.A[:, :12], *problem[4:])
    found = fmkernels.DvoraNorms(problem.weight, problem.A, problem.B)(*problem[5:])
    torch.testing.assert_close(found, built.norm(dim=1), rtol=1e-12, atol=0)
    problem.A.zero_()
    found = fmkernels.DvoraNorms(problem.weight, problem.A, problem.B)(*problem[5:])
    torch.testing.assert_close(found, problem.weight.norm(dim=1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("rank", [5, 12, 20])
def test_norms_where_the_update_takes_the_weight_away(rank):
    _, _, _, A, B, d, b = layer(0, 12, 9, rank)
    weight = 1e-3 * torch.randn(9, 12, dtype=torch.float64)
    exact = weight.norm(dim=1)
    weight -= fmkernels.vera_delta_weight(A[:, :12], B, d, b).detach()
    found = fmkernels.DvoraNorms(weight, A, B)(d, b)
    torch.testing.assert_close(found, exact, rtol=1e-11, atol=0)
    given = [x.detach().float() for x in (weight, A, B, d, b)]
    plain = given[0] + fmkernels.vera_delta_weight(given[1][:, :12], *given[2:])
    wide = [x.double() for x in given]
    exact = wide[0] + fmkernels.vera_delta_weight(wide[1][:, :12], *wide[2:])
    found = fmkernels.DvoraNorms(*given[:3])(*given[3:])
    assert_parity(found, plain.norm(dim=1), exact.norm(dim=1))


@pytest.fixture
def computed(monkeypatch):
    """How often norms and constants were computed."""
    counts = {"row_norms": 0, "constants": 0}
    for name in counts:
        function = getattr(norms_module, name)

        def counted(*given, name=name, function=function):
            counts[name] += 1
            return function(*given)

        monkeypatch.setattr(norms_module, name, counted)
    return counts


def test_norms_are_computed_again_when_something_changed_and_never_otherwise(computed):
    x, weight, bias, A, B, d, b, magnitude = arguments((20, 6, 5, 3), torch.float32)
    cache = fmkernels.DvoraNorms(weight, A, B)

    def run():
        return fmkernels.dvora_linear(x, weight, bias, A, B, d, b, magnitude, cache=cache)

    def expect(norms, constants):
        once = fmkernels.dvora_linear(x, weight, bias, A, B, d, b, magnitude)
        torch.testing.assert_close(run(), once)
        assert computed == {"row_norms": norms, "constants": constants}

    assert computed == {"row_norms": 0, "constants": 1}
    expect(1, 1)
    for _ in range(3):  # accumulating gradients
        run().sum().backward()
    magnitude.data.mul_(2)
    expect(1, 1)
    optimizer = torch.optim.SGD([d, b, magnitude], lr=0.1)
    optimizer.step()
    expect(2, 1)
    with torch.no_grad():
        b[2] = 5.0
    expect(3, 1)
    d.data = torch.randn(3)
    expect(4, 1)
    weight.mul_(1.5)
    expect(5, 2)
    with torch.no_grad():
        d.copy_(d.clone())
    expect(5, 2)
    d.data.mul_(2)  # PyTorch counts neither this nor what a fused optimizer does
    expect(6, 2)
    run().sum().backward()
    torch.optim.AdamW([d, b], lr=0.1, fused=True).step()
    expect(7, 2)


def test_the_gradient_of_a_magnitude_that_is_zero():
    given = arguments((20, 6, 5, 3))
    with torch.no_grad():
        given[-1][1:3] = 0
    found = values_and_gradients(fmkernels.dvora_linear, given)
    for a, e in zip(found, values_and_gradients(composed_dvora, given), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)
    assert (found[4][1:3] != 0).all()
    assert (found[0][:, 1:3] == given[2][1:3]).all()


def test_begins_as_the_base_layer():
    """b = 0 and the magnitude the norms of the weight: PEFT's initialisation."""
    x, weight, bias, A, B, d, b, _ = arguments((20, 6, 5, 3), torch.float32)
    b = torch.zeros_like(b)
    y = fmkernels.dvora_linear(x, weight, bias, A, B, d, b, weight.norm(dim=1))
    torch.testing.assert_close(y, nn.functional.linear(x, weight, bias))


def test_is_peft_s_dora_with_vera_s_update():
    """PEFT has no DVoRA, but DoRA over LoRA, whose factors may be diag(d) A and diag(b) B."""
    import peft

    x, weight, bias, A, B, d, b, magnitude = arguments((20, 8, 6, 3), torch.float32)
    linear = nn.Linear(8, 6)
    linear.weight.data, linear.bias.data = weight.clone(), bias.clone()
    config = peft.LoraConfig(r=3, lora_alpha=3, target_modules=["0"], use_dora=True)
    theirs = peft.get_peft_model(nn.Sequential(linear), config).base_model.model[0]
    theirs.lora_A["default"].weight.data = (d.unsqueeze(1) * A[:, :8]).detach()
    theirs.lora_B["default"].weight.data = (b.unsqueeze(1) * B[:6]).detach()
    theirs.lora_magnitude_vector["default"].weight.data = magnitude.detach().clone()
    given = x.detach().requires_grad_()
    y = theirs(given)
    expected = torch.autograd.grad(
        y.square().sum(), [given, theirs.lora_magnitude_vector["default"].weight]
    )
    mine = fmkernels.dvora_linear(x, weight, bias, A, B, d, b, magnitude)
    torch.testing.assert_close(mine, y)
    found = torch.autograd.grad(mine.square().sum(), [x, magnitude])
    for a, e in zip(found, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


def test_gradcheck_with_constant_norms():
    given = arguments((5, 4, 3, 2))
    cache = fmkernels.DvoraNorms(given[1], given[3], given[4])
    fixed = cache(given[5], given[6]).clone()

    def run(x, d, b, magnitude, weight, bias):
        made = torch.ops.fmkernels.dvora_scale_reference(
            fmkernels.vera_expand(
                nn.functional.linear(x, weight), fmkernels.vera_shrink(x, given[3]), d, b, given[4]
            ),
            magnitude, fixed, bias,
        )  # fmt: skip
        return made

    trained = [x.detach().clone().requires_grad_() for x in (given[1], given[2])]
    with fmkernels.backend("reference"):
        leaves = (given[0], given[5], given[6], given[7], *trained)
        assert torch.autograd.gradcheck(run, leaves)


def test_every_memory_layout_gives_the_same():
    magnitude, fixed, bias = (torch.rand(9) + 0.5 for _ in range(3))
    before = torch.randn(30, 9, requires_grad=True)

    def run(before, magnitude, fixed, bias):
        return DVORA_SCALE(before, magnitude, fixed, bias)

    testing.check_gradient_layouts(
        run, before, magnitude.requires_grad_(), fixed, bias.requires_grad_()
    )


@pytest.mark.parametrize("suffix", ["", "_reference"])
def test_opcheck(suffix):
    ops = torch.ops.fmkernels
    before, vectors = torch.randn(6, 4, requires_grad=True), [torch.rand(4) + 0.5 for _ in range(3)]
    for bias in (None, vectors[2]):
        op = getattr(ops, DVORA_SCALE.name + suffix).default
        torch.library.opcheck(op, (before, vectors[0].requires_grad_(), vectors[1], bias))
    op = getattr(ops, DVORA_SCALE_BACKWARD.name + suffix).default
    given = (torch.randn(6, 4), before, *vectors[:2])
    torch.library.opcheck(op, tuple(x.detach() for x in given))


@pytest.mark.parametrize("cached", [False, True])
def test_compile_gives_the_same(cached):
    torch._dynamo.reset()
    given = arguments((20, 6, 5, 3), torch.float32)
    cache = fmkernels.DvoraNorms(given[1], given[3], given[4]) if cached else None
    compiled = torch.compile(fmkernels.dvora_linear, fullgraph=True)
    found = values_and_gradients(compiled, given, cache=cache)
    expected = values_and_gradients(fmkernels.dvora_linear, given, cache=cache)
    for a, e in zip(found, expected, strict=True):
        torch.testing.assert_close(a, e)


def test_autocast_leaves_the_norms_in_float32():
    given = arguments((20, 6, 5, 3), torch.float32)
    cache = fmkernels.DvoraNorms(given[1], given[3], given[4])
    expected = fmkernels.DvoraNorms(given[1], given[3], given[4])(given[5], given[6])
    with torch.autocast("cpu", torch.bfloat16):
        y = fmkernels.dvora_linear(*given, cache=cache)
        assert torch.equal(cache(given[5], given[6]), expected)
    assert y.dtype == torch.bfloat16


def test_bitwise_the_same_over_threads():
    given = arguments((300, 40, 33, 24), torch.float32)
    cache = fmkernels.DvoraNorms(given[1], given[3], given[4])(given[5], given[6])
    before = torch.randn(300, 33)
    first = None
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found = DVORA_SCALE_BACKWARD(torch.ones(300, 33), before, given[-1].detach(), cache)
        first = first or found
        assert all(torch.equal(a, e) for a, e in zip(found, first, strict=True))


GIVEN = arguments((4, 5, 6, 3), torch.float32)


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (7, torch.ones(5), r"magnitude: expected shape \(6,\), one for each output, got \(5,\)"),
        (7, torch.ones(6, device="meta"), r"magnitude: expected the device of x, cpu, got meta"),
        (5, torch.ones(2, 3), r"lambda_d: expected shape \(3,\), got \(2, 3\)"),
        (6, torch.ones(5), r"lambda_b: expected shape \(6,\)"),
        (3, torch.ones(3, 4), r"A: expected shape \(r, >= 5\) with r >= 1, got \(3, 4\)"),
        (3, torch.ones(3, 5).requires_grad_(), r"A: expected a frozen matrix"),
        (2, torch.ones(7), r"bias: expected shape \(6,\), got \(7,\)"),
    ],
)  # fmt: skip
def test_refusals(index, value, message):
    with pytest.raises(ValueError, match=f"dvora_linear: {message}"):
        fmkernels.dvora_linear(*GIVEN[:index], value, *GIVEN[index + 1 :])


def test_a_cache_of_another_layer_is_refused():
    other = arguments((4, 5, 6, 3), torch.float32)
    cache = fmkernels.DvoraNorms(other[1], other[3], other[4])
    with pytest.raises(ValueError, match=r"dvora_linear: cache: expected the norms of this weight"):
        fmkernels.dvora_linear(*GIVEN, cache=cache)
    with pytest.raises(
        TypeError, match=r"dvora_linear: cache: expected DvoraNorms or None, got dict"
    ):
        fmkernels.dvora_linear(*GIVEN, cache={})


def test_norms_of_an_evaluation_serve_a_training():
    given = arguments((20, 6, 5, 3), torch.float32)
    cache = fmkernels.DvoraNorms(given[1], given[3], given[4])
    with torch.inference_mode():
        y = fmkernels.dvora_linear(*given, cache=cache)
    again = fmkernels.dvora_linear(*given, cache=cache)
    again.sum().backward()
    torch.testing.assert_close(again.detach(), y.clone())
    with torch.inference_mode():
        made_there = [x if x is None else x.detach().clone() for x in given]
        cache = fmkernels.DvoraNorms(made_there[1], made_there[3], made_there[4])
        torch.testing.assert_close(fmkernels.dvora_linear(*made_there, cache=cache), y)


def test_under_torch_func():
    x, weight, bias, A, B, d, b, magnitude = arguments((20, 6, 5, 3))
    cache = fmkernels.DvoraNorms(weight, A, B)

    def loss(d):
        return fmkernels.dvora_linear(x, weight, bias, A, B, d, b, magnitude, cache=cache).sum()

    found = torch.func.grad(loss)(d.detach())
    torch.testing.assert_close(found, torch.autograd.grad(loss(d), d)[0])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda w, A, B: fmkernels.DvoraNorms(w, A[:, :3], B), ValueError, r"A: expected shape \(r, >= 5\)"),
        (lambda w, A, B: fmkernels.DvoraNorms(w, A, B[:, :2]), ValueError, r"B: expected 3 columns"),
        (lambda w, A, B: fmkernels.DvoraNorms(w.int(), A, B), TypeError, r"weight: expected a floating-point"),
        (lambda w, A, B: fmkernels.DvoraNorms(w, A, B)(torch.ones(4), torch.ones(6)), ValueError, r"lambda_d: expected shape \(3,\), got \(4,\)"),
    ],
)  # fmt: skip
def test_refusals_of_norms(make, error, message):
    with pytest.raises(error, match=f"DvoraNorms: {message}"):
        make(GIVEN[1], GIVEN[3], GIVEN[4])


def test_norms_asked_for_by_several_threads_are_those_of_their_own_vectors():
    torch.manual_seed(0)
    weight, A, B = torch.randn(6, 8), torch.randn(4, 8), torch.randn(6, 4)
    vectors = [(torch.randn(4), torch.randn(6)) for _ in range(4)]
    expected = [fmkernels.DvoraNorms(weight, A, B)(*pair) for pair in vectors]
    shared, wrong = fmkernels.DvoraNorms(weight, A, B), []

    def ask(i):
        found = [shared(*vectors[i]).clone() for _ in range(500)]
        wrong.extend(i for norms in found if not torch.equal(norms, expected[i]))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong
