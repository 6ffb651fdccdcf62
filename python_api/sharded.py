"""A bank that is spread over the processes of torch.distributed, searched as one."""

from __future__ import annotations

import contextlib
import datetime
import json
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from fmkernels import _checks
from fmkernels.ops.knn import public_scores, search
from fmkernels.ops.knn.reference import METRICS, merge

from .arrays import Array, checksum, like, tensor_of
from .bank import Bank, Found

OP = "sharded_search"
NOTE_BYTES = 4096
"""Of what a rank tells the others; one size, so that nobody has to ask for it."""
ERROR_CHARACTERS = 300
GRACE = datetime.timedelta(seconds=10)
"""For Gloo's own timeout to take effect before ours."""
Done = TypeVar("Done")


def sharded_search(
    shard: Bank | Array,
    queries: Array,
    k: int,
    *,
    metric: str | None = None,
    group: dist.ProcessGroup | None = None,
    timeout: float = 1800.0,
) -> tuple[Any, Any]:
    """Find the k nearest rows of a bank of which every process holds a part.

    The bank is the shards one after the other, in the order of the ranks. Every process calls it
    with the same queries and gets what one process would with the whole bank, bit for bit: each
    searches its own shard, and (Q, k) scores and indices of every process are exchanged. Shards
    with ``engine="faiss"`` give what faiss finds in each.

    Args:
        shard: this process's rows: a :class:`fmkernels.api.PatchIndex`, a bank that
            :func:`fmkernels.api.open_bank` opened, or a tensor or array (M, D). Shards may differ
            in size, and be empty, and must have the same D.
        queries: (…, D), the same in every process.
        k: how many, at least 1, the same in every process. With fewer rows in all shards together,
            the index is −1 and the score the metric's worst.
        metric: of a tensor or array, cosine if None. An index and a bank have their own.
        group: the processes that take part; all if None. Any backend.
        timeout: seconds that one process waits for the others at most. They may be slower by
            what their shards are larger.

    Returns:
        Scores (…, k) and indices (…, k) into the whole bank, in every process, as
        :meth:`fmkernels.api.PatchIndex.search` returns them.

    Raises:
        TypeError: an argument of this process is not floating-point.
        ValueError: an argument of this process does not fit, or the processes disagree.
        RuntimeError: ``torch.distributed`` is not set up, the search of another process failed (it
            says which, and why), or a process has ended or does not answer in time. After the
            latter the group cannot be used any more.

    Numerics:
        The kernels score a row in the same way wherever it lies. The reference backend multiplies
        matrices, whose last bit in float64 may depend on their size; of that, float32 results
        show nothing but the order of equal rows.

    Source:
        Johnson et al., *Billion-scale similarity search with GPUs*, 2017, shard a bank in this way.

    Example:
        >>> import tempfile, torch, torch.distributed as dist
        >>> from fmkernels.api import sharded_search
        >>> store = dist.FileStore(tempfile.mkstemp()[1], 1)
        >>> dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> scores, indices = sharded_search(torch.eye(3), torch.tensor([[0.0, 2.0, 1.0]]), k=2)
        >>> indices
        tensor([[1, 2]])
        >>> dist.destroy_process_group()
    """
    processes = _Processes(group, timeout)
    asked, notes = processes.together(lambda: _Question.of(shard, metric, queries, k))
    _check_agreement(notes)
    flat, k = asked.queries, asked.k
    found, _ = processes.together(lambda: (asked.bank._find(flat, k), {}))
    scores, indices = _merged(processes.gather(_packed(found)), [note["rows"] for note in notes], k)
    wide = torch.float64 if any(note["wide"] for note in notes) else torch.float32
    scores = public_scores(scores, flat, flat.new_empty(0, dtype=wide), asked.bank.metric)
    return like(
        queries, *(part.to(flat.device).reshape(*asked.leading, k) for part in (scores, indices))
    )


class _Question(NamedTuple):
    """What this process is asked."""

    bank: Bank
    queries: Tensor
    k: int
    leading: torch.Size

    @classmethod
    def of(
        cls, shard: Any, metric: str | None, queries: Any, k: Any
    ) -> tuple[_Question, dict[str, Any]]:
        """Checked arguments, and what of them the others have to know."""
        bank = _bank_of(shard, metric)
        checked, k = bank._check_search(OP, queries, k)
        flat = checked.reshape(-1, bank.dim)
        note = {"metric": bank.metric, "queries": list(checked.shape), "k": k}
        note |= {"dtype of queries": str(checked.dtype), "numbers in queries": checksum(flat)}
        note |= {"rows": len(bank), "wide": bank.dtype == torch.float64}
        return cls(bank, flat, k, checked.shape[:-1]), note


