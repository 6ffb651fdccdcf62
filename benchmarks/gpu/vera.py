"""python -m gpu.vera FOLDER: layers with a VeRA adapter at the canonical sizes, beside PEFT's.

What an adapter costs is the time of its layer less that of the base layer alone, forward and
backward; of decoding it is the whole time, forward. Results are compared with float64's before.
Beside them stand two floors of the whole layer: the bytes that must move over this device's copy
rate, and the operations of base layer and adapter over its bfloat16 rate.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import measure
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fmkernels
from gpu import clock, table
from gpu.record import Record
from gpu.sort import attempt
from gpu.target import DEVICE, DRY_RUN, prepare

ALLOWED = 2.0**-6
"""Of its size, by which a result in bfloat16 may err: of roundings of its factors."""


@dataclass(frozen=True)
class Problem:
    """A layer, T rows, and N adapters among which they are divided (0: one for all)."""

    tokens: int
    into: int
    out: int
    rank: int
    adapters: int = 0
    forward_only: bool = False
    target_us: float | None = None
    """For the adapter: an estimate from this device's rates."""

    @property
    def operations(self) -> int:
        base, adapter = self.into * self.out, self.rank * (2 * self.into + 3 * self.out)
        if self.forward_only:
            return 2 * self.tokens * (base + self.rank * (self.into + self.out))
        return 2 * self.tokens * (2 * base + adapter)

    @property
    def bytes(self) -> int:
        """Of a half type: x and y, and back their gradients; the matrices; the vectors."""
        rows = (1 if self.forward_only else 2) * self.tokens * (self.into + self.out)
        matrices = self.into * self.out + self.rank * (self.into + self.out)
        return 2 * (rows + matrices) + 4 * max(1, self.adapters) * (self.rank + self.out)

    def tiny(self) -> Problem:
        return replace(self, tokens=3, into=6, out=5, rank=4, adapters=min(2, self.adapters))


WORKLOADS = {
    "vera-roberta": Problem(8192, 768, 768, 1024, target_us=82),
    "vera-vit-l": Problem(8192, 1024, 1024, 256, target_us=34),
    "vera-llama-q": Problem(8192, 4096, 4096, 256, target_us=131),
    "vera-llama-q-1024": Problem(8192, 4096, 4096, 1024),
    "vera-llama-q-32k": Problem(32_768, 4096, 4096, 256),
    "vera-llama-up": Problem(8192, 4096, 11_008, 256, target_us=258),
    "vera-llama-q-mixed": Problem(8192, 4096, 4096, 256, adapters=64),
    **{
        f"vera-decode-{tokens}-{adapters}": Problem(tokens, 4096, 4096, 256, adapters, True)
        for tokens, adapters in ((1, 1), (16, 16), (64, 64), (64, 256))
    },
}


class Layer:
    """Base, matrices and vectors, and two sets of rows; PEFT's layer has the same sizes."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.dtype = torch.float16 if DRY_RUN else torch.bfloat16
        generator = torch.Generator(DEVICE).manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=DEVICE)

        count, into, out, rank = problem.adapters, problem.into, problem.out, problem.rank
        self.weight = (random(out, into) / into**0.5).to(self.dtype)
        self.bias = random(out).to(self.dtype)
        self.A = (random(rank, into) / into**0.5).to(self.dtype)
        self.B = (random(out, rank) / rank**0.5).to(self.dtype)
        several = (count,) if count else ()
        self.d = (0.1 * random(*several, rank)).requires_grad_()
        self.b = random(*several, out).requires_grad_()
        drawn = torch.rand(problem.tokens, generator=generator, device=DEVICE)
        self.ids = (drawn * count).long().clamp(max=count - 1) if count else None
        self.sets = [
            (
                random(problem.tokens, into).to(self.dtype).requires_grad_(),
                random(problem.tokens, out).to(self.dtype),
            )
            for _ in range(2)
        ]

    def step(self, forward: Callable[[Tensor], Tensor], *vectors: Tensor) -> Callable[..., Any]:
        """Forward, and backward where it is asked for, of the sets in turn."""
        turns = iter(range(10**9))

        def run() -> list[Tensor]:
            x, grad = self.sets[next(turns) % len(self.sets)]
            if self.problem.forward_only:
                with torch.no_grad():
                    return [forward(x)]
            y = forward(x)
            return [y.detach(), *torch.autograd.grad(y, [x, *vectors], grad.to(y.dtype))]

        return run


Step = Callable[[], list[Tensor]]


def base(layer: Layer) -> Step:
    return layer.step(lambda x: F.linear(x, layer.weight, layer.bias))


def ours(layer: Layer, **settings: Any) -> Step:
    def forward(x: Tensor) -> Tensor:
        rest = layer.A, layer.B, layer.d, layer.b
        ids = layer.ids
        return fmkernels.vera_linear(
            x, layer.weight, layer.bias, *rest, adapter_ids=ids, **settings
        )

    return layer.step(forward, layer.d, layer.b)


def products(layer: Layer) -> Step:
    """The fused form, whether or not another would be chosen."""

    def forward(x: Tensor) -> Tensor:
        y = F.linear(x, layer.weight, layer.bias)
        u = fmkernels.vera_shrink(x, layer.A)
        return fmkernels.vera_expand(y, u, layer.d, layer.b, layer.B, adapter_ids=layer.ids)

    return layer.step(forward, layer.d, layer.b)


def formula(layer: Layer) -> Callable[[Tensor], Tensor]:
    """VeRA with PyTorch's operators, in the base's dtype; rows of d and b gathered."""

    def forward(x: Tensor) -> Tensor:
        d, b = (v if layer.ids is None else v[layer.ids] for v in (layer.d, layer.b))
        z = F.linear(F.linear(x, layer.A) * d.to(x.dtype), layer.B)
        return F.linear(x, layer.weight, layer.bias) + b.to(x.dtype) * z

    return forward


def stock(layer: Layer) -> Step:
    return layer.step(formula(layer), layer.d, layer.b)


def compiled(layer: Layer) -> Step:
    function = formula(layer)
    return layer.step(function if DRY_RUN else torch.compile(function), layer.d, layer.b)


def peft(layer: Layer, autocast: bool) -> Step:
    """PEFT's layer with one adapter; for several, one after the other with the rows of each."""
    import peft

    linear = nn.Linear(layer.problem.into, layer.problem.out, dtype=layer.dtype, device=DEVICE)
    linear.weight.data, linear.bias.data = layer.weight, layer.bias
    config = peft.VeraConfig(r=layer.problem.rank, target_modules=["0"])
    found = peft.get_peft_model(nn.Sequential(linear), config).base_model.model[0].to(DEVICE)
    vectors = found.vera_lambda_d["default"], found.vera_lambda_b["default"]
    rows = [None]
    if layer.ids is not None:
        rows = [(layer.ids == a).nonzero().squeeze(1) for a in layer.ids.unique().tolist()]

    def forward(x: Tensor) -> Tensor:
        with torch.autocast(DEVICE.type, layer.dtype, enabled=autocast):
            return torch.cat([found(x if some is None else x[some]) for some in rows])

    return layer.step(forward, *vectors)


