"""Features in a .npy file that grows batch by batch, and goes on where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .fungi_state import differences
from .safe_file import path_of

FORMAT = "fmkernels.FungiExtractor 1"


class FeatureRows:
    """Rows in memory, with the methods of a :class:`FeatureFile`."""

    def __init__(self) -> None:
        self.done = 0
        self._parts: list[Tensor] = []

    def append(self, rows: Tensor) -> None:
        """Keep the next rows."""
        self._parts.append(rows)
        self.done += len(rows)

    def result(self) -> Tensor:
        """All rows."""
        return torch.cat(self._parts)


class FeatureFile:
    """Rows of a .npy file, with a small file beside it that says how many are done, and by what.

    Opening it again with the same fingerprint and number of rows goes on after the last row that
    was written. What it says of rows is on disk only after they are.

    Args:
        op: names the operation in what is said.
        path: of the .npy file; ``path`` + ``.json`` is the file beside it.
        rows: N, of all.
        source: what the rows depend on, name by name; only the same goes on.

    Example:
        >>> import os, tempfile, torch
        >>> path = os.path.join(tempfile.mkdtemp(), "features.npy")
        >>> file = FeatureFile("example", path, 3, {"model": "1f"})
        >>> file.append(torch.zeros(2, 4))
        >>> again = FeatureFile("example", path, 3, {"model": "1f"})
        >>> again.done
        2
        >>> again.append(torch.ones(1, 4))
        >>> again.result().shape
        (3, 4)
    """

    def __init__(
        self, op: str, path: str | os.PathLike[str], rows: int, source: Mapping[str, str]
    ) -> None:
        self._op, self._rows, self._source = op, rows, dict(source)
        self.path = path_of(op, path)
        self._beside = Path(f"{self.path}.json")
        if self.path.suffix != ".npy":
            raise ValueError(f"{op}: path: expected a name that ends in .npy, got {self.path}")
        if not self.path.parent.is_dir():
            raise ValueError(
                f"{op}: path: expected a file in a folder that exists, got {self.path}"
            )
        self.done, self._map = self._found()

    def _found(self) -> tuple[int, Any]:
        """Rows that are already there, and the file mapped."""
        if not self.path.exists():
            return 0, None
        hint = "; give another path, or delete the file"
        try:
            state = json.loads(self._beside.read_text())
            done, source = int(state["rows"]), state["source"]
            mapped = np.load(self.path, mmap_mode="r+") if done else None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self._op}: path: expected a new file or one that it began, got {self.path}, "
                f"which cannot be read, or has no {self._beside.name} beside it{hint}"
            ) from error
        differing = differences(source, self._source)
        if differing or state.get("format") != FORMAT:
            raise ValueError(
                f"{self._op}: path: expected features of the same extractor, model and dataset, "
                f"got {self.path}, which was begun with {differing or 'another format'}{hint}"
            )
        return done, mapped

    def append(self, rows: Tensor) -> None:
        """Write the next rows, (n, …), float32, and then that they are done."""
        if self._map is None:
            shape: Sequence[int] = (self._rows, *rows.shape[1:])
            self._note()  # first, so that a file that was only begun is known as its own
            self._map = np.lib.format.open_memmap(
                self.path, mode="w+", dtype=np.float32, shape=tuple(shape)
            )
        stop = self.done + len(rows)
        self._map[self.done : stop] = rows.detach().cpu().numpy()
        self._map.flush()
        self.done = stop
        self._note()

    def _note(self) -> None:
        state = {"format": FORMAT, "rows": self.done, "source": self._source}
        unfinished = Path(f"{self._beside}.tmp")
        unfinished.write_text(json.dumps(state, indent=1))
        os.replace(unfinished, self._beside)

    def result(self) -> Any:
        """All rows, mapped into memory read-only."""
        self._map = None
        return np.load(self.path, mmap_mode="r")