class _Processes:
    """The processes of a group; what they exchange arrives in time or is an error in words."""

    def __init__(self, group: dist.ProcessGroup | None, timeout: float) -> None:
        _checks.non_negative(OP, "timeout", timeout)
        if timeout == 0:  # which is no limit to some backends
            raise ValueError(f"{OP}: timeout: expected seconds > 0, got {timeout}")
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                f"{OP}: group: expected torch.distributed to be set up; call "
                "torch.distributed.init_process_group first, or search the bank itself"
            )
        if dist.get_rank(group) < 0:
            raise ValueError(f"{OP}: group: expected one that this process is a member of")
        self.group: Any = group or dist.group.WORLD
        self.timeout = timeout
        # NCCL alone has no way between CPUs
        on_cpu = "cpu:" in dist.get_backend_config(group)
        accelerator = None if on_cpu else torch.accelerator.current_accelerator()
        self.device = accelerator or torch.device("cpu")
        self.options = distributed_c10d.AllgatherOptions()  # type: ignore[attr-defined]
        self.limit = datetime.timedelta(seconds=timeout)
        if on_cpu:  # Gloo gives up by itself; until then a thread of it keeps a process from ending
            self.options.timeout = self.limit
            self.limit += GRACE

    def together(
        self, work: Callable[[], tuple[Done, dict[str, Any]]]
    ) -> tuple[Done, list[dict[str, Any]]]:
        """Do this process's part, and learn what the others note of theirs, or that one failed."""
        try:
            done, note = work()
        except Exception as error:
            words = f"{type(error).__name__}: {error}"[:ERROR_CHARACTERS]
            with contextlib.suppress(RuntimeError):  # of the two errors this one is the cause
                self._notes({"error": words})
            raise
        notes = self._notes(note)
        failed = [
            f"rank {rank}: {note['error']}" for rank, note in enumerate(notes) if "error" in note
        ]
        if failed:
            raise RuntimeError(
                f"{OP}: shard: the search of another process failed; {'; '.join(failed)}"
            )
        return done, notes

    def _notes(self, note: dict[str, Any]) -> list[dict[str, Any]]:
        data = json.dumps(note).encode().ljust(NOTE_BYTES)
        gathered = self.gather(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        return [json.loads(bytes(other.tolist())) for other in gathered]

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all processes, of one shape, on the CPU."""
        tensor = tensor.to(self.device)
        size = dist.get_world_size(self.group)
        gathered = [torch.empty_like(tensor) for _ in range(size)]
        try:
            # not dist.all_gather, which has no timeout of its own but the group's, half an hour
            self.group.allgather([gathered], [tensor], self.options).wait(self.limit)
        except RuntimeError as error:
            raise RuntimeError(
                f"{OP}: group: rank {dist.get_rank(self.group)} of {size} expected an answer of "
                f"every process within {self.timeout:g} s, but one has ended or hangs; look for "
                f"its error and start all of them anew, or give a longer timeout ({error})"
            ) from error
        return [other.cpu() for other in gathered]


def _bank_of(shard: Any, metric: str | None) -> Bank:
    if metric is not None:
        _checks.choice(OP, "metric", metric, METRICS)
    if isinstance(shard, Bank):
        if metric not in (None, shard.metric):
            raise ValueError(
                f"{OP}: metric: expected None or the shard's own, {shard.metric!r}, got {metric!r}"
            )
        return shard
    return _Rows(tensor_of(OP, "shard", shard, "(M, D)"), metric or "cosine")


class _Rows(Bank):
    """A tensor that is searched once: nothing is prepared."""

    def __init__(self, rows: Tensor, metric: str) -> None:
        self.rows, self.dim, self.dtype, self.metric = rows, rows.shape[1], rows.dtype, metric

    def __len__(self) -> int:
        return len(self.rows)

    def _device(self) -> torch.device:
        return self.rows.device

    def _find(self, queries: Tensor, k: int, progress: bool = False) -> Found:
        return Found(*search(queries, self.rows, k, self.metric, "exact"))


def _check_agreement(notes: list[dict[str, Any]]) -> None:
    """All processes see the same notes, so all of them refuse."""
    for what in ("metric", "queries", "k", "dtype of queries", "numbers in queries"):
        for rank, note in enumerate(notes):
            if note[what] != notes[0][what]:
                raise ValueError(
                    f"{OP}: {what}: expected the same in every process, got {notes[0][what]} on "
                    f"rank 0 and {note[what]} on rank {rank}"
                )


def _packed(found: Found) -> Tensor:
    """(2, Q, k) of int64: the scores' bits and the indices, for one exchange."""
    return torch.stack([found.scores.contiguous().view(torch.int64), found.indices])


def _merged(parts: list[Tensor], sizes: list[int], k: int) -> tuple[Tensor, Tensor]:
    """What was found in shards of these sizes -> scores (Q, k) and indices in all of them."""
    scores, indices, start = [], [], 0
    for (bits, found), size in zip(parts, sizes, strict=True):
        scores.append(bits.contiguous().view(torch.float64))
        indices.append(torch.where(found < 0, -1, found + start))
        start += size
    return merge(torch.cat(scores, dim=1), torch.cat(indices, dim=1), k)
