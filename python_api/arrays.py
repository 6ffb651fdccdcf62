"""Tensors and NumPy arrays alike, without a copy between them; optional libraries; progress."""

from __future__ import annotations

import contextlib
import importlib
import zlib
from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fmkernels import _checks

Array: TypeAlias = Tensor | NDArray[Any]


class _Writable:
    """A read-only array as NumPy would see it if it could be written to; nobody here does.

    PyTorch has no read-only tensors, and warns when it is handed a read-only array.
    """

    def __init__(self, array: NDArray[Any]) -> None:
        interface = dict(array.__array_interface__)
        interface["data"] = (interface["data"][0], False)
        self.__array_interface__ = interface
        self.owner = array


def tensor_of(op: str, argument: str, value: Any, layout: str | None = None) -> Tensor:
    """A tensor on the memory of a floating tensor or NumPy array, outside of any graph.

    ``layout`` names the dimensions, such as ``"(M, D)"``. An array whose strides PyTorch does not
    have (backwards, or between the numbers) is copied.
    """
    if isinstance(value, np.ndarray):
        value = _tensor_of_array(op, argument, value)
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{op}: {argument}: expected a torch.Tensor or NumPy array, got {type(value).__name__}"
        )
    _checks.floating_tensor(op, argument, value)
    if layout is not None:
        _checks.dimensions(op, argument, value, layout)
    tensor: Tensor = value.detach()
    return tensor


def _tensor_of_array(op: str, argument: str, array: NDArray[Any]) -> Tensor:
    if array.dtype not in (np.float16, np.float32, np.float64) or not array.dtype.isnative:
        raise TypeError(
            f"{op}: {argument}: expected float16, float32 or float64 in this machine's byte order, "
            f"got {array.dtype}; convert it with {argument}.astype(numpy.float32)"
        )
    if any(stride < 0 or stride % array.itemsize for stride in array.strides):
        array = np.ascontiguousarray(array)
    if not array.flags.writeable:
        array = np.asarray(_Writable(array))
    return torch.from_numpy(array)


def like(example: Any, *tensors: Tensor) -> tuple[Any, ...]:
    """The tensors, as NumPy arrays on the same memory if the example is one."""
    if isinstance(example, np.ndarray):
        return tuple(tensor.cpu().numpy() for tensor in tensors)
    return tensors


def checksum(tensor: Tensor) -> str:
    """CRC-32 of the bytes of a tensor in their order, as eight hexadecimal digits."""
    data: Any = tensor.detach().contiguous().view(torch.uint8).cpu().numpy()
    return f"{zlib.crc32(data):08x}"


def optional(module: str, what: str, package: str | None = None) -> Any:
    """Import a library that only some need; ``what`` needs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = package or module.partition(".")[0]
        raise ImportError(
            f"{what} needs {name}, which cannot be imported ({error}); pip install {name}"
        ) from error


@contextlib.contextmanager
def progress_bar(shown: bool, total: int, label: str) -> Iterator[Any]:
    """A function to be called with how many of ``total`` are done since; a bar on stderr if shown.

    Example:
        >>> with progress_bar(False, 3, "rows") as advance:
        ...     advance(3)
    """
    if not shown:
        yield lambda done: None
        return
    tqdm = optional("tqdm", "progress=True")
    with tqdm.tqdm(total=total, desc=label, unit_scale=True) as bar:
        yield bar.update
