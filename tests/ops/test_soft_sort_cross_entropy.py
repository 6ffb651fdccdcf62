"""Properties and refusals of soft_sort_cross_entropy."""

import pytest
import torch
from cases import scores
from torch.utils._python_dispatch import TorchDispatchMode

import fmkernels
from fmkernels.ops.soft_sort import DISTRIBUTIONS, NETWORKS
from fmkernels.ops.soft_sort_cross_entropy.reference import FLOOR

every_distribution = pytest.mark.parametrize("distribution", DISTRIBUTIONS)
every_network = pytest.mark.parametrize("network", NETWORKS)


@every_distribution
def test_is_the_cross_entropy_of_the_permutations(distribution):
    student, teacher = scores(6, 33), scores(6, 33)
    loss = fmkernels.soft_sort_cross_entropy(
        student, teacher, distribution=distribution, teacher_steepness=20.0, reduction="none"
    )
    _, p = fmkernels.soft_sort(student, distribution=distribution)
    _, q = fmkernels.soft_sort(teacher, distribution=distribution, steepness=20.0)
    expected = -(q * p.clamp_min(FLOOR).log()).sum(dim=-1).mean(dim=-1)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss.sum(), student), torch.autograd.grad(expected.sum(), student)
    )


def test_reductions_and_masks():
    student, teacher = scores(12, 9), scores(12, 9)
    student, teacher = student.reshape(3, 4, 9), teacher.reshape(3, 4, 9)
    mask = torch.rand(3, 4, dtype=torch.float64)

    def loss(**arguments):
        return fmkernels.soft_sort_cross_entropy(student, teacher, **arguments)

    each = loss(reduction="none")
    assert each.shape == (3, 4)
    torch.testing.assert_close(loss(), each.mean())
    torch.testing.assert_close(loss(reduction="sum"), each.sum())
    torch.testing.assert_close(loss(reduction="none", mask=mask), each * mask)
    torch.testing.assert_close(loss(reduction="sum", mask=mask), (each * mask).sum())
    torch.testing.assert_close(loss(mask=mask), (each * mask).sum() / mask.sum())
    chosen = mask > 0.5
    torch.testing.assert_close(loss(mask=chosen), each[chosen].mean())


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_an_empty_mask_gives_zero(backend):
    student = scores(4, 9)
    with fmkernels.backend(backend):
        loss = fmkernels.soft_sort_cross_entropy(student, scores(4, 9), mask=torch.zeros(4))
        (grad,) = torch.autograd.grad(loss, student)
    assert loss.item() == 0
    assert not grad.any()


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_masked_row_may_hold_anything(backend):
    teacher = scores(6, 9).detach()
    clean = scores(6, 9).detach()
    dirty = clean.clone()
    dirty[2] = torch.nan
    mask = torch.arange(6) != 2
    results = []
    for student in (clean, dirty):
        student.requires_grad_()
        with fmkernels.backend(backend):
            loss = fmkernels.soft_sort_cross_entropy(student, teacher, mask=mask)
        results.append((loss, *torch.autograd.grad(loss, student)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("distribution", "art_lambda"),
    [*((distribution, 0.25) for distribution in DISTRIBUTIONS), ("logistic_phi", 1.0)],
)
@every_network
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_extreme_scores_stay_finite(network, distribution, art_lambda, dtype):
    generator = torch.Generator().manual_seed(0)
    rows = [torch.zeros(49), torch.full((49,), 1e30), torch.arange(49.0), -torch.arange(49.0)]
    rows += [
        magnitude * (torch.rand(49, generator=generator) - 0.5)
        for magnitude in (1e-30, 1e-6, 0.15, 1.0, 1e6, 1e30)
    ]
    rows = torch.stack(rows).to(dtype)
    for steepness in (0.0, 100.0, 1e6):
        student = rows.clone().requires_grad_()
        loss = fmkernels.soft_sort_cross_entropy(
            student, rows.roll(1, dims=0), steepness=steepness, network=network,
            distribution=distribution, art_lambda=art_lambda, reduction="none",
        )  # fmt: skip
        assert loss.isfinite().all()
        (grad,) = torch.autograd.grad(loss.sum(), student)
        assert grad.isfinite().all()


def test_a_bad_row_stays_alone():
    teacher, clean = scores(20, 9).float().detach(), scores(20, 9).float().detach()
    good = torch.arange(20) != 7
    results = []
    for bad in (None, torch.nan, torch.inf):
        student = clean.clone()
        if bad is not None:
            student[7, 3] = bad
        student.requires_grad_()
        loss = fmkernels.soft_sort_cross_entropy(student, teacher, reduction="none")
        results.append((loss[good], torch.autograd.grad(loss.sum(), student)[0][good]))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeps_one_array_for_backward_and_refuses_a_second(dtype, autocast):
    student, teacher = (scores(100, 49).detach().to(dtype) for _ in range(2))
    student.requires_grad_()
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", enabled=autocast),
    ):
        loss = fmkernels.soft_sort_cross_entropy(student, teacher)
    assert loss.dtype == (torch.float32 if autocast else dtype)
    kept.pop(student.untyped_storage().data_ptr(), None)
    assert sum(kept.values()) == student.numel() * 4

    (grad,) = torch.autograd.grad(loss, student, create_graph=True)
    assert grad.dtype == dtype
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        torch.autograd.grad(grad.sum(), student)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_without_a_gradient_only_the_loss_is_computed(backend):
    student, teacher = scores(5, 9), scores(5, 9)
    called = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.append(function.name())
            return function(*args, **(kwargs or {}))

    with fmkernels.backend(backend), Record():
        with_gradient = fmkernels.soft_sort_cross_entropy(student, teacher)
        with torch.no_grad():
            without = fmkernels.soft_sort_cross_entropy(student, teacher)
    assert torch.equal(with_gradient, without)
    assert not without.requires_grad
    suffix = "_reference" if backend == "reference" else ""
    assert [name for name in called if "fmkernels" in name] == [
        f"fmkernels::soft_sort_cross_entropy{suffix}",
        f"fmkernels::soft_sort_cross_entropy_loss{suffix}",
    ]


