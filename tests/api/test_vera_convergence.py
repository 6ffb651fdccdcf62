"""A small transformer trains by get_vera_model as it does by PEFT's VeRA, loss by loss.

In float64 the first 20 losses are the same to 1e-9. In float32 two orders of summation part ways
slowly; what is asked there is that over a whole training the losses are nearer to those of PEFT's
run with the same seed, at every step, than a hundredth of the deviation that PEFT's own runs have
at that step when seeds draw other batches and another classifier.
"""

import copy

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("sklearn")

import peft
from sklearn.datasets import load_digits
from transformers import ViTConfig, ViTForImageClassification

from fmkernels.api import VeraConfig, get_vera_model

SETTINGS = {"r": 16, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"]}
STEPS = 20
RESEEDED = range(1, 6)


@pytest.fixture(scope="module")
def digits():
    images, labels = load_digits(return_X_y=True)
    return torch.from_numpy(images).view(-1, 1, 8, 8) / 8 - 1, torch.from_numpy(labels)


@pytest.fixture(scope="module")
def vit():
    """The same untrained weights for all."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        image_size=8, patch_size=2, num_channels=1, num_labels=10,
    )  # fmt: skip
    return ViTForImageClassification(config).eval()


def ours(model):
    return get_vera_model(model, VeraConfig(**SETTINGS))


def theirs(model):
    return peft.get_peft_model(model, peft.VeraConfig(**SETTINGS))


def losses(adapt, vit, digits, seed=0, steps=STEPS, dtype=torch.float32):
    """(steps), of Adam; the seed draws the classifier and the batches."""
    model = copy.deepcopy(vit)
    torch.manual_seed(seed)
    model.classifier.reset_parameters()
    model = adapt(model.to(dtype)).eval()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    images, labels = digits
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(steps):
        rows = torch.randint(len(labels), (32,), generator=generator)
        loss = F.cross_entropy(model(pixel_values=images[rows].to(dtype)).logits, labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return torch.tensor(found, dtype=torch.float64)


def test_float64_losses_are_peft_s(vit, digits):
    found, expected = (losses(a, vit, digits, dtype=torch.float64) for a in (ours, theirs))
    assert (found - expected).abs().max() < 1e-9
    assert expected[-5:].mean() < expected[:5].mean()


def test_float32_losses_stay_within_the_spread_of_seeds(vit, digits):
    steps = 60
    found, expected = (losses(adapt, vit, digits, steps=steps) for adapt in (ours, theirs))
    others = [losses(theirs, vit, digits, seed, steps) for seed in RESEEDED]
    spread = torch.stack([expected, *others]).std(dim=0)
    assert ((found - expected).abs() < spread / 100).all()  # 6e-6 of it when this was written
    assert found[-10:].mean() < 2.0  # 1.71; ln 10 = 2.30 is chance
