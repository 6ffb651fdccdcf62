"""Thousands of VeRA adapters for one model, in memory that does not grow."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fmkernels import DvoraNorms, _checks

from .vera_base import base_device, dense_weight
from .vera_config import VeraConfig
from .vera_file import read_adapter
from .vera_keys import sorted_tensors, vector_sizes
from .vera_layer import VeraLayer
from .vera_model import VeraModel
from .vera_start import narrowed, own_config
from .vera_state import BASE, Group, check_names
from .vera_targets import find_targets, largest_sizes, with_present_names

OP = "AdapterPool"
LISTED = 8
"""Names that an error lists."""


class UnknownAdapterError(ValueError):
    """Some rows of a batch name adapters that the pool does not hold.

    Args:
        rows: which, so that they can be refused and the others served.
        names: what these name.
    """

    def __init__(self, rows: list[int], names: list[str]) -> None:
        listed = ", ".join(map(repr, names[:LISTED])) + (", …" if len(names) > LISTED else "")
        super().__init__(
            f"{OP}: adapter_names: expected names in the pool, got {listed} in rows {rows[:LISTED]}"
            f"{' …' if len(rows) > LISTED else ''}; no row was computed"
        )
        self.rows = rows
        self.names = names

    def __reduce__(self) -> Any:
        return UnknownAdapterError, (self.rows, self.names)


class AdapterPool:
    """Adapters of one model in tables of a fixed size; every row of a batch names one.

    All of them share A and B, so a batch with an adapter for every row is the two products of one
    adapter, with rows that are looked up. An adapter that is loaded when the pool is full takes the
    place of the one that was asked for the longest ago.

    It may be used from several threads: batches take turns, and adapters are loaded, replaced and
    evicted while one is computed, which keeps those that it began with.

    Args:
        model: the base model, or a :class:`VeraModel`. Its layers get places for adapters; without
            names they give what they did.
        config: rank, target modules, seed and ``init`` of all adapters. With ``use_dora`` the pool
            takes VeRA and DVoRA adapters, otherwise VeRA.
        capacity: how many adapters it holds.
        dtype: that of the vectors. bfloat16 halves the memory and rounds them to 8 bits.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument does not fit; the model is then as it was.

    Numerics:
        As :func:`fmkernels.vera_expand`'s: vectors multiply in float32. The norms of DVoRA are
        computed once, when an adapter is loaded, so base weights must not change after that.

    Source:
        Kopiczko, Blankevoort, Asano, *VeRA: Vector-based Random Matrix Adaptation*, ICLR 2024.

    Example:
        >>> import torch
        >>> from fmkernels.api import AdapterPool, VeraConfig
        >>> mlp = torch.nn.Sequential(torch.nn.Linear(12, 32), torch.nn.Linear(32, 4))
        >>> pool = AdapterPool(mlp, VeraConfig(r=8, target_modules=["0", "1"]), capacity=1000)
        >>> for user in range(1200):
        ...     vectors = {"lambda_d": torch.rand(8), "lambda_b": torch.rand(32)}
        ...     pool.put(f"user{user}", {"0": vectors})
        >>> len(pool), "user0" in pool, "user1199" in pool
        (1000, False, True)
        >>> pool(torch.randn(3, 12), adapter_names=["user300", "__base__", "user1100"]).shape
        torch.Size([3, 4])
    """

    def __init__(
        self,
        model: nn.Module,
        config: VeraConfig,
        *,
        capacity: int = 1024,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        config = own_config(OP, config)
        self.capacity = _checks.positive_integer(OP, "capacity", capacity)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise TypeError(f"{OP}: dtype: expected a floating-point dtype, got {dtype!r}")
        if config.modules_to_save or config.bias != "none":
            raise ValueError(
                f"{OP}: config: expected adapters of vectors alone, got "
                f"modules_to_save={config.modules_to_save}, bias={config.bias!r}"
            )
        self.config = config
        self.model = model if isinstance(model, VeraModel) else VeraModel(model)
        adapters = self.model._adapters
        targets = find_targets(OP, self.model.model, config)
        self._matrices = adapters.matrices(config, targets)
        self._layers = adapters.adapt(targets)
        adapters.share(self._matrices)
        self._tables = {
            layer: _Tables.of(config, layer, self.capacity, dtype)
            for layer in self._layers.values()
        }
        self._norms: dict[str, DvoraNorms] = {}
        self._slots: OrderedDict[str, int] = OrderedDict()  # the one asked for last comes last
        self._free = list(range(self.capacity - 1, -1, -1))
        self._pins = [0] * self.capacity
        self._retired: set[int] = set()
        self._lock = threading.Lock()  # of the names and the slots
        self._turn = threading.RLock()  # of the model

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, name: object) -> bool:
        return name in self._slots

    @property
    def names(self) -> list[str]:
        """Those in the pool, the one that was asked for the longest ago first."""
        with self._lock:
            return list(self._slots)

    @property
    def bytes_per_adapter(self) -> int:
        """What one takes in the tables."""
        tables = (table for layer in self._tables.values() for table in layer if table is not None)
        return sum(table[0].nbytes for table in tables)

    # calling

    def __call__(self, *args: Any, adapter_names: Sequence[str], **kwargs: Any) -> Any:
        """What the model gives, with an adapter for every row; ``"__base__"`` is none.

        Raises:
            UnknownAdapterError: a row names an adapter that is not in the pool; nothing was
                computed, and nothing in the pool has changed.
            ValueError: there are more or fewer names than rows.
        """
        with self._batch(adapter_names, (args, kwargs)):
            return self.model.model(*args, **kwargs)

    def generate(self, *args: Any, adapter_names: Sequence[str], **kwargs: Any) -> Any:
        """The model's own ``generate``, with an adapter for every sequence.

        Raises:
            UnknownAdapterError: as in a call.
            ValueError: there are more or fewer names than sequences.
        """
        with self._batch(adapter_names, (args, kwargs)):
            return self.model.model.generate(*args, **kwargs)  # type: ignore[operator]

    @contextlib.contextmanager
    def _batch(self, names: Sequence[str], inputs: Any) -> Iterator[None]:
        check_names(OP, names, inputs)
        self.model._check_unmerged(OP)
        slots = self._pinned(names)
        try:
            device = self._matrices.A.device
            rows = _PoolRows(self, torch.tensor(slots, device=device))
            with self._turn, self.model._adapters.state.using(None, rows):
                yield
        finally:
            self._unpin(slots)

    def _pinned(self, names: Sequence[str]) -> list[int]:
        """The slots of the names, −1 for none, which nobody writes to until they are unpinned."""
        with self._lock:
            unknown = [i for i, n in enumerate(names) if n != BASE and n not in self._slots]
            if unknown:
                raise UnknownAdapterError(unknown, list(dict.fromkeys(names[i] for i in unknown)))
            slots = [self._slots[name] if name != BASE else -1 for name in names]
            for name in dict.fromkeys(names):
                if name != BASE:
                    self._slots.move_to_end(name)
            for slot in set(slots) - {-1}:
                self._pins[slot] += 1
            return slots

    def _unpin(self, slots: list[int]) -> None:
        with self._lock:
            for slot in set(slots) - {-1}:
                self._pins[slot] -= 1
                if slot in self._retired and not self._pins[slot]:
                    self._retired.remove(slot)
                    self._free.append(slot)

    # loading

    def load(self, name: str, path: str | PathLike[str]) -> None:
        """Read an adapter from a folder that ours or PEFT's ``save_pretrained`` wrote.

        Of the name of one that is in the pool, it takes its place; batches that are being computed
        keep the old one.

        Raises:
            FileNotFoundError: a file is missing.
            ImportError: safetensors is not installed.
            RuntimeError: every adapter of the pool is in a batch that is being computed.
            ValueError: a file is damaged, or is not that of an adapter of this pool.
        """
        op = f"{OP}.load"
        self._check_name(op, name)
        config, tensors = read_adapter(op, path)
        config = with_present_names(self.model.model, config)
        if config.modules_to_save or config.bias != "none":
            raise ValueError(
                f"{op}: path: expected an adapter of vectors alone in {path}, got one with "
                f"modules_to_save={config.modules_to_save}, bias={config.bias!r}"
            )
        model = self.model.model
        targets = find_targets(op, model, config)
        largest = largest_sizes(targets)
        held = sorted_tensors(op, str(path), model, config, targets, {}, largest, tensors)
        self._check_matrices(op, path, config, largest, held.matrices)
        self.put(name, held.vectors)

    def put(self, name: str, vectors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Add an adapter, or replace the one of this name.

        Args:
            name: any but ``"__base__"``.
            vectors: path of a layer -> ``lambda_d`` (r), ``lambda_b`` (n), and of DVoRA
                ``magnitude`` (n). Layers of the pool that are not there get no update.

        Raises:
            RuntimeError: every adapter of the pool is in a batch that is being computed.
            TypeError: a vector has the wrong type.
            ValueError: a path or a vector does not fit; the pool is then as it was.
        """
        op = f"{OP}.put"
        self._check_name(op, name)
        rows = self._rows_of(op, vectors)
        with self._lock, torch.no_grad():
            slot = self._slot_for(name)
            for layer, row in rows.items():
                self._tables[layer].write(slot, row)
            old = self._slots.pop(name, None)
            self._slots[name] = slot
            if old is not None and old != slot:
                self._release(old)

    def evict(self, name: str) -> None:
        """Take an adapter out of the pool; batches that are being computed keep it.

        Raises:
            ValueError: there is none of this name.
        """
        with self._lock:
            if name not in self._slots:
                raise ValueError(
                    f"{OP}.evict: name: expected the name of one of {len(self)} adapters, "
                    f"got {name!r}"
                )
            self._release(self._slots.pop(name))

    def _slot_for(self, name: str) -> int:
        """A slot that no batch reads: a free one, or that of the adapter asked for longest ago."""
        if self._free:
            return self._free.pop()
        own = self._slots.get(name)
        if own is not None and not self._pins[own]:
            return own
        for other, slot in self._slots.items():
            if not self._pins[slot]:
                del self._slots[other]
                return slot
        raise RuntimeError(
            f"{OP}.put: expected a place that no batch is using, got {self.capacity} adapters, all "
            "of them in batches that are being computed; make capacity larger"
        )

    def _release(self, slot: int) -> None:
        if self._pins[slot]:
            self._retired.add(slot)
        else:
            self._free.append(slot)

    def _rows_of(
        self, op: str, vectors: Mapping[str, Mapping[str, Tensor]]
    ) -> dict[VeraLayer, dict[str, Tensor]]:
        """The rows of all tables: zeros, and scales of 1, where an adapter has no vectors."""
        unknown = [path for path in vectors if path not in self._layers]
        if unknown:
            raise ValueError(
                f"{op}: vectors: expected layers of the pool, got {', '.join(unknown[:LISTED])}"
            )
        rows: dict[VeraLayer, dict[str, Tensor]] = {}
        for path, layer in self._layers.items():
            given = vectors.get(path)
            rows[layer] = {} if given is None else self._row_of(op, path, layer, given)
        return rows

    def _row_of(
        self, op: str, path: str, layer: VeraLayer, given: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        sizes = vector_sizes(self.config, layer)
        if "magnitude" not in given:
            sizes.pop("magnitude", None)
        if given.keys() != sizes.keys():
            raise ValueError(
                f"{op}: vectors: expected {', '.join(sizes)} for {path}, got {', '.join(given)}"
            )
        for key, size in sizes.items():
            argument = f"vectors[{path!r}][{key!r}]"
            _checks.floating_tensor(op, argument, given[key])
            if tuple(given[key].shape) != (size,):
                raise ValueError(
                    f"{op}: {argument}: expected shape ({size},), got {tuple(given[key].shape)}"
                )
        device = base_device(layer.base_layer)
        row = {key: value.detach().to(device) for key, value in given.items()}
        if "magnitude" in row:
            if path not in self._norms:
                weight = dense_weight(layer.base_layer)
                self._norms[path] = DvoraNorms(weight, *self._matrices.on(device))
            norms = self._norms[path](row["lambda_d"], row["lambda_b"])
            row["scale"] = row.pop("magnitude").to(norms.dtype) / norms
        return row

    def _check_name(self, op: str, name: Any) -> None:
        if not isinstance(name, str) or not name or name == BASE:
            raise ValueError(f"{op}: name: expected a name other than {BASE!r}, got {name!r}")

    def _check_matrices(
        self,
        op: str,
        path: Any,
        config: VeraConfig,
        largest: tuple[int, int],
        given: tuple[Tensor, Tensor] | None,
    ) -> None:
        """Refuse an adapter of other matrices, of which these vectors would make another one."""
        own = self.config
        if given is not None:
            A, B = (
                narrowed(matrix, self._matrices.A.dtype).to(self._matrices.A.device)
                for matrix in given
            )
            fits = self._matrices.is_equal(A, B)
        else:
            seeds = [(c.r, c.projection_prng_key, c.init) for c in (own, config)]
            fits = seeds[0] == seeds[1] and largest == largest_sizes(self._layers)
        if not fits:
            raise ValueError(
                f"{op}: path: expected the matrices of the pool (r={own.r}, "
                f"projection_prng_key={own.projection_prng_key}, init={own.init!r}, sizes "
                f"{largest_sizes(self._layers)}) in {path}, got others (r={config.r}, "
                f"projection_prng_key={config.projection_prng_key}, init={config.init!r}, sizes "
                f"{largest})"
            )


class _Tables(NamedTuple):
    """The vectors of all adapters for one layer."""

    lambda_d: Tensor
    """(capacity, r)"""
    lambda_b: Tensor
    """(capacity, n)"""
    scale: Tensor | None
    """Magnitudes over norms, (capacity, n)."""

    @classmethod
    def of(cls, config: VeraConfig, layer: VeraLayer, capacity: int, dtype: torch.dtype) -> _Tables:
        options: Any = {"dtype": dtype, "device": base_device(layer.base_layer)}
        return cls(
            torch.zeros(capacity, config.r, **options),
            torch.zeros(capacity, layer.out_features, **options),
            torch.ones(capacity, layer.out_features, **options) if config.use_dora else None,
        )

    def write(self, slot: int, row: Mapping[str, Tensor]) -> None:
        """A row of each; zeros for no update, and ones for no scale."""
        for key, table in self._asdict().items():
            if table is not None:
                plain = 1.0 if key == "scale" else 0.0
                table[slot] = row[key].to(table.dtype) if key in row else plain


class _PoolRows:
    """The slot of every row's adapter, (batch), −1 for none."""

    def __init__(self, pool: AdapterPool, slots: Tensor) -> None:
        self._pool = pool
        self._slots = slots

    @property
    def count(self) -> int:
        """The rows of the batch."""
        return len(self._slots)

    def groups(self, layer: VeraLayer) -> list[Group]:
        """All adapters at once: they share their matrices."""
        tables = self._pool._tables.get(layer)
        if tables is None:
            return []
        return [Group(self._pool._matrices, *tables, self._slots, 0.0)]

    def parts(self, names: Sequence[str]) -> Iterator[tuple[str | None, Tensor]]:
        """No module is trained whole by an adapter of a pool."""
        yield None, torch.arange(self.count, device=self._slots.device)
