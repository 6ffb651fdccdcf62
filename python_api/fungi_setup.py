"""The arguments of an extractor, checked and completed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from fmkernels import CountSketch, KhatriRao, Rademacher
from fmkernels.ops.project_gradients import Projection

from .fungi_objectives import DINO, KL, Objective, SimCLR
from .fungi_passes import OP
from .fungi_random import derived_seed
from .fungi_tokens import KINDS
from .fungi_views import ImageViews, Views

PROJECTIONS: Mapping[str, Callable[..., Projection]] = {
    "count": CountSketch,
    "rademacher": Rademacher,
    "khatri_rao": KhatriRao,
}
RESIZE = {"paper": "shorter", "library": "square"}


def completed_views(views: Views | None, preset: str) -> Views:
    """The views; those of images, which are the default, with the preset's resizing."""
    found: Views = ImageViews() if views is None else views
    if not hasattr(found, "counts") or not hasattr(found, "make"):
        raise TypeError(
            f"{OP}: views: expected ImageViews, TextViews, CustomViews or an object with counts "
            f"and make, got {type(found).__name__}"
        )
    if isinstance(found, ImageViews) and found.resize is None:
        return found.with_resize(RESIZE[preset])
    return found


def named_objectives(
    objectives: Sequence[Objective] | None, preset: str, views: Views, per_token: bool
) -> dict[str, Objective]:
    """By name, with the preset's settings; a second one of a class gets a number."""
    found: dict[str, Objective] = {}
    kinds = KINDS if per_token else tuple(views.counts)
    if objectives is None:
        objectives = [own for own in (KL(), DINO(), SimCLR()) if own.view in kinds]
    if isinstance(objectives, (Objective, str)) or not isinstance(objectives, Iterable):
        raise TypeError(
            f"{OP}: objectives: expected a list such as [KL(), DINO()], got {objectives!r}"
        )
    for position, objective in enumerate(objectives):
        if not isinstance(objective, Objective):
            raise TypeError(
                f"{OP}: objectives[{position}]: expected an Objective such as KL(), got "
                f"{objective.__name__ if isinstance(objective, type) else objective!r}"
            )
        if objective.view not in kinds:
            what = "per_token=True" if per_token else type(views).__name__
            raise ValueError(
                f"{OP}: objectives[{position}]: expected one with views of {', '.join(kinds)} for "
                f"{what}, got {objective.name}, which needs {objective.view!r}"
            )
        _check_global_crops(position, objective, views)
        same = sum(objective.name == other.name for other in found.values())
        label = f"{objective.name}_{same + 1}" if same else objective.name
        found[label] = objective.resolved(preset)
    return found


def _check_global_crops(position: int, objective: Objective, views: Views) -> None:
    if not isinstance(objective, DINO) or not isinstance(views, ImageViews):
        return
    if objective.global_crops != views.global_crops:
        raise ValueError(
            f"{OP}: objectives[{position}]: expected global_crops={views.global_crops}, as the "
            f"views have, got {objective.global_crops}; the teacher sees those"
        )


def checked_projection(projection: Any, layer: nn.Linear, dim: int | None) -> str | Projection:
    """One of the names, or a projection that fits the layer."""
    if isinstance(projection, str):
        if projection not in PROJECTIONS:
            raise ValueError(
                f"{OP}: projection: expected one of {', '.join(PROJECTIONS)}, got {projection!r}; "
                "others are passed as objects, such as fmkernels.Kronecker(…)"
            )
        return projection
    if not isinstance(projection, Projection):
        raise TypeError(
            f"{OP}: projection: expected one of {', '.join(PROJECTIONS)} or a projection such as "
            f"fmkernels.CountSketch(…), got {type(projection).__name__}"
        )
    columns = layer.in_features + (layer.bias is not None)
    if (projection.out_features, projection.columns) != (layer.out_features, columns):
        raise ValueError(
            f"{OP}: projection: expected one for gradients of {layer.out_features} x {columns} "
            f"(bias={layer.bias is not None}), got {projection}"
        )
    if dim not in (None, projection.settings().dim):
        raise ValueError(
            f"{OP}: dim: expected None or {projection.settings().dim}, as projection has, got {dim}"
        )
    return projection


def made_projection(
    projection: str | Projection, layer: nn.Linear, dim: int, seed: int
) -> Projection:
    """The projection itself, or the one of that name for the layer."""
    if isinstance(projection, Projection):
        return projection
    return PROJECTIONS[projection](
        layer.out_features,
        layer.in_features,
        dim,
        bias=layer.bias is not None,
        seed=derived_seed(seed, "projection"),
    )
