"""Approximate search by faiss, for :class:`fmkernels.api.PatchIndex`."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fmkernels.ops.knn.reference import unit

from .arrays import optional, progress_bar

STEP = 2**16
"""Rows that are converted and added at a time."""
PER_CENTROID = 256
"""Rows that faiss's k-means takes for each centroid at most."""


class FaissEngine:
    """One faiss index of the rows of a bank; ids are positions.

    Cosine similarity is the inner product of rows and queries of norm 1.
    """

    def __init__(self, dim: int, metric: str, factory: str) -> None:
        self.metric, self.factory = metric, factory
        self._faiss = optional("faiss", 'PatchIndex(engine="faiss")', "faiss-cpu")
        l2, product = self._faiss.METRIC_L2, self._faiss.METRIC_INNER_PRODUCT
        try:
            self.index = self._faiss.index_factory(dim, factory, l2 if metric == "l2" else product)
        except RuntimeError as error:
            raise ValueError(
                f"PatchIndex: factory: expected a string that faiss.index_factory takes for "
                f"{dim} numbers per row, got {factory!r}: {_reason(error)}"
            ) from error
        self._searched: Any = None  # a copy of the index on a GPU, or the index itself

    @property
    def filled(self) -> int:
        """How many rows faiss has."""
        return int(self.index.ntotal)

    def empty(self) -> None:
        """Forget the rows; what was trained stays."""
        self.index.reset()
        self._searched = None

    def fill(self, rows: Tensor, progress: bool) -> None:
        """Have rows (M, D), of which the first ``filled`` are there already; train if needed."""
        if self._searched is not None and self.filled == len(rows):
            return
        if len(rows) and not self.index.is_trained:
            self._train(rows)
        with progress_bar(progress, len(rows), "faiss: rows") as advance:
            advance(self.filled)
            for start in range(self.filled, len(rows), STEP):
                block = rows[start : start + STEP]
                self._add(self._converted(block))
                advance(len(block))
        self._searched = self._on_device(rows.device)

    def _add(self, rows: Any) -> None:
        if isinstance(self.index, (self._faiss.IndexIDMap, self._faiss.IndexIDMap2)):
            self.index.add_with_ids(rows, np.arange(self.filled, self.filled + len(rows)))
        else:
            self.index.add(rows)

    def _train(self, rows: Tensor) -> None:
        inverted = self._faiss.try_extract_index_ivf(self.index)
        centroids = max(1024, 0 if inverted is None else inverted.nlist)
        sample = rows[:: max(1, len(rows) // (PER_CENTROID * centroids))]
        try:
            self.index.train(self._converted(sample))
        except RuntimeError as error:
            raise ValueError(
                f"PatchIndex: factory: expected enough rows to train {self.factory!r} before the "
                f"first search, got {len(rows)}: add more first, or choose fewer centroids: "
                f"{_reason(error)}"
            ) from error

    def _on_device(self, device: torch.device) -> Any:
        """The index on the GPU of the rows, where faiss can use it, or else as it is."""
        gpus = getattr(self._faiss, "get_num_gpus", lambda: 0)()
        if device.index is None or device.index >= gpus:
            return self.index
        resources = self._faiss.StandardGpuResources()
        return self._faiss.index_cpu_to_gpu(resources, device.index, self.index)

    def _converted(self, rows: Tensor) -> Any:
        """(n, D) as faiss takes them: contiguous float32 on the CPU."""
        if self.metric == "cosine":
            rows = torch.cat([unit(part.double()).float() for part in rows.split(STEP)])
        return rows.to("cpu", torch.float32).contiguous().numpy()

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """(Q, D) -> scores (Q, k) in float64, larger is nearer, and indices; −1 is none."""
        if not len(queries) or not self.filled:
            shape = (len(queries), k)
            indices = torch.full(shape, -1, device=queries.device)
            return torch.full(shape, -torch.inf, dtype=torch.float64).to(indices.device), indices
        found, indices = self._searched.search(self._converted(queries), k)
        scores = torch.from_numpy(found).double()
        scores = -scores if self.metric == "l2" else scores
        ids = torch.from_numpy(indices)
        scores = scores.masked_fill(ids < 0, -torch.inf)
        return scores.to(queries.device), ids.to(queries.device)

    def nbytes(self) -> int:
        """Of faiss's structures as they would be written, without writing them."""
        counted = 0

        def count(data: bytes) -> int:
            nonlocal counted
            counted += len(data)
            return len(data)

        self._faiss.write_index(self.index, self._faiss.PyCallbackIOWriter(count))
        return counted

    def to_bytes(self) -> Tensor:
        """All of it, (n,) of uint8."""
        return torch.from_numpy(self._faiss.serialize_index(self.index))

    def restore(self, data: Tensor, rows: int) -> None:
        """Take over what ``to_bytes`` gave for a bank of at least as many rows."""
        try:
            index = self._faiss.deserialize_index(np.asarray(data.cpu()))
        except RuntimeError as error:
            raise ValueError(f"faiss cannot read its part: {_reason(error)}") from error
        if index.d != self.index.d or index.ntotal > rows:
            raise ValueError(f"faiss has {index.ntotal} rows of {index.d} numbers")
        self.index, self._searched = index, None


def _reason(error: Exception) -> str:
    """faiss's own words, without where in its source they are."""
    return re.sub(r"^Error in .*? at \S+:\d+: (Error: )?", "", str(error), flags=re.DOTALL)
