"""The head between a backbone's patch tokens and NeCo's loss."""

from __future__ import annotations

import functools
import itertools
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from fmkernels import _checks


class ProjectionHead(nn.Sequential):
    """NeCo's projection of patch tokens: an MLP with GELU, then L2 normalisation.

        y = W₃·gelu(W₂·gelu(W₁·x + b₁) + b₂) + b₃,   head(x) = y / ‖y‖

    Args:
        in_dim: D, the width of the tokens.
        hidden_dim: of the layers between.
        out_dim: of the projections.
        num_layers: linear layers in all, at least 1.

    Raises:
        ValueError: a width or a number of layers below 1; tokens of another width.

    Source:
        Pariza et al., *NeCo*, ICLR 2025. The names of the parameters and their first values
        (``nn.Linear``'s) are those of ``projection_head`` in the released code for DINOv2.

    Example:
        >>> import torch
        >>> from fmkernels.api import ProjectionHead
        >>> head = ProjectionHead(384)
        >>> head(torch.randn(2, 196, 384)).shape
        torch.Size([2, 196, 256])
    """

    def __init__(
        self, in_dim: int, hidden_dim: int = 2048, out_dim: int = 256, num_layers: int = 3
    ) -> None:
        positive = functools.partial(_checks.positive_integer, "ProjectionHead")
        in_dim, hidden_dim = positive("in_dim", in_dim), positive("hidden_dim", hidden_dim)
        out_dim, num_layers = positive("out_dim", out_dim), positive("num_layers", num_layers)
        widths = [in_dim, *[hidden_dim] * (num_layers - 1), out_dim]
        layers: list[nn.Module] = []
        for width, next_width in itertools.pairwise(widths):
            layers += [nn.Linear(width, next_width), nn.GELU()]
        super().__init__(*layers[:-1])
        self.in_dim = in_dim

    def __getitem__(self, index: int | slice) -> Any:
        """A layer, or some of them as a plain ``nn.Sequential``."""
        return nn.Sequential(*self)[index]

    def forward(self, tokens: Tensor) -> Tensor:
        """(…, in_dim) -> (…, out_dim), of length 1."""
        if tokens.shape[-1] != self.in_dim:
            raise ValueError(
                f"ProjectionHead: tokens: expected shape (…, {self.in_dim}), "
                f"got {tuple(tokens.shape)}; of maps (B, D, H, W) take tokens.flatten(2).mT"
            )
        for layer in self:
            tokens = layer(tokens)
        return F.normalize(tokens, dim=-1)
