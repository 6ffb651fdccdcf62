"""Where half precision would change the result."""

from __future__ import annotations

import torch
from torch import Tensor


def without_autocast(tensor: Tensor) -> torch.autocast:
    """A context in which autocast leaves alone what is computed on the tensor's device."""
    return torch.autocast(tensor.device.type, enabled=False)
