"""Who makes FUNGI features of pictures: our extractor, fungivision, and the bare forward passes.

timm, torchvision and fungivision lie in .peers/, apart from .venv; torchvision does not import
beside this torch without stubs of two operators. So all of this runs in processes of its own.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fmkernels import Rademacher, _inference
from fmkernels.api import DINO, KL, FungiExtractor, ImageViews, Objective, SimCLR

if TYPE_CHECKING:
    from fungi.e2e import Extracting

PEERS = Path(__file__).resolve().parent.parent.parent / ".peers"
CPU = torch.device("cpu")
OBJECTIVES: dict[str, Objective] = {"KL": KL(), "DINO": DINO(), "SimCLR": SimCLR(negatives=1)}
VIEWS = ImageViews(resize="square")
"""fungivision's."""
NEGATIVES = 64 * VIEWS.counts["patches"]
"""Of fungivision's 64 images. Their latents are random here, which no loss can tell."""

Features = Callable[[list[Any]], Tensor]
"""Pictures -> (B, …)."""


@functools.cache
def importable() -> torch.library.Library:
    """Make what is in .peers/ importable; the stubs live as long as what is returned."""
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # torchvision would import the compiler
    sys.path.append(str(PEERS))
    stubs = torch.library.Library("torchvision", "DEF")
    stubs.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    stubs.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return stubs


def backbone(problem: Extracting) -> nn.Module:
    """timm's ViT-S/16 with random weights, the same each time."""
    importable()
    import timm

    torch.manual_seed(0)
    model: nn.Module = timm.create_model(
        "vit_small_patch16_224",
        num_classes=0,
        patch_size=problem.patch,
        embed_dim=problem.width,
        depth=problem.depth,
        num_heads=problem.heads,
    )
    return model.eval()


def latents() -> Tensor:
    """Negatives of SimCLR."""
    return torch.randn(NEGATIVES, SimCLR().latent_dim, generator=torch.Generator().manual_seed(1))


def extractor(problem: Extracting, **settings: Any) -> FungiExtractor:
    """Ours, with the losses and the plain view of fungivision."""
    made = FungiExtractor(
        backbone(problem),
        problem.target_layer,
        [OBJECTIVES[name] for name in problem.objectives],
        preset="library",
        views=VIEWS,
        **settings,
    )
    one = problem.inputs(0)[:1]
    made.fit_negatives(one)
    made(one)
    state = made.state_dict()
    made.load_state_dict({**state, "negatives": dict.fromkeys(state["negatives"], latents())})
    return made


def forwards(problem: Extracting) -> Features:
    """What cannot be left out: the model on views that are at hand, as many at a time as is
    fastest. Returns the embeddings of the plain ones."""
    model, pictures = backbone(problem), problem.inputs(0)
    kinds = ["plain", *(OBJECTIVES[name].view for name in problem.objectives if name != "KL")]
    views = [VIEWS.make(kind, pictures, CPU, range(len(pictures))) for kind in kinds]

    @torch.no_grad()
    def run(pictures: list[Any]) -> Tensor:
        found = [
            torch.cat([model(part) for part in whole.split(_inference.pass_size(whole))])
            for whole in views
        ]
        return F.normalize(found[0], dim=1)

    return run


def wrapper(problem: Extracting) -> Any:
    """fungivision's, with fixed negatives."""
    importable()
    from fungivision import config
    from fungivision.wrapper import FUNGIWrapper

    made = FUNGIWrapper(
        backbone(problem),
        problem.target_layer,
        CPU,
        extractor_configs=[getattr(config, f"{name}Config")() for name in problem.objectives],
    )
    for own in made.extractors:
        own.comparison_batch = latents()
    return made


def fungivision(problem: Extracting) -> Features:
    """Its features, and the embeddings, which it does not give, of views that are at hand."""
    made, model, pictures = wrapper(problem), backbone(problem), problem.inputs(0)
    plain = VIEWS.make("plain", pictures, CPU, range(len(pictures)))

    def run(pictures: list[Any]) -> Tensor:
        with torch.no_grad():
            embeddings = F.normalize(model(plain), dim=1)
        return torch.cat([embeddings, made(pictures).detach()], dim=1)

    return run


def same_views(made: Any, problem: Extracting) -> tuple[Tensor, Tensor]:
    """Gradient features of one picture by fungivision and by ours: the same views, heads, matrix.

    Returns:
        Theirs and ours, (objectives, K).
    """
    matrix, layer = made.extractors[0].projection, (problem.width, problem.width)
    ours = extractor(problem, projection=Rademacher.from_matrix(matrix, *layer), embedding=False)
    one = problem.inputs(0)[:1]
    found = []
    for (name, objective), own in zip(ours.objectives.items(), made.extractors, strict=True):
        heads = ours.state_dict()["heads"][name]
        own.projection_head.load_state_dict(heads["student" if name == "DINO" else "head"])
        if name == "DINO":
            own.teacher_projection.load_state_dict(heads["teacher"])
        views = ours._views(objective.view, one, [0])
        own.transform = lambda given: given[0] if len(given) == 1 else given
        found.append(own([views]).detach()[0])
    return torch.stack(found), ours(one)[0].unflatten(0, (len(found), -1))


PROVIDERS: dict[str, Callable[[Extracting], Features]] = {
    "fmkernels": extractor,
    "fmkernels-bfloat16": functools.partial(extractor, dtype=torch.bfloat16),
    "forwards": forwards,
    "fungivision": fungivision,
}
