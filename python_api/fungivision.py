"""The names and arguments of the fungivision package: its programs run with other imports."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fmkernels import Rademacher, _checks

from .fungi import FungiExtractor
from .fungi_objectives import DINO, KL, SimCLR
from .fungi_views import ImageViews
from .gradient_capture import linear_layer

OP = "FUNGIWrapper"


@dataclasses.dataclass
class KLConfig:
    """fungivision's settings of :class:`KL`.

    Example:
        >>> from fmkernels.api import KLConfig
        >>> KLConfig(latent_dim=96).objective()
        KL(latent_dim=96, temperature=1)
    """

    temperature: float = 1
    latent_dim: int = 768

    def objective(self) -> KL:
        """What :class:`FungiExtractor` takes."""
        return KL(self.latent_dim, self.temperature)


@dataclasses.dataclass
class DINOConfig:
    """fungivision's settings of :class:`DINO`.

    Example:
        >>> from fmkernels.api import DINOConfig
        >>> DINOConfig().objective().latent_dim
        2048
    """

    teacher_temperature: float = 0.07
    student_temperature: float = 0.1
    latent_dim: int = 2048

    def objective(self) -> DINO:
        """What :class:`FungiExtractor` takes."""
        return DINO(self.latent_dim, self.teacher_temperature, self.student_temperature)


@dataclasses.dataclass
class SimCLRConfig:
    """fungivision's settings of :class:`SimCLR`.

    ``comparison_batch_encoding_batch_size`` and ``self_similarity_constant`` (which must be at most
    −1,000, and then makes no difference) have no effect.

    Example:
        >>> from fmkernels.api import SimCLRConfig
        >>> SimCLRConfig(comparison_batch_size=8).objective().negatives
        8
    """

    temperature: float = 0.07
    self_similarity_constant: float = -10e3
    comparison_batch_size: int = 64
    comparison_batch_encoding_batch_size: int = 32
    latent_dim: int = 96
    num_patches: int = 4
    stride_scale: int = 6

    def objective(self) -> SimCLR:
        """What :class:`FungiExtractor` takes."""
        if self.self_similarity_constant > -1000:
            raise ValueError(
                "SimCLRConfig: self_similarity_constant: expected at most -1000, which takes a "
                f"view's similarity with itself out, got {self.self_similarity_constant}"
            )
        return SimCLR(self.latent_dim, self.temperature, self.comparison_batch_size)

    @property
    def grid(self) -> int:
        """Windows along each side, if they did not overlap."""
        grid = math.isqrt(_checks.positive_integer("SimCLRConfig", "num_patches", self.num_patches))
        if grid * grid != self.num_patches:
            raise ValueError(
                f"SimCLRConfig: num_patches: expected a square number, got {self.num_patches}"
            )
        return grid


Config: TypeAlias = KLConfig | DINOConfig | SimCLRConfig


class FUNGIWrapper:
    """fungivision's wrapper around :class:`FungiExtractor`, with ``preset="library"``.

    Its features are those of the gradients alone, without the embedding. Different from the
    package: heads, projection and views are functions of a seed (42); ``projection`` and
    ``fp16_dtype`` work; the projection is a count sketch unless a ±1 matrix is given.

    Args:
        model: moved to the device.
        target_layer: the name of a linear layer.
        device: of model and features.
        projection: a matrix (K, out · (in + 1)) of ±1, as fungivision draws it; None for a count
            sketch.
        input_dim: pixels along each side of what the model sees.
        use_fp16: run the model under autocast.
        fp16_dtype: in this dtype.
        extractor_configs: the objectives.

    Example:
        >>> import torch
        >>> from fmkernels.api import FUNGIWrapper, KLConfig
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Flatten(), torch.nn.Linear(192, 16), torch.nn.Linear(16, 16))
        >>> fungi = FUNGIWrapper(
        ...     model, "2", torch.device("cpu"), input_dim=8, extractor_configs=[KLConfig()])
        >>> fungi([torch.rand(3, 9, 9), torch.rand(3, 20, 15)]).shape
        torch.Size([2, 16])
    """

    def __init__(
        self,
        model: nn.Module,
        target_layer: str,
        device: torch.device | str,
        projection: Tensor | None = None,
        input_dim: int = 224,
        use_fp16: bool = False,
        fp16_dtype: torch.dtype = torch.bfloat16,
        extractor_configs: Sequence[Config] = (),
    ) -> None:
        if not extractor_configs:
            raise ValueError(f"{OP}: extractor_configs: expected at least one, got none")
        for position, config in enumerate(extractor_configs):
            if not isinstance(config, Config):
                raise TypeError(
                    f"{OP}: extractor_configs[{position}]: expected a KLConfig, DINOConfig or "
                    f"SimCLRConfig, got {config!r}; FungiExtractor takes objectives"
                )
        layer = linear_layer(OP, model, target_layer)
        grids = {
            (config.grid, config.stride_scale)
            for config in extractor_configs
            if isinstance(config, SimCLRConfig)
        }
        if len(grids) > 1:
            raise ValueError(
                f"{OP}: extractor_configs: expected one num_patches and stride_scale, got "
                f"{len(grids)}; make a wrapper for each"
            )
        grid, stride_scale = grids.pop() if grids else (2, 6)
        self.model = model.to(_checks.device(OP, "device", device))
        self.target_layer = target_layer
        self.extractor = FungiExtractor(
            self.model,
            target_layer,
            [config.objective() for config in extractor_configs],
            projection="count" if projection is None else _given(projection, layer),
            preset="library",
            views=ImageViews(input_dim, grid=grid, stride_scale=stride_scale),
            embedding=False,
            dtype=fp16_dtype if use_fp16 else None,
        )

    def setup(self, dataset: Any) -> None:
        """Make the negatives from a dataset of (image, …)."""
        self.extractor.fit_negatives(dataset)

    def gradients_dim(self, layer: nn.Linear) -> int:
        """Numbers in the gradient of a linear layer."""
        return layer.out_features * (layer.in_features + (layer.bias is not None))

    def forward(self, images: Sequence[Any]) -> Tensor:
        """Features (B, objectives · K) of a list of images, each block of norm 1."""
        return self.extractor(images)

    __call__ = forward


def _given(projection: Tensor, layer: nn.Linear) -> Rademacher:
    return Rademacher.from_matrix(
        projection, layer.out_features, layer.in_features, bias=layer.bias is not None
    )
