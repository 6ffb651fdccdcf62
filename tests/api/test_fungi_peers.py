"""Beside fungivision itself, and on models of transformers and timm."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fungi_losses import materialised, whole_gradients
from fungi_models import LAST, small_vit
from torch.nn import functional as F

from fmkernels import Rademacher
from fmkernels.api import DINO, KL, FungiExtractor, ImageViews, SimCLR

ROOT = Path(__file__).parent.parent.parent
PEERS = ROOT / ".peers"
PROGRAM = ROOT / "tests" / "support" / "fungi_peers.py"
needs = {
    name: pytest.mark.skipif(not (PEERS / name).exists(), reason=f"needs {name} in .peers/")
    for name in ("fungivision", "timm")
}
VIEWS = ImageViews(size=16, stride_scale=2)


def run_peer(tmp_path, what, case):
    file = tmp_path / "case.pt"
    torch.save(case, file)
    environment = os.environ | {"TORCHDYNAMO_DISABLE": "1", "PYTHONPATH": str(PROGRAM.parent)}
    result = subprocess.run(
        [sys.executable, "-P", PROGRAM, PEERS, what, file],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return torch.load(file, weights_only=True)


@needs["fungivision"]
@pytest.mark.parametrize("objective", [KL(32), DINO(48), SimCLR(20, negatives=3)], ids=repr)
def test_features_are_fungivision_s_with_its_views_heads_and_matrix(tmp_path, objective):
    """Both compute in float32, its part in another order; the project's parity rule, for once by
    the cosine: features are compared by it."""
    batch = torch.rand(3, 3, 20, 28)
    matrix = torch.randint(2, (24, 24 * 25)).float() * 2 - 1
    ours = FungiExtractor(
        small_vit(),
        LAST,
        [objective],
        preset="library",
        projection=Rademacher.from_matrix(matrix, 24, 24),
        views=VIEWS,
        embedding=False,
    )
    ours.fit_negatives(list(torch.rand(3, 3, 20, 28)))
    features = ours(batch)
    state = ours.state_dict()
    made = ours._views(objective.view, batch, range(3)).unflatten(0, (3, -1))
    case = {
        "name": objective.name,
        "latent_dim": objective.latent_dim,
        "views": made,
        "heads": state["heads"][objective.name],
        "matrix": matrix,
    }
    if objective.name in state["negatives"]:
        case["negatives"] = state["negatives"][objective.name]
    theirs = run_peer(tmp_path, "fungivision", case)
    assert theirs.shape == features.shape
    assert (F.cosine_similarity(features.double(), theirs.double()) > 1 - 1e-6).all()


@needs["timm"]
def test_gradients_of_a_timm_model(tmp_path):
    found = run_peer(tmp_path, "timm", {"images": torch.rand(2, 3, 20, 24)})
    assert found["rows"] == {"KL": 1, "DINO": 5, "SimCLR": 9}
    for name, (ours, expected) in found["pairs"].items():
        cosines = F.cosine_similarity(ours.flatten(1).double(), expected.flatten(1).double())
        assert (cosines > 1 - 1e-6).all(), name
        torch.testing.assert_close(
            ours.flatten(1).norm(dim=1), expected.flatten(1).norm(dim=1), rtol=1e-4, atol=0
        )


def transformers_vit():
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(3)
    config = ViTConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=16,
        patch_size=4,
    )
    return ViTModel(config)


TARGET = "layers.1.attention.o_proj"


@pytest.mark.parametrize("pooling", ["cls", "mean", "pooler"])
def test_gradients_of_a_transformers_model(pooling):
    model = transformers_vit()
    extractor = FungiExtractor(
        model, TARGET, [KL(32), DINO(48), SimCLR(20)], views=VIEWS, pooling=pooling
    )
    batch = torch.rand(2, 3, 20, 24)
    found = extractor.fit_negatives(list(batch)).gradients(batch)
    state = extractor.state_dict()
    pools = {
        "cls": lambda output: output.last_hidden_state[:, 0],
        "mean": lambda output: output.last_hidden_state.mean(dim=1),
        "pooler": lambda output: output.pooler_output,
    }
    model.eval()
    for objective in extractor.objectives.values():
        views = extractor._views(objective.view, batch, range(2)).unflatten(0, (2, -1))
        expected = whole_gradients(
            model,
            TARGET,
            views,
            objective.name,
            "paper",
            state["heads"][objective.name],
            state["negatives"].get(objective.name),
            pool=pools[pooling],
        )
        ours = materialised(found[objective.name]).flatten(1).double()
        cosines = F.cosine_similarity(ours, expected.flatten(1).double())
        assert (cosines > 1 - 1e-6).all()
