"""Run as a program by every rank: steps of VeRA and DVoRA adapters, replicated or sharded."""

import dataclasses
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from fmkernels.api import VeraConfig, get_vera_model
from fmkernels.ops.dvora_linear import norms

WIDTH, ROWS, STEPS = 12, 8, 3


class Block(nn.Module):
    """Two layers that read the same input, and one that does not."""

    def __init__(self):
        super().__init__()
        self.query = nn.Linear(WIDTH, 10)
        self.key = nn.Linear(WIDTH, 10, bias=False)
        self.output = nn.Linear(10, WIDTH)

    def forward(self, x):
        h = torch.tanh(x)
        return x + self.output(torch.tanh(self.query(h) * self.key(h)))


def adapted(dora, dtype=torch.float64):
    """The same in every process; nothing of it starts at zero."""
    torch.manual_seed(0)
    base = nn.Sequential(Block(), Block(), nn.Linear(WIDTH, 3)).to(dtype)
    config = VeraConfig(
        r=4, target_modules=["query", "key", "output"], modules_to_save=["2"], use_dora=dora
    )
    model = get_vera_model(base, config)
    with torch.no_grad():
        for parameter in model.adapter_parameters("default"):
            parameter.add_(0.2 * torch.randn(parameter.shape, dtype=dtype))
    return model


def batch(dtype=torch.float64):
    """Of all ranks."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(STEPS, ROWS, WIDTH, dtype=torch.float64, generator=generator).to(dtype)


def optimizer_of(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)


def train(model, batches, names=None):
    """The gradients of the first step, and the weights after the last."""
    optimizer = optimizer_of(model)
    first = None
    for x in batches:
        optimizer.zero_grad()
        settings = {} if names is None else {"adapter_names": names}
        model(x, **settings).square().mean().backward()
        if first is None:
            first = gathered(model, gradients=True)
        optimizer.step()
    return first, gathered(model)


def gathered(model, gradients=False):
    """Of all that is trained, by its name, whole."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            value = parameter.grad if gradients else parameter.detach()
            value = value.full_tensor() if hasattr(value, "full_tensor") else value
            found[name.removeprefix("module.")] = value.clone()
    return found


def matrices(model):
    """A and B, and how often they were written to."""
    pair = next(iter(model.shared.values()))
    return {"A": pair.A, "B": pair.B, "versions": (pair.A._version, pair.B._version)}


def sharded(model, **settings):
    """By blocks, and the rest at the root, whose output is in float32 at least."""
    policy = MixedPrecisionPolicy(**settings)
    for block in model.model[:2]:
        fully_shard(block, mp_policy=policy)
    return fully_shard(
        model, mp_policy=dataclasses.replace(policy, output_dtype=settings.get("reduce_dtype"))
    )


def counted(function, calls):
    def count(*args):
        calls.append(1)
        return function(*args)

    return count


def main(rank, world, store, result):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    own = batch().chunk(world, dim=1)[rank]
    results, qr = {}, []
    norms.constants = counted(norms.constants, qr)
    for dora in (False, True):
        model = adapted(dora)
        before = matrices(model)["versions"]
        replicated = nn.parallel.DistributedDataParallel(model)
        results["ddp", dora] = train(replicated, own)
        results["ddp matrices", dora] = matrices(model) | {"before": before}
        model = adapted(dora)
        names = [["default", "__base__"] * (ROWS // 4), ["__base__", "default"] * (ROWS // 4)]
        replicated = nn.parallel.DistributedDataParallel(model)
        results["rows", dora] = train(replicated, own, names[rank])
        model = sharded(adapted(dora))
        qr.clear()
        results["fsdp", dora] = train(model, own)
        results["fsdp constants", dora] = len(qr)
        results["fsdp sharded", dora] = {
            name: type(parameter).__name__ for name, parameter in model.named_parameters()
        }
        results["fsdp matrices", dora] = matrices(model)
        model.save_pretrained(f"{store}.vera.{dora}")  # all ranks into one folder
        model.to_lora(f"{store}.lora.{dora}")
        try:
            model.merge()
        except ValueError as error:
            results["fsdp merge", dora] = str(error)
        half = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
        model = sharded(adapted(dora, torch.float32), **half)
        results["mixed", dora] = train(model, own.float())
    torch.save(results, result)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
