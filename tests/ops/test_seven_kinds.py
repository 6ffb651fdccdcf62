"""Parity, gradients, opcheck, compile, determinism: the same for every case of every op.

The two other kinds, properties and refusals, are each op's own: ``test_<op>.py``.
"""

import pytest
import torch
from cases import (
    CASES,
    FEW,
    Case,
    check_parity,
    in_float64,
    tuple_of,
    values_and_gradients,
    with_reference,
)

import fmkernels
from fmkernels import _library, testing

SIZES = [(1, 1), (3, 2), (1, 5), (60, 7), (9, 16), (9, 33), (4, 49), (1, 64), (2, 129), (1, 196)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]  # float64: test_diffsort.py
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
few_cases = pytest.mark.parametrize("case", FEW, ids=lambda case: case.name)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


@every_case
@every_dtype
def test_parity_of_values_and_gradients(case, dtype):
    for rows, n in SIZES:
        check_parity(case, case.inputs(rows, n, dtype), f"{rows} rows of {n}")


@pytest.mark.parametrize("case", [FEW[0], FEW[-3]], ids=lambda case: case.name)
def test_rows_longer_than_the_kernels_take_go_to_the_reference(case):
    inputs = case.inputs(1, 1025, torch.float32)
    actual, expected = values_and_gradients(case, inputs), with_reference(case, inputs)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


@every_case
def test_gradients_of_the_reference_are_those_of_finite_differences(case):
    inputs = case.inputs(2, 5)
    if case.name.startswith("neighbors"):  # the teacher also depends on the references: no gradient
        inputs = (*inputs[:2], inputs[2].detach())
    with fmkernels.backend("reference"):
        assert torch.autograd.gradcheck(case.function, inputs, eps=1e-7, atol=1e-4)


@few_cases
def test_every_memory_layout_gives_the_same(case):
    testing.check_gradient_layouts(case.function, *case.inputs(6, 7, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("suffix", ["", "_reference"])
def test_opcheck(suffix, dtype):
    ops = torch.ops.fmkernels
    x = torch.randn(3, 7, dtype=dtype, requires_grad=True)
    y = torch.randn(3, 7, dtype=dtype)
    settings = (20.0, "bitonic", "cauchy", 0.25)
    torch.library.opcheck(getattr(ops, "soft_sort" + suffix).default, (x, *settings))
    torch.library.opcheck(
        getattr(ops, "soft_sort_backward" + suffix).default,
        (y, torch.randn(3, 7, 7, dtype=dtype), y, *settings),
    )
    for mask, reduction in [(None, "mean"), (torch.rand(3, dtype=dtype), "none")]:
        arguments = (y, mask, 20.0, 10.0, "odd_even", "gaussian", 0.25, reduction)
        for name, student in (("soft_sort_cross_entropy", x), ("soft_sort_cross_entropy_loss", y)):
            torch.library.opcheck(getattr(ops, name + suffix).default, (student, *arguments))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("case", [FEW[0], FEW[-3], FEW[-1]], ids=lambda case: case.name)
def test_compile_gives_the_same(case, dynamic):
    torch._dynamo.reset()
    compiled = Case(
        case.name, torch.compile(case.function, fullgraph=True, dynamic=dynamic), case.make
    )
    for rows in (4, 6, 10):
        inputs = case.inputs(rows, 7, torch.float32)
        for a, b in zip(
            values_and_gradients(compiled, inputs), values_and_gradients(case, inputs), strict=True
        ):
            torch.testing.assert_close(a, b)


@few_cases
def test_autocast_computes_in_float32(case):
    inputs = case.inputs(4, 7, torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = tuple_of(case.function(*inputs))
        exact = tuple_of(case.function(*in_float64(inputs)))
    for a, b in zip(outputs, exact, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b.float(), rtol=1e-3, atol=1e-4)


@every_case
def test_bitwise_the_same_over_runs_threads_and_batch_splits(case):
    inputs = case.inputs(50, 33, torch.float32)
    first = values_and_gradients(case, inputs)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for a, b in zip(values_and_gradients(case, inputs), first, strict=True):
            assert torch.equal(a, b)
    if case.name.startswith("soft_sort") and _library.native is not None:
        whole = case.function(*inputs)
        for rows in (slice(0, 1), slice(1, 8), slice(8, 50)):
            part = case.function(inputs[0][rows])
            assert all(torch.equal(a[rows], b) for a, b in zip(whole, part, strict=True))


@few_cases
def test_empty_batch(case):
    inputs = case.inputs(0, 7, torch.float32)
    if case.name.startswith("neighbors"):
        inputs = tuple(x.detach()[:0].requires_grad_(x.requires_grad) for x in inputs)
    results = values_and_gradients(case, inputs)
    assert all(result.isfinite().all() for result in results)


@few_cases
def test_double_backward_refuses(case):
    inputs = case.inputs(3, 7)
    output = tuple_of(case.function(*inputs))[0].sum()
    leaves = [x for x in inputs if x.requires_grad]
    grads = torch.autograd.grad(output, leaves, create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward is not supported|cdist_backward"):
        sum(grad.square().sum() for grad in grads).backward()


@few_cases
def test_vmap_refuses(case):
    inputs = tuple(x.detach() for x in case.inputs(4, 7))
    if case.name.startswith("neighbors"):
        inputs = tuple(x[None] for x in inputs)
    with pytest.raises(
        NotImplementedError, match=r"vmap is not supported.*any leading batch shape"
    ):
        torch.func.vmap(case.function)(*inputs)


@few_cases
def test_torch_func_grad(case):
    inputs = case.inputs(3, 7)

    def loss(x):
        return tuple_of(case.function(x, *(y.detach() for y in inputs[1:])))[0].sum()

    expected = torch.autograd.grad(loss(inputs[0]), inputs[0])[0]
    torch.testing.assert_close(torch.func.grad(loss)(inputs[0].detach()), expected)
