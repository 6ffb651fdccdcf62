"""The guides' code runs as it stands, block after block."""

import functools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from crops import random_crops
from fungi_models import SmallViT
from PIL import Image
from torch import nn
from torch.nn import functional as F

import fmkernels.api

GUIDES = Path(__file__).parent.parent / "docs" / "guides"


def blocks(name):
    """The Python of a guide, without its doctests."""
    found = re.findall(r"```python\n(.*?)```", (GUIDES / f"{name}.md").read_text(), re.DOTALL)
    return [block for block in found if not block.startswith(">>>")]


class Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 384, 14, 14)

    def forward(self, images):
        return self.embed(images).flatten(2).mT


@pytest.fixture
def one_rank(monkeypatch, tmp_path):
    """What torchrun tells a process, and a folder for its files."""
    for name, value in (("RANK", 0), ("WORLD_SIZE", 1), ("MASTER_PORT", 0)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.chdir(tmp_path)
    yield
    torch.distributed.destroy_process_group()


def test_neco(one_rank, monkeypatch):
    eager = functools.partial(torch.compile, backend="eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", eager)  # inductor: tests/api/test_neco_loss.py
    narrow = functools.partial(fmkernels.api.ProjectionHead, hidden_dim=64)
    monkeypatch.setattr(fmkernels.api, "ProjectionHead", narrow)  # bfloat16 is slow on a CPU
    sizes = [(16, 16)] * 2 + [(7, 7)] * 4
    views = [torch.randn(1, 3, 14 * rows, 14 * columns) for rows, columns in sizes]
    state = {
        "backbone": Backbone(),
        "dataset": list(zip(zip(*views, strict=True), random_crops(1, sizes), strict=True)),
        "pixel_masks": torch.ones(1, 2, 224, 224),
    }
    for block in blocks("neco"):
        exec(block, state)
    assert state["loss"].isfinite()
    assert state["least"] > 0
    pushes = 1 + 1 + 4 + 1 + 1 + 1  # but for the evaluation
    assert state["remembered"].queue.written.tolist() == [10 * pushes] * 2
    gradients = [parameter.grad for parameter in state["trained"].parameters()]
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_from_diffsort():
    student, teacher = 0.15 * torch.randn(2, 5, 49, dtype=torch.float64)
    features = torch.randn(3, 2, 9, 16, dtype=torch.float64)
    scores = {"student": student, "teacher": teacher}
    features = dict(zip(("student", "teacher", "references"), features, strict=True))
    state = {"torch": torch, "F": F}
    losses = []
    for index, block in enumerate(blocks("from_diffsort")):
        exec(block, state | (scores if index < 3 else features), state)
        losses.append(state.get("loss"))
    _, *losses = losses
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(losses[2], losses[3])


def test_from_fungivision(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    arrays = draw.integers(256, size=(3, 230, 250, 3), dtype=np.uint8)
    dataset = [(Image.fromarray(array), label) for label, array in enumerate(arrays)]
    state = {
        "torch": torch,
        "model": SmallViT(depth=12, size=224, patch=56),
        "train_dataset": dataset,
        "dataset": dataset,
        "data_loader": [tuple(zip(*part, strict=True)) for part in (dataset[:2], dataset[2:])],
    }
    wrapper, extractor, copied = blocks("from_fungivision")
    exec(wrapper, state)
    assert state["features"].shape == (3, 3 * 24)
    exec(extractor, state)
    assert state["features"].shape == (3, 4 * 24)
    saved = torch.load("extractor.pt", weights_only=True)
    assert saved["negatives"]["SimCLR"].shape == (3 * 49, 96)
    state["matrix"] = torch.randint(2, (10, 24 * 25)).float() * 2 - 1
    state["images"], state["projection_head"] = [dataset[0][0]], nn.Linear(24, 768)
    exec(copied, state)
    head = state["fungi"].extractor.state_dict()["heads"]["KL"]["head"]
    assert torch.equal(head["weight"], state["projection_head"].weight)
