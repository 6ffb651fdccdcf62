"""Tensors in a safetensors file: written as a whole or not at all, checked in full when read."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from .arrays import checksum, optional

NUMPY_MAGIC = b"\x93NUMPY"
Built = TypeVar("Built")


def format_of(owner: str) -> str:
    """What the head of a file says that ``owner.save`` wrote."""
    return f"fmkernels.{owner} 1"


class SafeFile(NamedTuple):
    """The files of one class, which ``owner.save`` writes and ``owner.load`` reads.

    Example:
        >>> import tempfile, torch
        >>> path = os.path.join(tempfile.mkdtemp(), "rows.safetensors")
        >>> file = SafeFile("Rows", ("rows",))
        >>> file.write(path, {"rows": torch.arange(3)}, {"unit": "metre"})
        >>> file.read(path, lambda tensors, words: (tensors["rows"], words))
        (tensor([0, 1, 2]), {'unit': 'metre'})
    """

    owner: str
    """Names the operations in what is said."""
    tensors: tuple[str, ...]
    """Those that every file has."""
    others: tuple[str, ...] = ()
    """Those that a file may have."""
    hint: str = ""
    """What to do with a file of another format."""

    def write(
        self,
        path: str | PathLike[str],
        tensors: Mapping[str, Tensor],
        words: Mapping[str, str] | None = None,
    ) -> None:
        """Write to a file of another name in the same folder, then rename it, which is atomic.

        Raises:
            ImportError: safetensors is not installed.
            OSError: the file cannot be written.
            ValueError: the folder is not there.
        """
        op = f"{self.owner}.save"
        safetensors = optional("safetensors.torch", op, "safetensors")
        target = Path(os.path.realpath(path_of(op, path)))
        if not target.parent.is_dir():
            raise ValueError(f"{op}: path: expected a file in a folder that exists, got {target}")
        if target.is_dir():
            raise ValueError(f"{op}: path: expected a file, got a folder, {target}; add a name")
        tables = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        sums = {_sum_of(name): checksum(table) for name, table in tables.items()}
        head = {"format": format_of(self.owner), **(words or {}), **sums}
        with replacing(target) as (unfinished,):
            safetensors.save_file(tables, unfinished, metadata=head)

    def read(
        self,
        path: str | PathLike[str],
        build: Callable[[dict[str, Tensor], dict[str, str]], Built],
    ) -> Built:
        """``build(tensors, words)`` of what :meth:`write` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ImportError: safetensors is not installed.
            OSError: the file cannot be read.
            ValueError: it is damaged or another file, or ``build`` raised a TypeError or
                ValueError; the message names the file.
        """
        op = f"{self.owner}.load"
        safetensors = optional("safetensors", op)
        if not path_of(op, path).is_file():
            raise FileNotFoundError(
                f"{op}: path: expected a file that exists, got {os.fspath(path)}"
            )
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                words = dict(file.metadata() or {})
                names = list(file.keys())
                self._check_head(words.pop("format", None), names)
                tensors = {name: file.get_tensor(name) for name in names}
            for name, tensor in tensors.items():
                if words.pop(_sum_of(name), None) != checksum(tensor):
                    raise ValueError(f"it is damaged: {name} is not what was saved; make it again")
            return build(tensors, words)
        except safetensors.SafetensorError as error:
            reason = f"it is damaged, cut short or no safetensors file ({error}); make it again"
            with open(path, "rb") as other:
                if other.read(len(NUMPY_MAGIC)) == NUMPY_MAGIC:
                    reason = f"it is a .npy file{self.hint}"
            raise self._refusal(path, reason) from error
        except (ValueError, TypeError) as error:
            raise self._refusal(path, str(error)) from error

    def _check_head(self, found: str | None, names: list[str]) -> None:
        held = f"holds {', '.join(sorted(names)) or 'nothing'}"
        if found != format_of(self.owner):
            raise ValueError(
                f"its format is {found!r}, not {format_of(self.owner)!r}, and it {held}{self.hint}"
            )
        if not set(self.tensors) <= set(names) <= {*self.tensors, *self.others}:
            raise ValueError(f"it is damaged: it {held}, not {', '.join(self.tensors)}")

    def _refusal(self, path: str | PathLike[str], reason: str) -> ValueError:
        return ValueError(
            f"{self.owner}.load: path: expected a file that {self.owner}.save wrote, "
            f"got {os.fspath(path)}: {reason}"
        )


@contextlib.contextmanager
def replacing(*targets: Path) -> Iterator[list[Path]]:
    """Other names in the same folder to write to; renamed, which is atomic, if nothing was raised.

    So each target is what it was, or whole.
    """
    unfinished = [target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp") for target in targets]
    try:
        for path in unfinished:
            path.touch(exist_ok=False)
        modes = [path.stat().st_mode for path in unfinished]  # safetensors lets only the owner read
        yield unfinished
        for path, mode in zip(unfinished, modes, strict=True):
            path.chmod(mode)
            with open(path, "rb+") as file:
                os.fsync(file.fileno())  # or a crash could leave the new name on an empty file
        for path, target in zip(unfinished, targets, strict=True):
            os.replace(path, target)
    finally:
        for path in unfinished:
            path.unlink(missing_ok=True)


def path_of(op: str, path: Any) -> Path:
    """The path of a file; what else was given is named."""
    try:
        return Path(path)
    except TypeError as error:
        raise TypeError(
            f"{op}: path: expected the path of a file, got {type(path).__name__}"
        ) from error


def _sum_of(name: str) -> str:
    """Its key in the head: safetensors notices a missing byte, but none that has changed."""
    return f"crc32 of {name}"
