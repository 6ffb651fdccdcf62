"""Properties and refusals of patch_neighbor_loss. Agreement with the peer: test_diffsort.py."""

import pytest
import torch
from torch.nn import functional as F

import fmkernels


def features(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def test_is_the_sorted_cross_entropy_of_similarities_or_distances():
    student, teacher, references = features(2, 5, 8), features(2, 5, 8), features(2, 7, 8)
    mask = torch.rand(2, 5)
    cosine = [
        F.normalize(x, dim=-1) @ F.normalize(references, dim=-1).mT for x in (student, teacher)
    ]
    euclidean = [torch.cdist(x, references) for x in (student, teacher)]
    for metric, (a, b) in {"cosine": cosine, "euclidean": euclidean}.items():
        for reduction in ("none", "mean", "sum"):
            arguments = {"mask": mask, "reduction": reduction, "steepness": 10.0}
            torch.testing.assert_close(
                fmkernels.patch_neighbor_loss(
                    student, teacher, references, metric=metric, **arguments
                ),
                fmkernels.soft_sort_cross_entropy(a, b, **arguments),
            )


def test_the_teacher_is_never_in_the_graph():
    student, teacher, references = (x.requires_grad_() for x in features(3, 2, 7, 8).unbind())
    fmkernels.patch_neighbor_loss(student, teacher, references).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0
    assert references.grad.abs().sum() > 0


def test_autocast_does_not_round_the_similarities():
    student, teacher, references = features(3, 2, 49, 64).float().unbind()
    expected = fmkernels.patch_neighbor_loss(student, teacher, references)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fmkernels.patch_neighbor_loss(student, teacher, references), expected)


def test_an_identical_patch_has_a_finite_euclidean_gradient():
    student = features(1, 4, 8).requires_grad_()
    loss = fmkernels.patch_neighbor_loss(
        student, features(1, 4, 8), student.detach().clone(), metric="euclidean", steepness=1.0
    )
    loss.backward()
    assert student.grad.isfinite().all()


def refusal(error, message, **changes):
    base = {name: torch.zeros(2, 4, 8) for name in ("student", "teacher", "references")}
    return pytest.param({**base, **changes}, error, message, id=message[:40])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        refusal(ValueError, r"student: expected shape \(B, N, D\), got \(4, 8\)",
                student=torch.zeros(4, 8)),
        refusal(ValueError, "teacher: expected the shape of student", teacher=torch.zeros(2, 5, 8)),
        refusal(ValueError, r"references: expected shape \(B, R, D\) = \(2, at least 1, 8\)",
                references=torch.zeros(2, 4, 9)),
        refusal(ValueError, "references: .*at least 1", references=torch.zeros(2, 0, 8)),
        refusal(TypeError, "references: expected a floating-point",
                references=torch.zeros(2, 4, 8).int()),
        refusal(ValueError, "teacher: expected the device",
                teacher=torch.zeros(2, 4, 8, device="meta")),
        refusal(ValueError, "metric: expected one of cosine, euclidean, got 'dot'", metric="dot"),
        refusal(ValueError, r"mask: expected one weight per query, shape \(2, 4\)",
                mask=torch.ones(2, 8)),
        refusal(ValueError, "steepness: expected a finite number", steepness=-2.0),
    ],
)  # fmt: skip
def test_refusals(arguments, error, message):
    with pytest.raises(error, match=message):
        fmkernels.patch_neighbor_loss(**arguments)
