"""Boxes of what two crops share."""

import numpy as np
import pytest
import torch
from crops import random_crops

from fmkernels.api import intersection_boxes

SIZES = [(16, 16), (14, 20), (7, 7)]


def test_both_boxes_are_the_same_part_of_the_image():
    crops = random_crops(3, SIZES)
    in_global, in_other = intersection_boxes(crops, SIZES)
    for b in range(3):
        for g in range(2):
            for v in range(3):
                for crop, box in ((g, in_global[b, g, v]), (v, in_other[b, v, g])):
                    x1, y1, x2, y2 = crops[b, crop].tolist()
                    height, width = SIZES[crop]
                    pixels = torch.tensor([x2 - x1, y2 - y1] * 2) / torch.tensor(
                        [width, height] * 2
                    )
                    back = box * pixels + torch.tensor([x1, y1, x1, y1])
                    corner = torch.maximum(crops[b, g, :2], crops[b, v, :2])
                    opposite = torch.minimum(crops[b, g, 2:], crops[b, v, 2:])
                    torch.testing.assert_close(
                        back, torch.cat([corner, opposite]), check_dtype=False
                    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int32])
def test_a_crop_shares_all_of_itself(dtype):
    crops = random_crops(2, SIZES).to(dtype)
    in_global, _ = intersection_boxes(crops, SIZES)
    whole = torch.tensor([[0, 0, 16, 16], [0, 0, 20, 14]])
    assert torch.equal(in_global[:, [0, 1], [0, 1]], whole.expand(2, 2, 4).to(in_global.dtype))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda crops: crops[0], r"crops: expected shape \(B, V, 4\), got \(3, 4\)"),
        (lambda crops: crops[:, :2], r"sizes: expected one .* for each of the 2 crops, got 3"),
        (lambda crops: crops.flip(-1), r"crops: expected finite .* x1 < x2 .*crop 0 of image 0"),
        (lambda crops: crops * torch.nan, r"crops: expected finite .*nan"),
        (
            lambda crops: crops + torch.tensor([0.0, torch.inf, 0.0])[:, None],
            r"crops: expected finite .*got \[inf, inf, inf, inf\] for crop 1 of image 0",
        ),
        (
            lambda crops: crops + torch.tensor([0.0, 0.0, 500.0])[:, None],
            r"crops 0 and 2 of image 0 do not",
        ),
    ],
)
def test_refusals(change, message):
    with pytest.raises(ValueError, match=f"^intersection_boxes: .*{message}"):
        intersection_boxes(change(random_crops(2, SIZES)), SIZES)


def test_refuses_more_globals_than_crops():
    with pytest.raises(ValueError, match="num_globals: expected 1 to 3"):
        intersection_boxes(random_crops(1, SIZES), SIZES, num_globals=4)


@pytest.mark.parametrize("crops", [[[0, 0, 9, 9]], np.zeros((1, 3, 4)), torch.zeros(1, 3, 4) * 1j])
def test_refuses_what_is_no_tensor_of_real_numbers(crops):
    with pytest.raises(TypeError, match=r"crops: expected a torch\.Tensor of real numbers, got"):
        intersection_boxes(crops, SIZES)


@pytest.mark.parametrize("size", [8, (0, 8), (8, -1), (8.0, 8), (8, 8, 8)])
def test_refuses_what_is_no_size(size):
    with pytest.raises(ValueError, match=r"sizes\[1\]: expected \(height, width\)"):
        intersection_boxes(random_crops(2, SIZES), [SIZES[0], size, SIZES[2]])
