"""What all banks of rows have in common: a search whose arguments are checked once."""

from __future__ import annotations

import abc
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from fmkernels import KNNInfo, _checks
from fmkernels.ops.knn import public_scores

from .arrays import Array, like, tensor_of


class Found(NamedTuple):
    """What the op ``knn`` returns: of Q queries, larger scores are nearer."""

    scores: Tensor
    """(Q, k), float64"""
    indices: Tensor
    """(Q, k), int64; −1 is no row."""
    candidates: Tensor
    """(Q,)"""
    paths: Tensor
    """(Q,)"""


class Bank(abc.ABC):
    """M rows of D numbers that can be searched."""

    dim: int
    """D"""
    metric: str
    """``"cosine"``, ``"inner_product"`` or ``"l2"``."""
    dtype: torch.dtype
    """Of the rows."""
    engine: str = "exact"
    """What searches; only the exact one can say how."""

    @abc.abstractmethod
    def __len__(self) -> int:
        """M, the number of rows."""

    @abc.abstractmethod
    def _find(self, queries: Tensor, k: int, progress: bool = False) -> Found:
        """(Q, D), checked -> the k nearest."""

    def _device(self) -> torch.device | None:
        """Where queries have to be; anywhere if None."""
        return None

    @overload
    def search(
        self,
        queries: Array,
        k: int,
        *,
        return_info: Literal[False] = False,
        progress: bool = False,
    ) -> tuple[Any, Any]: ...

    @overload
    def search(
        self, queries: Array, k: int, *, return_info: Literal[True], progress: bool = False
    ) -> tuple[Any, Any, KNNInfo]: ...

    def search(
        self, queries: Array, k: int, *, return_info: bool = False, progress: bool = False
    ) -> tuple[Any, Any] | tuple[Any, Any, KNNInfo]:
        """Find the k rows that are nearest to every query; see :func:`fmkernels.knn`.

        Args:
            queries: (…, D), a floating tensor or NumPy array.
            k: how many, at least 1; where there are fewer rows, the index is −1 and the score the
                metric's worst.
            return_info: also return a :class:`fmkernels.KNNInfo`.
            progress: show a bar (needs tqdm).

        Returns:
            Scores (…, k), best first (squared distances for ``"l2"``), in float32, or float64 if
            queries or rows are, and indices (…, k) in int64: NumPy arrays if the queries are one,
            else tensors on their device. Neither has a gradient; :func:`fmkernels.knn` gives one.

        Raises:
            TypeError: the queries are not floating-point.
            ValueError: queries or k do not fit, or faiss is asked for information; the message
                names the argument.

        Example:
            >>> import numpy as np
            >>> from fmkernels.api import PatchIndex
            >>> index = PatchIndex(2)
            >>> index.add(np.eye(2, dtype=np.float32))
            >>> scores, indices = index.search(np.array([[0.0, 2.0]], dtype=np.float32), k=1)
            >>> indices
            array([[1]])
        """
        op = f"{type(self).__name__}.search"
        checked, k = self._check_search(op, queries, k)
        if return_info and self.engine != "exact":
            raise ValueError(
                f"{op}: return_info: expected False with engine={self.engine!r}, got True; "
                "recall() says how good its answers are"
            )
        flat = checked.reshape(-1, self.dim)
        found = self._find(flat, k, progress)
        scores = public_scores(found.scores, flat, flat.new_empty(0, dtype=self.dtype), self.metric)
        leading = checked.shape[:-1]
        scores, indices = (x.reshape(*leading, k) for x in (scores, found.indices))
        scores, indices = like(queries, scores, indices)
        if not return_info:
            return scores, indices
        info = KNNInfo(found.candidates.reshape(leading), found.paths.reshape(leading))
        return scores, indices, info

    def _check_search(self, op: str, queries: Any, k: Any) -> tuple[Tensor, int]:
        """Refuse in words what does not fit; the queries as a tensor, and k as Python's integer."""
        device = self._device()
        tensor = tensor_of(op, "queries", queries)
        if not isinstance(queries, Tensor) and device is not None:
            tensor = tensor.to(device)
        if tensor.shape[-1] != self.dim:
            raise ValueError(
                f"{op}: queries: expected {self.dim} numbers per query, as the rows have, "
                f"got shape {_checks.shape(tensor)}"
            )
        if device is not None and tensor.device != device:
            raise ValueError(
                f"{op}: queries: expected the device of the rows, {device}, got {tensor.device}"
            )
        return tensor, _checks.positive_integer(op, "k", k)
