"""The sort on a GPU: both kernels, at real sizes, beside the reference on the same device."""

import functools
import importlib

import pytest
import torch
from cases import CASES, FEW, check_parity, tuple_of, values_and_gradients
from gpu.target import DRY_RUN, running

import fmkernels
from fmkernels.ops.soft_sort.config import MAX_CUDA_SIZE

SORT = ("soft_sort", "soft_sort_backward")
LOSS = ("soft_sort_cross_entropy",)
LOSS_ALONE = ("soft_sort_cross_entropy_loss",)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

SIZES = [(1, 1), (300, 7), (300, 33), (1000, 49), (300, 64)]
"""Many rows: who errs less on a few is luck."""
LONG, LONGEST = 100, 196
LONG_ROWS = 2 if DRY_RUN else 200
if DRY_RUN:  # the arithmetic is tested in tests/interpreter; this is about what surrounds it
    SIZES = [(1, 1), (2, 3)]
    LONG = LONGEST = 3
    CASES = FEW = [case for case in CASES if case.name.endswith("-bitonic-cauchy")]


def ops_of(case):
    return SORT if case.name.startswith("soft_sort") else LOSS


def takes(backend, case):
    """The tape of odd_even, whose depth is n, is too long for the blocks of the CUDA kernels."""
    return SIZES[:3] if backend == "cuda" and "odd_even-" in case.name else SIZES


cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
few = pytest.mark.parametrize("case", FEW, ids=lambda case: case.name)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


def test_the_library_of_the_wheel_loads_without_a_driver():
    load = pytest.importorskip if DRY_RUN else importlib.import_module  # a build without nvcc
    library = load("fmkernels._cuda")
    assert library.plan("bitonic", 49)
    assert library.shared_bytes(49, 483, 270, 49, True, True) > 0


@cases
def test_parity(case, backend, verifies, device):
    verifies(*ops_of(case))
    with running(backend):
        for rows, n in takes(backend, case):
            check_parity(case, case.inputs(rows, n, torch.float32, device), f"{rows} rows of {n}")


@few
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=lambda dtype: str(dtype)[6:])
def test_parity_in_half_precision(case, dtype, backend, verifies, device):
    if DRY_RUN and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter has no bfloat16")
    verifies(*ops_of(case))
    with running(backend):
        for rows, n in takes(backend, case)[1:4]:
            check_parity(case, case.inputs(rows, n, dtype, device), f"{rows} rows of {n}")


@few
def test_parity_of_long_rows(case, backend, verifies, device):
    if "odd_even-" in case.name and backend == "cuda":
        pytest.skip("its tape does not fit in a block")
    verifies(*ops_of(case))
    with running(backend):
        for n in (LONG, LONGEST) if backend == "triton" else (LONG, min(MAX_CUDA_SIZE, LONGEST)):
            check_parity(case, case.inputs(LONG_ROWS, n, torch.float32, device), f"rows of {n}")


def test_parity_of_the_canonical_step(backend, verifies, device):
    verifies(*LOSS)
    rows, n = (2, 3) if DRY_RUN else (31_360, 49)
    case = next(case for case in CASES if case.name == "cross_entropy-bitonic-cauchy")
    with running(backend):
        check_parity(case, case.inputs(rows, n, torch.float32, device), f"{rows} rows of {n}")


@dtypes
def test_the_loss_alone_is_that_with_a_gradient(dtype, backend, verifies, device):
    if DRY_RUN and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter has no bfloat16")
    verifies(*LOSS, *LOSS_ALONE)
    rows, n = (3, 3) if DRY_RUN else (300, 49)
    student, teacher = (0.15 * torch.randn(2, rows, n)).to(device, dtype).unbind()
    mask = (torch.arange(rows) % 3 > 0).to(device)
    loss = functools.partial(fmkernels.soft_sort_cross_entropy, teacher=teacher, mask=mask)
    with running(backend):
        for reduction in ("mean", "sum", "none"):
            alone = loss(student, reduction=reduction)
            with_gradient = loss(student.clone().requires_grad_(), reduction=reduction)
            torch.testing.assert_close(alone, with_gradient)


