"""Fused kernels that make the methods of *Improving Foundation Models with academic compute* cheap.

Functions on tensors live here; what the papers call things (modules, losses, extractors) lives in
``fmkernels.api``. ``python -m fmkernels info`` says what this installation can do.
"""

from fmkernels import testing
from fmkernels._library import backend
from fmkernels._version import __version__
from fmkernels.ops.patch_neighbor_loss import patch_neighbor_loss
from fmkernels.ops.soft_sort import soft_sort
from fmkernels.ops.soft_sort_cross_entropy import soft_sort_cross_entropy

__all__ = [
    "__version__",
    "backend",
    "patch_neighbor_loss",
    "soft_sort",
    "soft_sort_cross_entropy",
    "testing",
]