def lora(layer: Layer) -> Step:
    """Of rank 16, another method, for scale; rows of several adapters gathered."""
    count, into, out = max(1, layer.problem.adapters), layer.problem.into, layer.problem.out
    down = torch.randn(count, into, 16, device=DEVICE, dtype=layer.dtype).requires_grad_()
    up = torch.randn(count, 16, out, device=DEVICE, dtype=layer.dtype).requires_grad_()

    def forward(x: Tensor) -> Tensor:
        y = F.linear(x, layer.weight, layer.bias)
        if layer.ids is None:
            return y + x @ down[0] @ up[0]
        return y + (x.unsqueeze(1) @ down[layer.ids] @ up[layer.ids]).squeeze(1)

    return layer.step(forward, down, up)


PROVIDERS: dict[str, Callable[[Layer], Step]] = {
    "base": base,
    "fmkernels": ours,
    "fmkernels-products": products,
    "fmkernels-merged": functools.partial(ours, merge=True),
    "stock": stock,
    "stock-compiled": compiled,
    "peft": functools.partial(peft, autocast=False),
    "peft-autocast": functools.partial(peft, autocast=True),
    "lora": lora,
}
CHECKED = ("fmkernels", "fmkernels-products", "stock")


def skipped(problem: Problem, name: str) -> bool:
    """Rows that have adapters of their own are not merged, and LoRA's would be 32 GB of rows."""
    return bool(problem.adapters) and (
        name == "fmkernels-merged" or (name == "lora" and not problem.forward_only)
    )


def measured(problem: Problem, name: str) -> dict[str, Any]:
    layer = Layer(problem)
    step = PROVIDERS[name](layer)
    facts = {}
    if name in CHECKED:
        facts["error"] = measure.digits(error_of(layer, PROVIDERS[name](layer)()))
    return facts | {"ms": clock.milliseconds(step), "peak_bytes": clock.peak_bytes(step)}


def error_of(layer: Layer, found: list[Tensor]) -> float:
    """The largest of the results' errors beside float64, relative to their sizes.

    Raises:
        AssertionError: one is greater than ``ALLOWED``.
    """
    exact = Layer(layer.problem)
    for name in ("weight", "bias", "A", "B"):
        setattr(exact, name, getattr(exact, name).double())
    for name in ("d", "b"):
        setattr(exact, name, getattr(exact, name).detach().double().requires_grad_())
    exact.sets = [(x.detach().double().requires_grad_(), g.double()) for x, g in exact.sets]
    expected = PROVIDERS["stock"](exact)()
    pairs = zip(found, expected, strict=True)
    errors = [((a.double() - right).norm() / right.norm()).item() for a, right in pairs]
    if not max(errors) <= ALLOWED:
        raise AssertionError(f"results err by {errors} of their sizes")
    return max(errors)


def main(folder: str) -> None:
    prepare()
    record = Record(Path(folder), "vera")
    roof = record.content["roofline"] = clock.roofline()
    record.write()
    for name, full in WORKLOADS.items():
        problem = full.tiny() if DRY_RUN else full
        rates = (roof["bytes_per_s"], roof["bfloat16_operations_per_s"])
        work = zip(("bytes", "operations"), (problem.bytes, problem.operations), rates, strict=True)
        found = record.results[name] = {
            "tokens": problem.tokens,
            "floor_ms": {what: measure.digits(amount / rate * 1e3) for what, amount, rate in work},
        }
        if full.target_us is not None:
            found["target_us"] = full.target_us
        for who in PROVIDERS:
            if not skipped(problem, who):
                found[who] = attempt(measured, problem, who)
                record.write()
        print(*table.vera({name: found}), flush=True)
    record.finish()


if __name__ == "__main__":
    main(*sys.argv[1:])
