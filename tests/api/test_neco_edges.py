"""What NeCo's loss refuses, and what it takes although it is not the usual."""

import numpy as np
import pytest
import torch
from crops import SIZES, gradients, random_batch, random_references
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fmkernels.api import NeCoLoss


def replaced(values, index, value):
    return [value if k == index else other for k, other in enumerate(values)]


def test_refusals():
    student, teacher, boxes = random_batch(dtype=torch.float32)
    criterion = NeCoLoss(queue_size=128, dim=8)

    def refused(message, *arguments, error=ValueError, loss=criterion, **named):
        before = loss.queue.written.clone() if loss.queue else None
        with pytest.raises(error, match=f"^NeCoLoss: {message}"):
            loss(*arguments, **named)
        assert before is None or torch.equal(before, loss.queue.written)

    narrow = torch.randn(2, 7, 16, 16)
    refused(
        r"teacher_maps: expected one map per global crop, 2, got 1", student, teacher[:1], boxes
    )
    refused(r"teacher_maps: .*got 4; are student and teacher swapped", teacher, student, boxes)
    refused(
        r"student_maps: expected a list .*got one tensor of shape \(2, 8, 16, 16\)",
        student[0],
        teacher,
        boxes,
        error=TypeError,
    )
    refused(r"boxes\[0\]: .* for 3 crops in student_maps", student[:3], teacher, boxes)
    complex_mask = torch.ones(2, 2, 16, 16) * 1j
    refused("mask: expected bool or real", student, teacher, boxes, complex_mask, error=TypeError)
    refused(r"student_maps: expected at least 2 crops, got 1", student[:1], teacher, boxes)
    refused(
        r"student_maps\[1\]: expected shape \(2, 8, H, W\)",
        replaced(student, 1, narrow),
        teacher,
        boxes,
    )
    refused(
        r"teacher_maps\[0\]: .*got \(2, 7, 16, 16\)", student, replaced(teacher, 0, narrow), boxes
    )
    refused(
        r"student_maps\[0\]: expected shape \(B, D, H, W\), got \(2, 8, 16\)",
        replaced(student, 0, student[0][:, :, 0]),
        teacher,
        boxes,
    )
    refused(
        r"teacher_maps\[1\]: expected a floating-point dtype",
        student,
        replaced(teacher, 1, teacher[1].int()),
        boxes,
        error=TypeError,
    )
    refused(
        r"teacher_maps\[1\]: expected the device",
        student,
        replaced(teacher, 1, teacher[1].to("meta")),
        boxes,
    )
    wide = [torch.randn(2, 9, *size) for size in SIZES]
    refused(r"student_maps: expected maps of the queue's width 8 .*got 9", wide, wide[:2], boxes)
    many = [torch.randn(3, 8, *size) for size in SIZES]
    refused(
        r"queue_size: expected at least 147, the references of a batch of 3 images, got 128",
        many,
        many[:2],
        tuple(torch.cat([box, box[:1]]) for box in boxes),
    )
    refused(r"boxes: expected the pair", student, teacher, boxes[0], error=TypeError)
    refused(r"boxes\[0\]: expected shape \(2, 2, 4, 4\)", student, teacher, (boxes[1], boxes[0]))
    for corner, change in ((0, -0.1), (2, 8.0), (2, -99.0), (3, torch.nan)):
        other = boxes[1].clone()
        other[1, 2, 0, corner] += change
        refused(
            r"boxes\[1\]: expected boxes .*within the 7 x 7 patches.* image 1, crops 2 and 0",
            student,
            teacher,
            (boxes[0], other),
        )
    refused(
        r"mask: expected shape \(B, G, H, W\) = \(2, 2, 16, 16\)",
        student,
        teacher,
        boxes,
        mask=narrow,
    )
    refused(
        r"references: expected shape \(pairs, B, R, D\) = \(6, 2, 49, 8\)",
        student,
        teacher,
        boxes,
        references=torch.randn(6, 2, 48, 8),
    )
    refused(
        r"references: expected the device",
        student,
        teacher,
        boxes,
        references=torch.empty(6, 2, 49, 8, device="meta"),
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"grid_size": 0}, "grid_size: expected an integer >= 1"),
        ({"queue_size": 0}, "queue_size: expected an integer >= 1"),
        ({"metric": "l1"}, "metric: expected one of cosine, euclidean"),
        ({"steepness": -1.0}, "steepness: expected a finite number"),
        ({"teacher_steepness": float("inf")}, "teacher_steepness: expected a finite number"),
        ({"network": "bubble"}, "network: expected one of bitonic"),
        ({"grid_size": 13, "network": "bitonic"}, "network: expected one that sorts 169 values"),
        ({"distribution": "flat"}, "distribution: expected one of"),
    ],
)
def test_refuses_at_construction(settings, message):
    with pytest.raises(ValueError, match=f"^NeCoLoss: {message}"):
        NeCoLoss(**settings)


