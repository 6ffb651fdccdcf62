"""FUNGI's objectives: self-supervised losses of one image, from the embeddings of its views."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fmkernels import _checks
from fmkernels._autocast import without_autocast

PRESETS = ("paper", "library")
SELF_SIMILARITY = -1e4
"""Takes a view's similarity with itself out of the sum over all views."""

Own = TypeVar("Own", bound="Objective")


class Head(NamedTuple):
    """A linear layer that is never trained; called on embeddings (…, E) it gives latents (…, L)."""

    weight: Tensor
    bias: Tensor

    def __call__(self, embeddings: Tensor) -> Tensor:
        """(…, E) -> (…, L), in their own dtype, also under autocast."""
        if embeddings.shape[-1] != self.weight.shape[1]:
            raise ValueError(
                f"FungiExtractor: heads: expected embeddings of {self.weight.shape[1]} numbers, "
                f"got {embeddings.shape[-1]}; load the state of an extractor of the same model"
            )
        with without_autocast(embeddings):
            return F.linear(embeddings, self.weight, self.bias)

    @classmethod
    def draw(cls, embedding_dim: int, latent_dim: int, generator: torch.Generator) -> Head:
        """As ``torch.nn.Linear`` is initialised: uniform between ±1/√E."""
        bound = 1 / math.sqrt(embedding_dim)

        def uniform(*shape: int) -> Tensor:
            drawn = torch.rand(
                shape, generator=generator, dtype=torch.float32, device=generator.device
            )
            return (2 * drawn - 1) * bound

        return cls(uniform(latent_dim, embedding_dim), uniform(latent_dim))

    def to(self, device: torch.device) -> Head:
        """The same head on another device."""
        return Head(self.weight.to(device), self.bias.to(device))

    def like(self, embeddings: Tensor) -> Head:
        """The same head in the dtype of the embeddings, on their device."""
        return Head(self.weight.to(embeddings), self.bias.to(embeddings))


@dataclasses.dataclass(frozen=True)
class Objective:
    """A self-supervised loss whose gradient becomes a feature; subclass it to add your own.

    A subclass is a frozen dataclass with a :meth:`loss`. Settings that are None are those of the
    preset, as ``presets`` lists them.

    Args:
        latent_dim: L, outputs of each head, a random linear layer.

    Example:
        >>> import dataclasses, torch
        >>> from fmkernels.api.fungi_objectives import Objective
        >>> @dataclasses.dataclass(frozen=True)
        ... class Entropy(Objective):
        ...     latent_dim: int = 64
        ...     def loss(self, embeddings, heads, negatives=None):  # (B, V, E) -> (B,)
        ...         log_p = heads["head"](embeddings).log_softmax(dim=-1)
        ...         return -(log_p.exp() * log_p).sum(dim=(1, 2))
        >>> Entropy().name
        'Entropy'
    """

    view: ClassVar[str] = "plain"
    """What the extractor's views are asked for: ``"plain"``, ``"crops"`` or ``"patches"``."""
    heads: ClassVar[tuple[str, ...]] = ("head",)
    """Names of the heads."""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Preset -> the settings that it fills in."""

    latent_dim: int

    def __post_init__(self) -> None:
        _checks.positive_integer(self.name, "latent_dim", self.latent_dim)

    @property
    def name(self) -> str:
        """Under which the heads and negatives are kept: the name of the class."""
        return type(self).__name__

    @property
    def wanted_negatives(self) -> int:
        """Images to make negatives from; 0 if the loss needs none."""
        return 0

    def resolved(self: Own, preset: str) -> Own:
        """The same with the preset's values for settings that are None."""
        values = self.presets.get(preset, {})
        missing = {name: value for name, value in values.items() if getattr(self, name) is None}
        return dataclasses.replace(self, **missing)

    def loss(
        self, embeddings: Tensor, heads: Mapping[str, Head], negatives: Tensor | None = None
    ) -> Tensor:
        """Embeddings (B, V, E) of the V views of each image -> the loss of each image, (B,).

        No image may depend on another one. Differentiable in the embeddings.
        """
        raise NotImplementedError(f"{self.name}: loss: expected a subclass to define it")


@dataclasses.dataclass(frozen=True)
class KL(Objective):
    """Divergence of an image's latent distribution from the uniform one.

        z = W·e/‖e‖ + b,    loss = 1/L Σ_l 1/L (−log L − log softmax(z / τ)_l)

    Args:
        latent_dim: L.
        temperature: τ; 15 in the paper, 1 in its library.

    Numerics:
        The gradient is about 1e-8; the extractor scales it to 1 before it passes through the model.

    Source:
        Simoncini et al., *No Train, all Gain*, NeurIPS 2024.

    Example:
        >>> import torch
        >>> from fmkernels.api import KL
        >>> from fmkernels.api.fungi_objectives import Head
        >>> head = Head(torch.zeros(8, 4), torch.zeros(8))  # its softmax is uniform
        >>> loss = KL(8, temperature=1.0).loss(torch.ones(2, 1, 4), {"head": head})
        >>> bool((loss.abs() < 1e-6).all())
        True
    """

    latent_dim: int = 768
    temperature: float | None = None

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"temperature": 15.0},
        "library": {"temperature": 1.0},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_temperature(self.name, "temperature", self.temperature)

    def loss(
        self, embeddings: Tensor, heads: Mapping[str, Head], negatives: Tensor | None = None
    ) -> Tensor:
        """See the class; summed over views if there are several."""
        assert self.temperature is not None
        latents = heads["head"](F.normalize(embeddings, dim=-1)) / self.temperature
        log_p = latents.log_softmax(dim=-1)  # (B, V, L)
        return (-math.log(self.latent_dim) - log_p.mean(dim=-1)).sum(dim=1) / self.latent_dim


