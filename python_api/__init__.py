"""The papers' building blocks on top of the ops: modules, losses, extractors, evaluators."""

from .diffsort import DiffSortNet

__all__ = ["DiffSortNet"]
