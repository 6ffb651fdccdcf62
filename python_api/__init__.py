"""The papers' building blocks on top of the ops: modules, losses, extractors, evaluators."""

from .crops import intersection_boxes
from .diffsort import DiffSortNet
from .neco import NeCoLoss
from .patch_index import PatchIndex
from .projection_head import ProjectionHead
from .segmentation_metrics import ConfusionMatrix

__all__ = [
    "ConfusionMatrix",
    "DiffSortNet",
    "NeCoLoss",
    "PatchIndex",
    "ProjectionHead",
    "intersection_boxes",
]
