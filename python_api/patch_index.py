"""A bank of patch features in memory: rows are added, searched, removed, saved."""

from __future__ import annotations

import os
import threading
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fmkernels import _checks
from fmkernels.ops.knn import bank, search
from fmkernels.ops.knn.reference import METRICS

from .arrays import Array, progress_bar, tensor_of
from .bank import Bank, Found
from .blocks import Blocks
from .faiss_engine import FaissEngine
from .safe_file import SafeFile

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
QUERIES = 1024
"""Searched between two updates of a progress bar."""
FILE = SafeFile(
    "PatchIndex",
    ("features",),
    ("faiss",),
    hint="; fmkernels.api.open_bank searches a .npy file, and any tensor (M, D) of another file",
)


class IndexMemory(NamedTuple):
    """Bytes that a :class:`PatchIndex` holds."""

    features: int
    """The rows; those that were added without a copy are the caller's too."""
    prepared: int
    """What was made of the rows for exact searches, none before the first."""
    faiss: int
    """faiss's own structures, with its copy of the rows."""


class PatchIndex(Bank):
    """A bank of rows, searched for the k nearest, exactly or by faiss.

    ``search`` finds what :func:`fmkernels.knn` finds for (queries, features), but the bank is made
    ready only once. The index of a row is its position in ``features``: the order of adding, in
    which rows move down when rows before them are removed.

    Args:
        dim: D, numbers per row.
        metric: ``"cosine"``, ``"inner_product"`` or ``"l2"``.
        engine: ``"exact"``, or ``"faiss"`` for approximate search (needs faiss).
        factory: faiss's description of an index, such as ``"IVF4096,Flat"``, ``"HNSW32"`` or
            ``"OPQ64,IVF4096,PQ64"``; only with ``engine="faiss"``, and needed there.
        dtype: that rows are kept in: float32, float16, bfloat16 or float64.
        device: where rows are kept and searched.

    Raises:
        TypeError: ``dtype`` is none of the four.
        ValueError: a setting does not fit; the message names it.
        ImportError: faiss is asked for and not installed.

    Numerics:
        Exact search orders rows by scores computed in float64 from the rows as they are kept.
        faiss computes in float32.

    Threads:
        Any number of threads may search at a time. What is added or removed meanwhile is seen by
        searches that start later.

    Source:
        Balažević et al., *Towards In-Context Scene Understanding*, NeurIPS 2023, search such banks;
        Douze et al., *The Faiss library*, 2024.

    Example:
        >>> import torch
        >>> from fmkernels.api import PatchIndex
        >>> index = PatchIndex(3, metric="l2")
        >>> for image in range(4):
        ...     index.add(torch.full((2, 3), float(image)))
        >>> len(index)
        8
        >>> scores, indices = index.search(torch.ones(1, 3), k=2)
        >>> scores, indices
        (tensor([[0., 0.]]), tensor([[2, 3]]))
    """

    def __init__(
        self,
        dim: int,
        *,
        metric: str = "cosine",
        engine: str = "exact",
        factory: str | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        op = "PatchIndex"
        self.dim = _checks.positive_integer(op, "dim", dim)
        _checks.choice(op, "metric", metric, METRICS)
        _checks.choice(op, "engine", engine, ("exact", "faiss"))
        if dtype not in DTYPES:
            names = ", ".join(map(str, DTYPES))
            raise TypeError(f"{op}: dtype: expected one of {names}, got {dtype!r}")
        if (engine == "faiss") != (factory is not None):
            needed = 'a factory string such as "IVF4096,Flat"' if factory is None else "None"
            raise ValueError(
                f"{op}: factory: expected {needed} with engine={engine!r}, got {factory!r}"
            )
        self.metric, self.dtype, self.engine, self.factory = metric, dtype, engine, factory
        place = _checks.device(op, "device", device)
        self._blocks = Blocks(torch.empty(0, self.dim, dtype=dtype, device=place))
        self._faiss = None if factory is None else FaissEngine(self.dim, metric, factory)
        self._ready: bank.PreparedRows | None = None
        self._lock = threading.Lock()

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self._blocks.empty.device

    def _device(self) -> torch.device:
        return self.device

    def __len__(self) -> int:
        return len(self._blocks)

    def __repr__(self) -> str:
        factory = "" if self.factory is None else f", factory={self.factory!r}"
        return (
            f"PatchIndex({self.dim}, metric={self.metric!r}, engine={self.engine!r}{factory}, "
            f"dtype={self.dtype}, device='{self.device}'), {len(self)} rows"
        )

    def add(self, features: Array) -> None:
        """Add rows after those that are there.

        Args:
            features: (M, D), a floating tensor or NumPy array. It is not copied if it is contiguous
                and of the index's dtype and device, so do not write to it afterwards: add a copy of
                a buffer that is used again. Each search looks at 8 of its rows, and refuses if they
                changed. Several arrays are copied into one at the next search, each set free as it
                is copied.

        Raises:
            TypeError: the features are not floating-point.
            ValueError: their shape does not fit, or the index's dtype has no such large numbers.
        """
        rows = tensor_of("PatchIndex.add", "features", features, "(M, D)")
        if rows.shape[1] != self.dim:
            raise ValueError(
                f"PatchIndex.add: features: expected rows of {self.dim} numbers, "
                f"got shape {_checks.shape(rows)}"
            )
        with self._lock:
            self._blocks.append(rows)
            self._ready = None

    def remove(self, indices: Any) -> int:
        """Remove rows; those after them move down, as in faiss's ``IndexFlat``.

        Labels that belong to the rows follow with ``labels = labels[kept]``, ``kept`` a mask of
        ``len(index)`` that is False at ``indices``.

        Args:
            indices: positions, a tensor, array or sequence of integers, repeated ones counted once;
                or a mask (M,) of bool that is True for what goes.

        Returns:
            How many were removed.

        Raises:
            TypeError: neither integers nor bool.
            ValueError: a position is out of range, or the mask has another length.
        """
        with self._lock:
            gone = _mask("PatchIndex.remove", indices, len(self)).to(self.device)
            number = int(gone.sum())
            if number:
                rows = self._blocks.whole()[~gone]
                self._blocks.replace(rows)
                self._ready = None
                if self._faiss is not None:
                    self._faiss.empty()
        return number

    @property
    def features(self) -> Tensor:
        """(M, D), all rows, not a copy: ``index.features[i]`` is row i.

        Do not write to it, but to ``index.features.clone()``. PyTorch has no read-only tensors:
        where the rows are an array that NumPy mapped from a file for reading only, a write ends the
        process (segmentation fault).
        """
        with self._lock:
            return self._blocks.whole()

    def build(self, progress: bool = False) -> None:
        """Do now what the first search would: gather and prepare rows, train and fill faiss.

        Args:
            progress: show a bar (needs tqdm).

        Raises:
            ValueError: an array was changed after it was added, or faiss needs more rows to train.
        """
        self._prepared(progress)

    def _prepared(self, progress: bool = False) -> bank.PreparedRows:
        with self._lock:
            if self._ready is None:
                # not incremental: it reads every row once, as the search that waits for it does
                rows = self._blocks.whole()
                if self._faiss is not None:
                    self._faiss.fill(rows, progress)
                    return bank.PreparedRows(rows)
                self._ready = bank.prepare(rows)
            else:  # 10 µs, against wrong answers from what was prepared
                self._blocks.check()
            return self._ready

    def _find(self, queries: Tensor, k: int, progress: bool = False) -> Found:
        prepared = self._prepared(progress)
        if self._faiss is None:
            return self._exact(prepared, queries, k, progress)
        scores, indices = self._faiss.search(queries, k)
        unknown = torch.zeros_like(indices[:, 0])
        return Found(scores, indices, unknown, unknown)

    def _exact(
        self, prepared: bank.PreparedRows, queries: Tensor, k: int, progress: bool = False
    ) -> Found:
        rows, *rest = prepared
        parts = []
        with progress_bar(progress, len(queries), "queries") as advance:
            # split only for the bar: each search reads all rows
            for part in queries.split(QUERIES if progress else max(1, len(queries))):
                parts.append(Found(*search(part, rows, k, self.metric, "exact", None, *rest)))
                advance(len(part))
        return parts[0] if len(parts) == 1 else Found(*map(torch.cat, zip(*parts, strict=True)))

    def recall(self, queries: Array, k: int) -> float:
        """The share of the k nearest rows that ``search`` finds, 1 for the exact engine.

        Args:
            queries: (…, D), as for ``search``.
            k: at least 1; with fewer rows, all of them are asked for.

        Returns:
            Between 0 and 1, the mean over the queries. Of equally near rows, only those that exact
            search prefers count.

        Raises:
            ValueError: there are no rows or no queries, or an argument does not fit.
        """
        op = "PatchIndex.recall"
        checked, k = self._check_search(op, queries, k)
        flat = checked.reshape(-1, self.dim)
        if not len(self) or not len(flat):
            raise ValueError(
                f"{op}: expected at least one row and one query, "
                f"got {len(self)} rows and {len(flat)} queries"
            )
        k = min(k, len(self))
        exact = self._exact(bank.PreparedRows(self.features), flat, k).indices
        found = self._find(flat, k).indices
        first = len(self) * torch.arange(len(flat), device=flat.device).unsqueeze(1)
        there = exact >= 0
        hits = torch.isin((exact + first)[there], (found + first)[found >= 0])
        return hits.double().mean().item() if len(hits) else 1.0

    def memory(self) -> IndexMemory:
        """Bytes of the rows and of what was made of them; see :class:`IndexMemory`."""
        prepared = 0
        if self._ready is not None:
            rows, *rest = self._ready
            made = [t for t in rest if t is not None and t.data_ptr() != rows.data_ptr()]
            prepared = sum(t.nbytes for t in made)
        in_faiss = 0 if self._faiss is None else self._faiss.nbytes()
        return IndexMemory(self._blocks.nbytes, prepared, in_faiss)

    def to(self, device: torch.device | str) -> PatchIndex:
        """Move the rows to a device; returns the index itself."""
        place = _checks.device("PatchIndex.to", "device", device)
        with self._lock:
            self._blocks.to(place)
            self._ready = None
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the index to one safetensors file, or leave what was there.

        The rows are the tensor ``"features"``. faiss's structures are written if they are built;
        see :meth:`build`.

        Args:
            path: the file. It is replaced in one step, when all is written.

        Raises:
            ImportError: safetensors is not installed.
            OSError: the file cannot be written.
            ValueError: the folder is not there.
        """
        FILE.write(path, *self._state())

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> PatchIndex:
        """Read an index that ``save`` wrote.

        Args:
            path: the file.
            device: where the rows go.

        Raises:
            ImportError: safetensors, or faiss for an index that uses it, is not installed.
            OSError: there is no such file, or it cannot be read.
            ValueError: the file is truncated, corrupt or something else; the message names it.
        """
        place = _checks.device("PatchIndex.load", "device", device)
        return FILE.read(path, cls._of_state).to(place)

    def _state(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors and words that make this index again."""
        with self._lock:
            tensors = {"features": self._blocks.whole()}
            if self._faiss is not None and self._faiss.filled:
                tensors["faiss"] = self._faiss.to_bytes()
        words = {"metric": self.metric, "engine": self.engine}
        return tensors, words | ({} if self.factory is None else {"factory": self.factory})

    @classmethod
    def _of_state(cls, tensors: dict[str, Tensor], words: dict[str, str]) -> PatchIndex:
        rows = tensors["features"]
        _checks.floating_tensor("PatchIndex", "features", rows)
        _checks.dimensions("PatchIndex", "features", rows, "(M, D)")
        index = cls(rows.shape[1], dtype=rows.dtype, device=rows.device, **words)
        index._blocks.replace(rows)
        if index._faiss is not None and "faiss" in tensors:
            index._faiss.restore(tensors["faiss"], len(rows))
        return index

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self)._of_state, self._state()


def _mask(op: str, indices: Any, rows: int) -> Tensor:
    """(M,) of bool, True for the rows that ``indices`` means."""
    if not isinstance(indices, Tensor):
        indices = np.array(indices)
        if indices.size and indices.dtype.kind not in "iub":
            raise TypeError(f"{op}: indices: expected integers or bool, got {indices.dtype}")
        indices = torch.from_numpy(indices.astype(np.bool_ if indices.dtype == bool else np.int64))
    if indices.dtype.is_floating_point or indices.dtype.is_complex:
        raise TypeError(f"{op}: indices: expected integers or bool, got {indices.dtype}")
    if indices.dtype == torch.bool:
        if indices.shape != (rows,):
            raise ValueError(
                f"{op}: indices: expected a mask of shape ({rows},), "
                f"got shape {_checks.shape(indices)}"
            )
        mask: Tensor = indices
        return mask
    indices = indices.flatten().long()
    wrong = indices[(indices < 0) | (indices >= rows)]
    if len(wrong):
        raise ValueError(
            f"{op}: indices: expected positions from 0 to {rows - 1}, got {int(wrong[0])}"
        )
    return torch.zeros(rows, dtype=torch.bool, device=indices.device).index_fill_(0, indices, True)