def test_without_a_queue_is_said_in_the_refusal():
    with pytest.raises(ValueError, match=r"queue_size: expected .*, or None for no queue, got 0"):
        NeCoLoss(queue_size=0)


@pytest.mark.parametrize("size", [np.int64(3), np.uint8(3)])
def test_sizes_are_any_integers(size):
    assert NeCoLoss(size, queue_size=None).grid_size == int(size)


def test_masks_of_image_files_are_those_of_zeros_and_ones():
    student, teacher, boxes = random_batch(dtype=torch.float32)
    references = random_references(6, 2, 8)
    mask = torch.zeros(2, 2, 16, 16, dtype=torch.bool)
    mask[:, :, 3:14, 2:15] = True
    criterion = NeCoLoss(queue_size=None)
    expected = criterion(student, teacher, boxes, mask, references=references)
    for same in (mask.to(torch.uint8), 255 * mask.to(torch.uint8), mask.float(), 255.0 * mask):
        assert torch.equal(
            criterion(student, teacher, boxes, same, references=references), expected
        )


def test_given_references_need_no_large_queue():
    student, teacher, boxes = random_batch(dtype=torch.float32)
    criterion = NeCoLoss(queue_size=16, dim=8)
    assert criterion(student, teacher, boxes, references=random_references(6, 2, 8)).isfinite()
    wide = [torch.cat([tokens, tokens[:, :1]], dim=1) for tokens in (*student, *teacher)]
    with pytest.raises(ValueError, match="queue's width 8"):  # they would still enter it
        criterion(wide[:4], wide[4:], boxes, references=random_references(6, 2, 9))


def test_a_second_forward_pass_inside_of_backward_is_refused():
    """It would draw other references than those that the loss is of."""
    student, teacher, boxes = random_batch(dtype=torch.float32)
    criterion = NeCoLoss(queue_size=128, dim=8)
    arguments = (criterion, student, teacher, boxes)
    loss = checkpoint(*arguments, use_reentrant=False)
    with pytest.raises(RuntimeError, match=r"NeCoLoss: queue: expected one forward pass per step"):
        loss.backward()
    references = random_references(6, 2, 8)
    loss = checkpoint(*arguments, references=references, use_reentrant=False)
    with pytest.raises(RuntimeError, match="would fill the queue"):  # a second time
        loss.backward()
    criterion.eval()  # neither fills the queue nor draws from it
    expected = gradients(criterion(*arguments[1:], references=references), student)
    loss = checkpoint(*arguments, references=references, use_reentrant=False)
    for a, b in zip(gradients(loss, student), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("bad", [torch.nan, 1e3])
def test_bad_boxes_are_refused_when_compiled(index, bad):
    torch._dynamo.reset()
    student, teacher, boxes = random_batch(2, 8, ((6, 6), (4, 4)), 1, torch.float32)
    criterion = NeCoLoss(3, None, num_globals=1)
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    compiled(student, teacher, boxes)
    boxes[index][((1, 0, 1, 2), (1, 1, 0, 2))[index]] = bad  # what crops 0 and 1 share
    with pytest.raises(RuntimeError, match=r"NeCoLoss: boxes\[\d\]: expected boxes within"):
        compiled(student, teacher, boxes)


def test_products_keep_the_precision_of_float32():
    """What TF32 would round is multiplied in float64, on the way back, too."""
    student, teacher, boxes = random_batch(dtype=torch.float32)
    criterion = NeCoLoss(queue_size=None)

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.mm):
                dtypes.add(args[0].dtype)
            return function(*args, **(kwargs or {}))

    before = torch.get_float32_matmul_precision()
    found = {}
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            dtypes = set()
            with Products():
                torch.manual_seed(0)
                found[precision] = gradients(criterion(student, teacher, boxes), student)
            assert dtypes == {torch.float32 if precision == "highest" else torch.float64}
    finally:
        torch.set_float32_matmul_precision(before)
    for a, b in zip(*found.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
