"""The papers' building blocks on top of the ops: modules, losses, extractors, evaluators."""

from .adapter_pool import AdapterPool, UnknownAdapterError
from .bank_file import BankFile, open_bank
from .crops import intersection_boxes
from .diffsort import DiffSortNet
from .fungi import FungiExtractor
from .fungi_objectives import DINO, KL, Objective, SimCLR
from .fungi_protocol import (
    FeatureScores,
    concatenate,
    evaluate_features,
    few_shot,
    retrieval_scores,
)
from .fungi_text import TextViews
from .fungi_views import CustomViews, ImageViews
from .fungivision import DINOConfig, FUNGIWrapper, KLConfig, SimCLRConfig
from .in_context import InContextSegmenter, SegmentationResult
from .knn_classifier import KNNClassifier
from .linear_segmentation import LinearSegmentationHead
from .neco import NeCoLoss
from .overclustering import Overclustering
from .patch_index import IndexMemory, PatchIndex
from .patch_labels import patch_label_counts
from .patch_memory import PatchMemory
from .projection_head import ProjectionHead
from .retrieval import rank_database, retrieval_map
from .segmentation_metrics import ConfusionMatrix
from .sharded import sharded_search
from .vera_config import VeraConfig
from .vera_model import VeraModel, get_vera_model
from .vera_peft import accelerate_peft

__all__ = [
    "DINO",
    "KL",
    "AdapterPool",
    "BankFile",
    "ConfusionMatrix",
    "CustomViews",
    "DINOConfig",
    "DiffSortNet",
    "FUNGIWrapper",
    "FeatureScores",
    "FungiExtractor",
    "ImageViews",
    "InContextSegmenter",
    "IndexMemory",
    "KLConfig",
    "KNNClassifier",
    "LinearSegmentationHead",
    "NeCoLoss",
    "Objective",
    "Overclustering",
    "PatchIndex",
    "PatchMemory",
    "ProjectionHead",
    "SegmentationResult",
    "SimCLR",
    "SimCLRConfig",
    "TextViews",
    "UnknownAdapterError",
    "VeraConfig",
    "VeraModel",
    "accelerate_peft",
    "concatenate",
    "evaluate_features",
    "few_shot",
    "get_vera_model",
    "intersection_boxes",
    "open_bank",
    "patch_label_counts",
    "rank_database",
    "retrieval_map",
    "retrieval_scores",
    "sharded_search",
]
