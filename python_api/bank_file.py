"""Banks larger than memory: rows in a file, searched while the next ones are read."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fmkernels import _checks
from fmkernels.ops.knn import search
from fmkernels.ops.knn.reference import METRICS, TILE, empty_result, merge

from .arrays import progress_bar
from .bank import Bank, Found
from .bank_head import Place, place_of
from .safe_file import path_of

TILE_BYTES = 64 * 2**20
"""Read at a time; a search holds two tiles."""


class BankFile(Bank):
    """Rows in a .npy or safetensors file, searched without ever being in memory as a whole.

    What :func:`open_bank` returns. ``search`` reads the file once from front to back, in tiles of
    64 MB: a thread reads the next one while this one is searched, and the k best so far are carried
    along. It returns what :meth:`fmkernels.api.PatchIndex.search` returns for the same rows. The
    memory that it takes beside the result does not depend on the number of rows: two tiles, and
    what :func:`fmkernels.knn` needs for one.

    The file is opened for each search, so that any number of threads and processes may search.
    Tiles go to the device of the queries.
    """

    def __init__(self, path: Path, place: Place, metric: str) -> None:
        self.path, self._place = path, place
        self.dim, self.dtype, self.metric = place.dim, place.dtype, metric

    def __len__(self) -> int:
        return self._place.rows

    def __repr__(self) -> str:
        return (
            f"BankFile('{self.path}', metric={self.metric!r}, dtype={self.dtype}), "
            f"{len(self)} rows of {self.dim}"
        )

    def _find(self, queries: Tensor, k: int, progress: bool = False) -> Found:
        scores, indices = empty_result(queries, k)
        candidates, paths = (torch.zeros_like(indices[:, 0]) for _ in range(2))
        tiles = self._tiles(queries.device)
        with contextlib.closing(tiles), progress_bar(progress, len(self), "rows") as advance:
            for start, tile in tiles:
                found = Found(*search(queries, tile, k, self.metric, "exact", scores[:, -1]))
                moved = torch.where(found.indices < 0, -1, found.indices + start)
                scores, indices = merge(
                    torch.cat([scores, found.scores], dim=1), torch.cat([indices, moved], dim=1), k
                )
                candidates += found.candidates
                paths = torch.maximum(paths, found.paths)
                advance(len(tile))
        return Found(scores, indices, candidates, paths)

    def _tiles(self, device: torch.device) -> Generator[tuple[int, Tensor], None, None]:
        """(first row, rows) of every tile; the rows are overwritten after the next one.

        They are read into memory that is used again, not mapped: mapped pages would add up.
        """
        place = self._place
        if not place.rows:
            return
        # whole tiles of the reference, which then multiplies the matrices of a search in memory
        step = min(place.rows, max(1, TILE_BYTES // (place.row_bytes * TILE)) * TILE)
        starts = range(0, place.rows, step)
        buffers = [torch.empty(step, place.dim, dtype=place.dtype) for _ in starts[:2]]
        # leaving the block, by an exception too, waits for the read that is under way
        with open(self.path, "rb", buffering=0) as file, ThreadPoolExecutor(1) as reader:
            ahead = reader.submit(self._read, file, 0, buffers[0])
            for following, start in enumerate(starts, start=1):
                tile = ahead.result()
                if following < len(starts):
                    buffer = buffers[following % 2]
                    ahead = reader.submit(self._read, file, starts[following], buffer)
                yield start, tile.to(device)

    def _read(self, file: io.FileIO, start: int, buffer: Tensor) -> Tensor:
        """The rows from ``start`` on, as many as there are and the buffer holds."""
        place = self._place
        rows = buffer[: place.rows - start]
        array: Any = rows.view(torch.uint8).numpy()
        data = memoryview(array).cast("B")
        file.seek(place.offset + start * place.row_bytes)
        done = 0
        while done < len(data):
            count = file.readinto(data[done:])
            if not count:
                break
            done += count
        size = os.fstat(file.fileno()).st_size
        if size != place.size or done < len(data):
            raise ValueError(
                f"BankFile.search: path: expected the {place.size} bytes that were there when it "
                f"was opened, got {size} in {self.path}; open it again when it is written"
            )
        return rows


def open_bank(
    path: str | os.PathLike[str], *, metric: str | None = None, tensor: str | None = None
) -> BankFile:
    """Open a bank of rows that may be larger than memory, to be searched from its file.

    Args:
        path: a .npy file of one array (M, D), as ``numpy.save`` writes it, or a safetensors file
            with a tensor (M, D), such as one of :meth:`fmkernels.api.PatchIndex.save`.
        metric: ``"cosine"``, ``"inner_product"`` or ``"l2"``; if None, that of a saved
            ``PatchIndex``, and cosine for any other file.
        tensor: which tensor of a safetensors file; not needed if only one has two dimensions.

    Returns:
        A :class:`BankFile`. Only the head of the file has been read.

    Raises:
        OSError: there is no such file, or it cannot be read.
        TypeError: the rows are not float32, float16, bfloat16 or float64, or the path is none.
        ValueError: the file is truncated, corrupt or something else, or an argument does not fit.
            The message names the file.

    Example:
        >>> import os, tempfile, numpy as np
        >>> from fmkernels.api import open_bank
        >>> path = os.path.join(tempfile.mkdtemp(), "bank.npy")
        >>> np.save(path, np.eye(3, dtype=np.float32))
        >>> bank = open_bank(path, metric="inner_product")
        >>> len(bank)
        3
        >>> scores, indices = bank.search(np.array([[0.0, 2.0, 1.0]], dtype=np.float32), k=2)
        >>> scores, indices
        (array([[2., 1.]], dtype=float32), array([[1, 2]]))
    """
    if metric is not None:
        _checks.choice("open_bank", "metric", metric, METRICS)
    path = path_of("open_bank", path).absolute()
    if not path.is_file():
        raise FileNotFoundError(f"open_bank: path: expected a file that exists, got {path}")
    place = place_of(path, tensor)
    return BankFile(path, place, metric or place.metric or "cosine")
