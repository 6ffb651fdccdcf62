"""The head between a backbone's patch tokens and NeCo's loss."""

from __future__ import annotations

import itertools

from torch import Tensor, nn
from torch.nn import functional as F


class ProjectionHead(nn.Sequential):
    """NeCo's projection of patch tokens: an MLP with GELU, then L2 normalisation.

        y = W₃·gelu(W₂·gelu(W₁·x + b₁) + b₂) + b₃,   head(x) = y / ‖y‖

    Args:
        in_dim: D, the width of the tokens.
        hidden_dim: of the layers between.
        out_dim: of the projections.
        num_layers: linear layers in all, at least 1.

    Raises:
        ValueError: fewer than one layer.

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
        if num_layers < 1:
            raise ValueError(f"ProjectionHead: num_layers: expected at least 1, got {num_layers}")
        widths = [in_dim, *[hidden_dim] * (num_layers - 1), out_dim]
        layers: list[nn.Module] = []
        for width, next_width in itertools.pairwise(widths):
            layers += [nn.Linear(width, next_width), nn.GELU()]
        super().__init__(*layers[:-1])

    def forward(self, tokens: Tensor) -> Tensor:
        """(…, in_dim) -> (…, out_dim), of length 1."""
        for layer in self:
            tokens = layer(tokens)
        return F.normalize(tokens, dim=-1)
