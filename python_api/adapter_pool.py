"""Thousands of VeRA adapters for one model, in memory that does not grow."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fmkernels import DvoraNorms, _checks

from .adapter_tables import Row, Tables
from .vera_base import base_device, dense_weight
from .vera_config import VeraConfig
from .vera_file import read_adapter
from .vera_keys import sorted_tensors, vector_sizes
from .vera_layer import VeraLayer
from .vera_model import VeraModel
from .vera_shared import SharedMatrices
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

    It serves: the model is put into evaluation mode, and called without gradients.

    It may be used from several threads: batches take turns, and adapters are loaded, replaced and
    evicted while one is computed, which keeps those that it began with.

    Args:
        model: the base model, or a :class:`VeraModel`. Its layers get places for adapters; without
            names they give what they did. It stays on its devices: the tables do not follow it, and
            once it was moved a pool refuses to work.
        config: rank, target modules, seed and ``init`` of all adapters. With ``use_dora`` the pool
            takes VeRA and DVoRA adapters, otherwise VeRA.
        capacity: how many adapters it holds.
        dtype: that of the vectors. bfloat16 halves the memory and rounds them to 8 bits.

    Raises:
        RuntimeError: there is no memory for the tables; the model is then as it was.
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
        self.model._check_unmerged(OP)
        adapters = self.model._adapters
        targets = find_targets(OP, self.model.model, config)
        self._matrices = adapters.matrices(config, targets)
        tables = {
            path: Tables.of(config, target, self.capacity, dtype)
            for path, target in targets.items()
        }
        self._free = list(range(self.capacity - 1, -1, -1))
        self._pins = [0] * self.capacity
        self._layers = adapters.adapt(targets)  # from here on nothing fails
        self.model.eval()
        adapters.share(self._matrices, config)
        self._matrices.pools.add(self)
        self._tables = {layer: tables[path] for path, layer in self._layers.items()}
        self._places = {own.lambda_d.device: layer for layer, own in self._tables.items()}
        self._norms: dict[str, DvoraNorms] = {}
        self._slots: OrderedDict[str, int] = OrderedDict()  # the one asked for last comes last
        self._retired: set[int] = set()
        self._lock = threading.Lock()  # of the names and the slots

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
        self._check_model(OP)
        slots = self._pinned(names)
        try:
            device = self._matrices.A.device
            rows = _PoolRows(self, torch.tensor(slots, device=device))
            with self.model._adapters.state.using(rows), torch.no_grad():
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
            ValueError: a file is damaged, or is not that of an adapter of this pool, or as in
                :meth:`put`; the pool is then as it was.
        """
        op = f"{OP}.load"
        self._check_name(op, name)
        self._check_model(op)
        config, tensors = read_adapter(op, path)
        config = with_present_names(self.model.model, config)
        if config.modules_to_save or config.bias != "none":
            raise ValueError(
                f"{op}: path: expected an adapter of vectors alone in {path}, got one with "
                f"modules_to_save={config.modules_to_save}, bias={config.bias!r}"
            )
        if config.use_dora and not self.config.use_dora:
            raise ValueError(
                f"{op}: path: expected a VeRA adapter in {path}, got a DVoRA one; a pool whose "
                "configuration has use_dora=True takes it"
            )
        model = self.model.model
        targets = find_targets(op, model, config)
        largest = largest_sizes(targets)
        held = sorted_tensors(op, str(path), model, config, targets, {}, largest, tensors)
        self._check_matrices(op, path, config, largest, held.matrices)
        missing = self.config.r - config.r  # of matrices that are a corner of the pool's
        for vectors in held.vectors.values():
            vectors["lambda_d"] = F.pad(vectors["lambda_d"], (0, missing))
        self._put(op, "path", name, held.vectors)

    def put(self, name: str, vectors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Add an adapter, or replace the one of this name.

        Args:
            name: any but ``"__base__"``.
            vectors: path of a layer -> ``lambda_d`` (r), ``lambda_b`` (n), and of DVoRA
                ``magnitude`` (n). Layers of the pool that are not there get no update.

        Raises:
            RuntimeError: every adapter of the pool is in a batch that is being computed.
            TypeError: a vector has the wrong type.
            ValueError: a path or a vector does not fit, or is not finite in the pool's dtype, or an
                adapter is merged into the base weights; the pool is then as it was.
        """
        op = f"{OP}.put"
        self._check_name(op, name)
        self._check_model(op)
        self._put(op, "vectors", name, vectors)

    def _put(
        self, op: str, argument: str, name: str, vectors: Mapping[str, Mapping[str, Tensor]]
    ) -> None:
        """All of it, or nothing."""
        with torch.no_grad():
            rows = self._rows_of(op, argument, vectors)
            with self._lock:
                slot, owner = self._slot_for(op, name)
                self._write(slot, rows, is_owned=owner is not None)
                if owner is None:
                    self._free.pop()
                else:
                    del self._slots[owner]
                old = self._slots.pop(name, None)
                self._slots[name] = slot
                if old is not None:
                    self._release(old)

    def _write(self, slot: int, rows: Mapping[VeraLayer, Row], is_owned: bool) -> None:
        """If it fails, the adapter that has the slot is what it was."""
        before: dict[VeraLayer, Row] = {}
        if is_owned:
            before = {layer: tables.row(slot) for layer, tables in self._tables.items()}
        try:
            for layer, row in rows.items():
                self._tables[layer].write(slot, row)
        except BaseException:
            for layer, row in before.items():
                self._tables[layer].write(slot, row)
            raise

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

    def _slot_for(self, op: str, name: str) -> tuple[int, str | None]:
        """A slot that no batch reads, and whose it is.

        A free one, or that of the adapter of this name, or of the one asked for the longest ago.
        """
        if self._free:
            return self._free[-1], None
        for owner in (name, *self._slots):
            slot = self._slots.get(owner)
            if slot is not None and not self._pins[slot]:
                return slot, owner
        raise RuntimeError(
            f"{op}: expected a place that no batch is using, got {self.capacity} adapters, all "
            "of them in batches that are being computed; make capacity larger"
        )

    def _release(self, slot: int) -> None:
        if self._pins[slot]:
            self._retired.add(slot)
        else:
            self._free.append(slot)

    def _rows_of(
        self, op: str, argument: str, vectors: Mapping[str, Mapping[str, Tensor]]
    ) -> dict[VeraLayer, Row]:
        """The rows of all tables: zeros, and scales of 1, where an adapter has no vectors."""
        if not isinstance(vectors, Mapping):
            raise TypeError(
                f"{op}: {argument}: expected a mapping from paths of layers to their vectors, got "
                f"{type(vectors).__name__}"
            )
        unknown = [path for path in vectors if path not in self._layers]
        if unknown:
            raise ValueError(
                f"{op}: {argument}: expected layers of the pool, got "
                f"{', '.join(map(str, unknown[:LISTED]))}"
            )
        for path, given in vectors.items():
            self._check_vectors(op, argument, path, given)
        rows = {
            layer: self._row_of(path, layer, vectors.get(path, {}))
            for path, layer in self._layers.items()
        }
        self._check_finite(op, argument, rows)
        return rows

    def _check_vectors(self, op: str, argument: str, path: str, given: Any) -> None:
        if not isinstance(given, Mapping):
            raise TypeError(
                f"{op}: {argument}[{path!r}]: expected a mapping from names to vectors, got "
                f"{type(given).__name__}"
            )
        sizes = vector_sizes(self.config, self._layers[path])
        if "magnitude" not in given:
            sizes.pop("magnitude", None)
        if given.keys() != sizes.keys():
            is_dora = "magnitude" in given and "magnitude" not in sizes
            hint = "; a pool whose configuration has use_dora=True takes it" if is_dora else ""
            raise ValueError(
                f"{op}: {argument}: expected {', '.join(sizes)} for {path}, got "
                f"{', '.join(map(str, given))}{hint}"
            )
        for key, size in sizes.items():
            place = f"{argument}[{path!r}][{key!r}]"
            _checks.floating_tensor(op, place, given[key])
            if tuple(given[key].shape) != (size,):
                raise ValueError(
                    f"{op}: {place}: expected shape ({size},), got {tuple(given[key].shape)}"
                )

    def _row_of(self, path: str, layer: VeraLayer, given: Mapping[str, Tensor]) -> Row:
        """On the table's device and in its dtype, so that it need only be copied there."""
        tables = self._tables[layer]
        device = tables.lambda_d.device
        row = {key: value.detach().to(device) for key, value in given.items()}
        if "magnitude" in row:
            if path not in self._norms:
                weight = dense_weight(layer.base_layer)
                self._norms[path] = DvoraNorms(weight, *self._matrices.on(device))
            norms = self._norms[path](row["lambda_d"], row["lambda_b"])
            row["scale"] = row.pop("magnitude").to(norms.dtype) / norms
        return tables.padded(row)

    def _check_finite(self, op: str, argument: str, rows: Mapping[VeraLayer, Row]) -> None:
        """What is too large for the pool's dtype became infinite in it."""
        found: dict[torch.device, list[Tensor]] = {}  # one question to each device
        for layer, row in rows.items():
            device = self._tables[layer].lambda_d.device
            found.setdefault(device, []).extend(value for value in row if value is not None)
        if all(bool(torch.cat(values).isfinite().all()) for values in found.values()):
            return
        for path, layer in self._layers.items():
            for key, value in zip(Tables._fields, rows[layer], strict=True):
                if value is not None and not bool(value.isfinite().all()):
                    name = "magnitude (over the norms)" if key == "scale" else key
                    raise ValueError(
                        f"{op}: {argument}: expected vectors that are finite in the pool's "
                        f"{value.dtype}, got {name} of {path} with others"
                    )

    def _check_model(self, op: str) -> None:
        """Refuse base weights that are not those of the tables."""
        self.model._check_unmerged(op)
        for device, layer in self._places.items():
            now = torch.empty(0, device=base_device(layer.base_layer)).device  # cuda is cuda:0
            if now != device:
                raise ValueError(
                    f"{op}: expected the model on {device}, where the tables of the pool are, got "
                    f"one on {now}; move it back, or make a pool after it is moved"
                )

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
        """Refuse an adapter of other matrices, of which these vectors would make another one.

        Of layers that both have, and of the rank, a corner of the matrices is all that matters.
        """
        own, sizes = self.config, largest_sizes(self._layers)
        if given is not None:
            A, B = self._matrices.A, self._matrices.B
            rank = given[0].shape[0]
            inputs = min(A.shape[1], given[0].shape[1])
            outputs = min(B.shape[0], given[1].shape[0])
            corners = (
                narrowed(matrix, A.dtype).to(A.device)
                for matrix in (given[0][:, :inputs], given[1][:outputs])
            )
            shared = SharedMatrices(A[:rank, :inputs], B[:outputs, :rank], persistent=False)
            fits = shared.is_equal(*corners)
        elif own.init == "position":  # the same numbers in the same places, whatever the sizes
            is_corner = config.r <= own.r and all(
                size <= most for size, most in zip(largest, sizes, strict=True)
            )
            fits = is_corner and (config.init, config.projection_prng_key) == (
                own.init,
                own.projection_prng_key,
            )
        else:
            seeds = [(c.r, c.projection_prng_key, c.init) for c in (own, config)]
            fits = seeds[0] == seeds[1] and largest == sizes
        if not fits:
            raise ValueError(
                f"{op}: path: expected the matrices of the pool (r={own.r}, "
                f"projection_prng_key={own.projection_prng_key}, init={own.init!r}, sizes "
                f"{sizes}) in {path}, got others (r={config.r}, "
                f"projection_prng_key={config.projection_prng_key}, init={config.init!r}, sizes "
                f"{largest})"
            )


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