@dataclasses.dataclass(frozen=True)
class DINO(Objective):
    """Cross-entropy of every crop's latent distribution with those of the global crops.

        loss = Σ_i Σ_j − softmax(T(e_i) / τ_t) · log softmax(S(e_j) / τ_s)

    over global crops i and all crops j, with j = i kept; e normalised; T and S are different random
    heads; no gradient passes through the teacher's side.

    Args:
        latent_dim: L.
        teacher_temperature: τ_t.
        student_temperature: τ_s.
        global_crops: how many of the views, the first ones, the teacher sees.

    Source:
        Caron et al., *Emerging Properties in Self-Supervised Vision Transformers*, ICCV 2021;
        Simoncini et al., *No Train, all Gain*, NeurIPS 2024.

    Example:
        >>> from fmkernels.api import DINO
        >>> DINO()
        DINO(latent_dim=2048, teacher_temperature=0.07, student_temperature=0.1, global_crops=2)
    """

    latent_dim: int = 2048
    teacher_temperature: float = 0.07
    student_temperature: float = 0.1
    global_crops: int = 2

    view: ClassVar[str] = "crops"
    heads: ClassVar[tuple[str, ...]] = ("teacher", "student")

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_temperature(self.name, "teacher_temperature", self.teacher_temperature)
        _check_temperature(self.name, "student_temperature", self.student_temperature)
        _checks.positive_integer(self.name, "global_crops", self.global_crops)

    def loss(
        self, embeddings: Tensor, heads: Mapping[str, Head], negatives: Tensor | None = None
    ) -> Tensor:
        """See the class. The double sum is a product of two sums."""
        if embeddings.shape[1] < self.global_crops:
            raise ValueError(
                f"{self.name}: views: expected at least the {self.global_crops} global crops, got "
                f"{embeddings.shape[1]}"
            )
        embeddings = F.normalize(embeddings, dim=-1)
        seen = embeddings[:, : self.global_crops].detach()
        teacher = (heads["teacher"](seen) / self.teacher_temperature).softmax(dim=-1)
        student = (heads["student"](embeddings) / self.student_temperature).log_softmax(dim=-1)
        return -(teacher.sum(dim=1) * student.sum(dim=1)).sum(dim=-1)


@dataclasses.dataclass(frozen=True)
class SimCLR(Objective):
    """InfoNCE of the patches of an image against patches of other images.

    With S the cosines of the latents of the V views with those of all views and of fixed negatives,

        loss = 1/V Σ_i [ −1/(V−1) Σ_{j ≠ i} S_ij/τ + log Σ_{j ≠ i} exp(S_ij/τ) ],

    the first sum over views, the second over views and negatives. Embeddings are not normalised
    before the head.

    Args:
        latent_dim: L.
        temperature: τ.
        negatives: images that the negatives are made from; 256 in the paper, 64 in its library.
        scaled_normalizer: whether τ also divides inside the logarithm. The library leaves it out,
            which turns the gradient.

    Source:
        Chen et al., *A Simple Framework for Contrastive Learning*, ICML 2020; Simoncini et al.,
        *No Train, all Gain*, NeurIPS 2024.

    Example:
        >>> from fmkernels.api import SimCLR
        >>> SimCLR().resolved("library")
        SimCLR(latent_dim=96, temperature=0.07, negatives=64, scaled_normalizer=False)
    """

    latent_dim: int = 96
    temperature: float = 0.07
    negatives: int | None = None
    scaled_normalizer: bool | None = None

    view: ClassVar[str] = "patches"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"negatives": 256, "scaled_normalizer": True},
        "library": {"negatives": 64, "scaled_normalizer": False},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_temperature(self.name, "temperature", self.temperature)
        if self.negatives is not None:
            _checks.positive_integer(self.name, "negatives", self.negatives, ", or None")

    @property
    def wanted_negatives(self) -> int:
        """Images to make negatives from."""
        return self.negatives or 0

    def loss(
        self, embeddings: Tensor, heads: Mapping[str, Head], negatives: Tensor | None = None
    ) -> Tensor:
        """See the class. ``negatives`` are latents (M, L), or (B, M, L) with own ones per image."""
        if negatives is None:
            raise ValueError(
                f"{self.name}: negatives: expected some, got none; call fit_negatives(dataset) "
                "before the first features"
            )
        views = embeddings.shape[1]
        if views < 2:
            raise ValueError(f"{self.name}: views: expected at least 2 per image, got {views}")
        latents = F.normalize(heads["head"](embeddings), dim=-1)  # (B, V, L)
        others = F.normalize(negatives.to(latents.dtype), dim=-1)
        own = torch.eye(views, dtype=torch.bool, device=latents.device)
        positive = (latents @ latents.mT).masked_fill(own, SELF_SIMILARITY)  # (B, V, V)
        scores = torch.cat([latents @ others.mT, positive], dim=-1)
        pulled = positive.masked_fill(own, 0).sum(dim=-1) / (self.temperature * (views - 1))
        if self.scaled_normalizer:
            scores = scores / self.temperature
        return (scores.logsumexp(dim=-1) - pulled).mean(dim=1)


def _check_temperature(op: str, argument: str, value: Any) -> None:
    if value is None:
        return
    _checks.non_negative(op, argument, value)
    if not value:
        raise ValueError(f"{op}: {argument}: expected a number > 0, got {value}")
