"""ROI alignment by matrix products gives what torchvision's gives."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fmkernels.api.roi_align import roi_align

ROOT = Path(__file__).parent.parent.parent
PEERS = ROOT / ".peers"
PROGRAM = ROOT / "tests" / "support" / "torchvision_roi_align.py"


def random_boxes(batch, count, height, width, dtype):
    """From a fraction of a cell to the whole map."""
    size = torch.tensor([width, height], dtype=dtype)
    a, b = (torch.rand(batch, count, 2, dtype=dtype) * size for _ in range(2))
    boxes = torch.cat([torch.minimum(a, b), torch.maximum(a, b)], dim=-1)
    boxes[:, 0] = torch.cat([torch.zeros(2, dtype=dtype), size])
    return boxes


def random_case(height, width, grid_size, dtype):
    boxes = random_boxes(2, 5, height, width, dtype)
    return {
        "maps": torch.randn(2, 3, height, width, dtype=dtype),
        "boxes": boxes,
        "grid_size": grid_size,
        "grad_aligned": torch.randn(10, 3, grid_size, grid_size, dtype=dtype),
    }


@pytest.mark.skipif(not (PEERS / "torchvision").exists(), reason="needs torchvision in .peers/")
def test_is_torchvisions(tmp_path):
    sizes = [(37, 37, 7), (16, 16, 7), (7, 7, 7), (14, 9, 4), (5, 21, 14), (1, 1, 3), (10, 10, 1)]
    dtypes = (torch.float64, torch.float32)
    cases = [random_case(*size, dtype) for size in sizes for dtype in dtypes]
    file = tmp_path / "cases.pt"
    torch.save(cases, file)
    environment = os.environ | {"TORCHDYNAMO_DISABLE": "1"}
    command = [sys.executable, "-P", PROGRAM, PEERS, file]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for case in torch.load(file, weights_only=True):
        grid_size, maps = case["grid_size"], case["maps"].requires_grad_()
        ours = roi_align(maps, case["boxes"], grid_size)  # (B, K, bins, D)
        ours = ours.flatten(0, 1).mT.unflatten(-1, (grid_size, grid_size))
        torch.testing.assert_close(ours, case["aligned"])
        (grad,) = torch.autograd.grad(ours, maps, case["grad_aligned"])
        torch.testing.assert_close(grad, case["grad"])


def test_averages_of_a_constant_are_the_constant():
    maps = torch.full((2, 3, 11, 6), 2.5)
    aligned = roi_align(maps, random_boxes(2, 4, 11, 6, torch.float32), 5)
    torch.testing.assert_close(aligned, torch.full((2, 4, 25, 3), 2.5))


def test_a_box_per_cell_copies_the_map():
    maps = torch.randn(1, 2, 4, 4)
    aligned = roi_align(maps, torch.tensor([[[0.0, 0.0, 4.0, 4.0]]]), 4)
    torch.testing.assert_close(aligned[0, 0], maps[0].flatten(1).T)
