"""Run as a program by every rank: searches of a bank in shards, one after the other."""

import sys
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from fmkernels.api import PatchIndex, open_bank, sharded_search

METRICS = ("cosine", "inner_product", "l2")
SIZES = {2: [(3, 7), (0, 40), (1300, 5)], 3: [(3, 0, 9), (0, 0, 6), (1, 1100, 2), (0, 0, 0)]}


def rows(kind, count, dim=16):
    """Numbers whose products are exact: repeated rows have equal scores in any backend."""
    generator = torch.Generator().manual_seed(count)
    if kind == "ties":  # signs only: 16 of them have norm 4; few different rows
        few = torch.randint(0, 2, (4, dim), generator=generator) * 2.0 - 1
        return few[torch.randint(0, 4, (count,), generator=generator)]
    return torch.randn(count, dim, generator=generator)


def cases(world):
    """(name, sizes of the shards, kind of rows, metric, k)."""
    for sizes in SIZES[world]:
        for metric in METRICS:
            for kind in ("ties", "random"):
                for k in (1, 5, 60):
                    yield f"{sizes} {metric} {kind} {k}", sizes, kind, metric, k


def queries(kind):
    return rows(kind, 6)


def searched(rank, world):
    results = {}
    for name, sizes, kind, metric, k in cases(world):
        shard = rows(kind, sum(sizes)).split(sizes)[rank]
        results[name] = sharded_search(shard, queries(kind), k, metric=metric, timeout=60)
    results["no queries"] = sharded_search(rows("random", 4), queries("random")[:0], 3, timeout=60)
    return results


def kinds_of_shard(rank, folder):
    """An index, a file and an array hold a third each; queries of any shape."""
    bank = rows("random", 90)
    shard = bank[30 * rank : 30 * (rank + 1)].clone()
    asked = bank[:6].view(2, 3, -1)
    if rank == 0:
        index = PatchIndex(16, metric="l2")
        index.add(shard)
        shard = index
    elif rank == 1:
        np.save(f"{folder}/shard.npy", shard.numpy())
        shard = open_bank(f"{folder}/shard.npy", metric="l2")
    else:
        shard = shard.numpy()
    metric = "l2" if rank == 2 else None
    scores, indices = sharded_search(shard, asked.numpy(), 7, metric=metric, timeout=60)
    return torch.from_numpy(scores), torch.from_numpy(indices)


def what_is_said(shard, asked, k, metric):
    try:
        sharded_search(shard, asked, k, metric=metric, timeout=60)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def refusals(rank):
    """What every rank says to questions that do not fit together, with rank 1 the odd one."""
    bank, odd = rows("random", 10), rank == 1
    double = PatchIndex(16, dtype=torch.float64)
    double.add(bank)

    class Broken(PatchIndex):
        def _find(self, queries, k, progress=False):
            raise OSError("no disk …" + 1000 * "…")

    broken = Broken(16)
    said = {}
    for name, shard, asked, k, metric in (
        ("k", bank, bank, 3 + odd, None),
        ("metric", bank, bank, 3, "l2" if odd else "cosine"),
        ("shape", bank, bank[: 9 if odd else 10], 3, None),
        ("dim", bank[:, : 8 if odd else 16], bank[:, : 8 if odd else 16], 3, None),
        ("own dim", bank[:, : 8 if odd else 16], bank, 3, None),
        ("numbers", bank, bank + odd, 3, None),
        ("dtype", bank, bank.double() if odd else bank, 3, None),
        ("broken", broken if odd else bank, bank, 3, None),
        ("none", bank, bank, 0, None),
        ("own metric", double if odd else bank, bank, 3, "l2"),
    ):
        said[name] = what_is_said(shard, asked, k, metric)
    said["dtypes"] = [
        str(sharded_search(double if rank == wide else bank, bank, 3, timeout=60)[0].dtype)
        for wide in (1, -1)
    ]
    return said


def part_of_the_processes(rank, world):
    """The last two ranks search without the first, which is told that it is none of them."""
    group = dist.new_group([world - 2, world - 1])
    try:
        return sharded_search(rows("random", 20)[rank::world], queries("random"), 4, group=group)
    except ValueError as error:
        return str(error)


def main(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=120),
    )
    results = {"searched": searched(rank, world)}
    if world == 3:
        results["kinds"] = kinds_of_shard(rank, folder)
        results["part"] = part_of_the_processes(rank, world)
    results["refusals"] = refusals(rank)
    torch.save(results, f"{folder}/result{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
