"""Run as a program by every rank: two steps of NeCo's loss inside DistributedDataParallel."""

import sys

import torch
import torch.distributed as dist
from crops import random_batch
from torch import nn

from fmkernels.api import NeCoLoss


class Training(nn.Module):
    """The queue is inside of what is wrapped, beside a buffer that is broadcast."""

    def __init__(self):
        super().__init__()
        self.head = nn.Conv2d(8, 8, 1)
        self.register_buffer("shared", torch.zeros(1))
        self.criterion = NeCoLoss(queue_size=128, dim=8)

    def forward(self, maps, teacher, boxes, references):
        student = [self.head(tokens) for tokens in maps]
        return self.criterion(student, teacher, boxes, references=references)


def step(model, rank):
    torch.manual_seed(100 + rank)
    maps, teacher, boxes = random_batch(dtype=torch.float32)
    references = torch.randn(6, 2, 49, 8)
    loss = model([tokens.detach() for tokens in maps], teacher, boxes, references)
    model.zero_grad()
    loss.backward()


def main(rank, world, store, result):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(Training())
    with torch.no_grad():
        model.module.shared.fill_(rank)
    for _ in range(2):
        step(model, rank)
    averaged = model.module.head.weight.grad.clone()
    alone = torch.zeros_like(averaged)
    for other in range(world):
        step(model.module, other)
        alone += model.module.head.weight.grad / world
    queue = model.module.criterion.queue
    torch.save(
        {
            "averaged": averaged,
            "alone": alone,
            "patches": queue.patches[:, :40],
            "shared": model.module.shared,
            "keys": [key for key in model.state_dict() if "queue" in key],
        },
        result,
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
