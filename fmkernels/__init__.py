"""Fused kernels that make the methods of *Improving Foundation Models with academic compute* cheap.

Functions on tensors live here; what the papers call things (modules, losses, extractors) lives in
``fmkernels.api``. ``python -m fmkernels info`` says what this installation can do.
"""

import importlib
from typing import Any

from fmkernels import testing
from fmkernels._library import backend
from fmkernels._version import __version__
from fmkernels.ops.dvora_linear import DvoraNorms, dvora_linear
from fmkernels.ops.gradient_similarity import gradient_similarity
from fmkernels.ops.knn import KNNInfo, knn
from fmkernels.ops.knn_label_propagation import knn_label_propagation
from fmkernels.ops.patch_neighbor_loss import patch_neighbor_loss
from fmkernels.ops.project_gradients import (
    CountSketch,
    KhatriRao,
    Kronecker,
    Projection,
    Rademacher,
    project_gradients,
)
from fmkernels.ops.soft_sort import soft_sort
from fmkernels.ops.soft_sort_cross_entropy import soft_sort_cross_entropy
from fmkernels.ops.vera_delta_weight import vera_delta_weight
from fmkernels.ops.vera_expand import vera_expand
from fmkernels.ops.vera_linear import vera_linear
from fmkernels.ops.vera_matrices import vera_matrices
from fmkernels.ops.vera_shrink import vera_shrink

__all__ = [
    "CountSketch",
    "DvoraNorms",
    "KNNInfo",
    "KhatriRao",
    "Kronecker",
    "Projection",
    "Rademacher",
    "__version__",
    "backend",
    "dvora_linear",
    "gradient_similarity",
    "knn",
    "knn_label_propagation",
    "patch_neighbor_loss",
    "project_gradients",
    "soft_sort",
    "soft_sort_cross_entropy",
    "testing",
    "vera_delta_weight",
    "vera_expand",
    "vera_linear",
    "vera_matrices",
    "vera_shrink",
]


def __getattr__(name: str) -> Any:
    """``fmkernels.api`` without an import of its own; it is loaded when it is first used."""
    if name == "api":
        return importlib.import_module("fmkernels.api")
    raise AttributeError(f"module 'fmkernels' has no attribute {name!r}")