@few
def test_every_memory_layout_gives_the_same(case, backend, verifies, device):
    verifies(*ops_of(case))
    with running(backend):
        fmkernels.testing.check_gradient_layouts(
            case.function,
            *case.inputs(2 if DRY_RUN else 6, 2 if DRY_RUN else 7, torch.float32, device),
        )


@few
def test_bitwise_the_same_over_runs_and_batch_splits(case, backend, verifies, device):
    verifies(*ops_of(case))
    rows, n = (4, 2) if DRY_RUN else (3000, 33)
    inputs = case.inputs(rows, n, torch.float32, device)
    with running(backend):
        first = values_and_gradients(case, inputs)
        for _ in range(1 if DRY_RUN else 3):
            again = values_and_gradients(case, inputs)
            assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))
        if case.name.startswith("soft_sort"):
            whole = case.function(*inputs)
            for part in (slice(0, 1), slice(1, rows // 2), slice(rows // 2, rows)):
                found = case.function(inputs[0][part])
                assert all(torch.equal(a[part], b) for a, b in zip(whole, found, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")  # NumPy's, interpreted
def test_a_bad_row_stays_alone(bad, backend, verifies, device):
    verifies(*LOSS)
    x, y = (0.15 * torch.randn(2, 6, 3 if DRY_RUN else 9)).to(device).unbind()
    broken = x.clone()
    broken[1, 2] = bad

    def loss_and_gradient(student):
        student = student.requires_grad_()
        losses = fmkernels.soft_sort_cross_entropy(student, y, reduction="none")
        return losses.detach(), torch.autograd.grad(losses.sum(), student)[0]

    others = [0, 2, 3, 4, 5]
    with running(backend):
        for a, b in zip(loss_and_gradient(broken), loss_and_gradient(x), strict=True):
            assert torch.equal(a[others], b[others])


@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")  # NumPy's, interpreted
def test_extreme_scores_are_finite(backend, verifies, device):
    verifies(*LOSS)
    scales = torch.tensor([[1e-30], [1e-3], [1e10], [1e30]])
    x = (scales * torch.randn(4, 3 if DRY_RUN else 49)).to(device).requires_grad_()
    with running(backend):
        for steepness in (0.0, 1e6):
            loss = fmkernels.soft_sort_cross_entropy(x, x.detach().flip(0), steepness=steepness)
            (gradient,) = torch.autograd.grad(loss, x)
            assert loss.isfinite() & gradient.isfinite().all()


@few
def test_empty_batch(case, backend, verifies, device):
    verifies(*ops_of(case))
    inputs = tuple(
        x[:0].detach().requires_grad_(x.requires_grad)
        for x in case.inputs(2, 3, torch.float32, device)
    )
    with running(backend):
        assert all(result.isfinite().all() for result in values_and_gradients(case, inputs))


@few
def test_autocast_computes_in_float32(case, backend, verifies, device):
    if DRY_RUN:
        pytest.skip("Triton's interpreter has no bfloat16")
    verifies(*ops_of(case))
    inputs = case.inputs(8, 33, torch.bfloat16, device)
    with running(backend), torch.autocast("cuda", dtype=torch.bfloat16):
        outputs = tuple_of(case.function(*inputs))
    exact = tuple_of(case.function(*(x.detach().float() for x in inputs)))
    for found, expected in zip(outputs, exact, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def check_replay(case, dtype, device):
    """A captured step gives what a step gives, of numbers that came after the capture."""
    inputs = case.inputs(20, 33, dtype, device)
    leaves = [x for x in inputs if x.requires_grad]

    def step():
        outputs = tuple_of(case.function(*inputs))
        return [*outputs, *torch.autograd.grad([x.sum() for x in outputs], leaves)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # capture wants a warm-up on a stream of its own
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for x, new in zip(inputs, case.inputs(20, 33, dtype, device), strict=True):
            x.copy_(new)
    graph.replay()
    for a, b in zip(captured, step(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@few
def test_replay_of_a_captured_graph(case, backend, verifies, device):
    verifies(*ops_of(case))
    with running(backend):
        check_replay(case, torch.float32, device)


@pytest.mark.gpu
@few
def test_replay_of_the_reference(case, device):
    with running("reference"):
        check_replay(case, torch.float64, device)


@pytest.mark.gpu
def test_the_first_call_for_a_size_is_not_captured(backend, device):
    scores = torch.rand(3, 29, device=device)
    with running(backend):
        with (
            pytest.raises(RuntimeError, match="call it once before"),
            torch.cuda.graph(torch.cuda.CUDAGraph()),
        ):
            fmkernels.soft_sort(scores + 1, network="odd_even")
        assert fmkernels.soft_sort(scores, network="odd_even")[1].isfinite().all()


@pytest.mark.gpu
def test_streams_do_not_disturb_each_other(backend, verifies, device):
    verifies(*LOSS, *SORT)
    sets = [(0.15 * torch.randn(2, 2000, 49)).to(device).unbind() for _ in range(4)]

    def step(student, teacher):
        student = student.clone().requires_grad_()
        loss = fmkernels.soft_sort_cross_entropy(student, teacher)
        _, permutation = fmkernels.soft_sort(student)
        return torch.autograd.grad(loss + permutation[..., 0].mean(), student)[0]

    with running(backend):
        expected = [step(*pair) for pair in sets]
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in sets]
        found = []
        for stream, pair in zip(streams, sets, strict=True):
            with torch.cuda.stream(stream):
                found.append(step(*pair))
        torch.cuda.synchronize()
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_scores_past_two_to_the_31(backend, verifies, device, alone):
    """Student, teacher and gradient of 8.6 GB each: the last queries are those of a small call."""
    verifies(*LOSS)
    n = 16
    rows = 2**31 // n + 5
    last = (0.15 * torch.randn(2, 9, n)).to(device)
    student, teacher = (torch.zeros(rows, n, device=device) for _ in range(2))
    student[-9:], teacher[-9:] = last
    with running(backend):
        losses = fmkernels.soft_sort_cross_entropy(
            student.requires_grad_(), teacher, reduction="none"
        )
        (gradient,) = torch.autograd.grad(losses[-9:].sum(), student)
        few_student = last[0].clone().requires_grad_()
        few_losses = fmkernels.soft_sort_cross_entropy(few_student, last[1], reduction="none")
        (few_gradient,) = torch.autograd.grad(few_losses.sum(), few_student)
    assert torch.equal(losses[-9:], few_losses)
    assert torch.equal(gradient[-9:], few_gradient)


@pytest.mark.gpu
def test_permutations_past_two_to_the_31(backend, verifies, device, alone):
    verifies("soft_sort")
    n = 49
    rows = 2**31 // n**2 + 5
    scores = torch.zeros(rows, n, device=device)
    scores[-9:] = 0.15 * torch.randn(9, n, device=device)
    with running(backend):
        values, permutation = fmkernels.soft_sort(scores)
        few_values, few_permutation = fmkernels.soft_sort(scores[-9:].clone())
    assert torch.equal(values[-9:], few_values)
    assert torch.equal(permutation[-9:], few_permutation)


@pytest.mark.gpu
@pytest.mark.parametrize(("mode", "n"), [("default", 33), ("reduce-overhead", 35)])
def test_compile_gives_the_same(mode, n, backend, verifies, device):
    """reduce-overhead warms up, captures and replays; nothing has sorted its n values before."""
    verifies(*LOSS)
    student, teacher = (0.15 * torch.randn(2, 40, n)).to(device).unbind()

    def loss(student):
        return fmkernels.soft_sort_cross_entropy(2 * student, teacher)

    def gradient(function):
        torch.compiler.cudagraph_mark_step_begin()
        x = student.clone().requires_grad_()
        return torch.autograd.grad(function(x), x)[0].clone()

    with running(backend):
        compiled = torch.compile(loss, fullgraph=True, mode=mode)
        found = [gradient(compiled) for _ in range(4)]
        expected = gradient(loss)
    for each in found:
        torch.testing.assert_close(each, expected)