def test_the_teacher_gets_no_gradient_and_half_types_promote():
    student, teacher = scores(5, 9).float().detach().requires_grad_(), scores(5, 9)
    loss = fmkernels.soft_sort_cross_entropy(student, teacher)
    assert loss.dtype == torch.float64
    loss.backward()
    assert student.grad.dtype == torch.float32
    assert teacher.grad is None


def test_float16_gradients_survive_a_large_batch():
    """A mean over many rows makes gradients that float16 cannot hold before loss scaling."""
    student = scores(4096, 9).detach().half().requires_grad_()
    teacher = scores(4096, 9).detach().half()
    (fmkernels.soft_sort_cross_entropy(student, teacher).float() * 1024).backward()
    exact = student.detach().float().requires_grad_()
    (fmkernels.soft_sort_cross_entropy(exact, teacher.float()) * 1024).backward()
    torch.testing.assert_close(student.grad.float(), exact.grad, rtol=1e-3, atol=1e-4)


def refusal(error, message, **changes):
    arguments = {"student": torch.zeros(2, 8), "teacher": torch.zeros(2, 8), **changes}
    return pytest.param(arguments, error, message, id=message[:40])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        refusal(TypeError, "student: expected a floating-point", student=torch.zeros(2, 8).long()),
        refusal(TypeError, "teacher: expected a torch.Tensor, got NoneType", teacher=None),
        refusal(ValueError, r"teacher: expected the shape of student, \(2, 8\), got \(2, 7\)",
                teacher=torch.zeros(2, 7)),
        refusal(ValueError, "teacher: expected the device of student, cpu, got meta",
                teacher=torch.zeros(2, 8, device="meta")),
        refusal(ValueError, r"mask: expected one weight per query, shape \(2,\), got \(2, 8\)",
                mask=torch.ones(2, 8)),
        refusal(TypeError, "mask: expected a torch.Tensor, got list", mask=[1, 0]),
        refusal(ValueError, "mask: expected the device of student",
                mask=torch.ones(2, device="meta")),
        refusal(ValueError, "reduction: expected one of none, mean, sum, got 'max'",
                reduction="max"),
        refusal(ValueError, "teacher_steepness: expected a finite number", teacher_steepness=-1),
        refusal(ValueError, "steepness: expected a finite number", steepness=float("nan")),
        refusal(TypeError, "steepness: expected a number, got list", steepness=[1.0]),
        refusal(ValueError, "network: expected one of", network="merge"),
        refusal(ValueError, "network: expected one that sorts 22 values",
                student=torch.zeros(1, 22), teacher=torch.zeros(1, 22)),
        refusal(ValueError, "distribution: expected one of", distribution="uniform"),
    ],
)  # fmt: skip
def test_refusals(arguments, error, message):
    with pytest.raises(error, match="soft_sort_cross_entropy: .*" + message):
        fmkernels.soft_sort_cross_entropy(**arguments)
