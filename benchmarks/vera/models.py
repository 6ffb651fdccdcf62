"""``vera-model``: a step of a fine-tune, with ours or PEFT's adapters in the same model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from workload import INPUT_SETS, Device, Workload, in_turn

from fmkernels.ops.knn.config import has_fast_bfloat16
from vera.floor import fewest

ERRORS = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""That gradients of the vectors may have, relative to their size, after all layers of a model."""


@dataclass(frozen=True)
class FineTuning(Workload):
    """Forward, backward, and AdamW on the vectors, of a model of transformers with random weights.

    Args:
        kind: ``"roberta"`` (a classifier; query and value are adapted) or ``"llama"`` (a language
            model; all linear layers are).
        depth: layers.
        width: of the residual stream.
        inner: of the MLP.
        heads: of the attention, 64 numbers each.
        rank: r.
        sequences: in a batch.
        tokens: in a sequence.
    """

    kind: str
    depth: int
    width: int
    inner: int
    heads: int
    rank: int
    sequences: int
    tokens: int
    dtype: torch.dtype = torch.bfloat16

    def model(self) -> nn.Module:
        """Without adapters; the same at every call."""
        import transformers

        torch.manual_seed(0)
        sizes: dict[str, Any] = {
            "hidden_size": self.width,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.depth,
            "num_attention_heads": self.heads,
            "vocab_size": 1000,
        }
        if self.kind == "roberta":
            still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
            config = transformers.RobertaConfig(**sizes, **still)
            model = transformers.RobertaForSequenceClassification(config)
        else:
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
        return model.to(self.dtype)

    @property
    def targets(self) -> str | list[str]:
        """The adapted modules."""
        return ["query", "value"] if self.kind == "roberta" else "all-linear"

    def inputs(self, seed: int) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(seed)
        ids = torch.randint(5, 1000, (self.sequences, self.tokens), generator=draw)
        is_label = self.kind == "roberta"
        labels = torch.randint(2, (self.sequences,), generator=draw) if is_label else ids
        return {"input_ids": ids, "labels": labels}

    def adapted(self, provider: str) -> tuple[nn.Module, list[nn.Parameter]]:
        """The model with adapters of a provider, and their vectors in the order of the modules."""
        model = PROVIDERS[provider](self)
        vectors = {name: p for name, p in model.named_parameters() if "lambda_" in name}
        draw = torch.Generator().manual_seed(1)
        named = sorted(vectors.items(), key=lambda pair: (_place(pair[0]), "lambda_b" in pair[0]))
        for name, vector in named:
            if "lambda_b" in name:  # zero, which would hide errors
                vector.data.copy_(0.1 * torch.randn(vector.shape, generator=draw))
        return model.train(), [vector for _, vector in named]

    def step(
        self, provider: str, dtype: torch.dtype = torch.float32, device: Device = "cpu"
    ) -> Callable[[], Tensor]:
        """The loss."""
        model, vectors = self.adapted(provider)
        optimizer = torch.optim.AdamW(vectors, lr=1e-4, fused=True)
        casts = provider == "peft-autocast"

        def step(inputs: dict[str, Tensor]) -> Tensor:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=casts):
                loss: Tensor = model(**inputs).loss
            loss.backward()
            optimizer.step()
            return loss.detach()

        return in_turn(step, [self.inputs(seed) for seed in range(INPUT_SETS)])

    def gradients(self, provider: str) -> Tensor:
        """Those of all vectors after one pass, in one."""
        model, vectors = self.adapted(provider)
        casts = provider == "peft-autocast"
        with torch.autocast("cpu", torch.bfloat16, enabled=casts):
            loss = model(**self.inputs(0)).loss
        return torch.cat([g.flatten().double() for g in torch.autograd.grad(loss, vectors)])

    def check(self, peer: str, device: Device = "cpu", ours: str = "fmkernels") -> dict[str, Any]:
        """Fail unless the gradients are those of PEFT's model of the same weights in float32."""
        exact = replace(self, dtype=torch.float32).gradients("peft")
        errors = {}
        for who in (ours, peer):
            error = (self.gradients(who) - exact).norm() / exact.norm()
            errors[who] = error.item()
        allowed = max(ERRORS[self.dtype], 2 * errors[peer])
        assert errors[ours] <= allowed, f"{ours}: gradients err by {errors[ours]:.3g} of their size"
        return {
            "errors": {who: float(f"{error:.2g}") for who, error in errors.items()},
            "native_bfloat16": has_fast_bfloat16(),
        }

    def operations(self) -> int:
        """Of the linear layers, forward and backward to their inputs; those of the adapters."""
        rows, w = self.sequences * self.tokens, self.width
        up = 2 if self.kind == "llama" else 1
        shapes = [(w, w)] * 4 + [(w, self.inner)] * up + [(self.inner, w)]
        adapted = shapes if self.kind == "llama" else [(w, w)] * 2
        base = sum(4 * rows * into * out for into, out in shapes)
        exact = self.dtype == torch.float32
        adapters = sum(2 * fewest(rows, *shape, self.rank, exact=exact) for shape in adapted)
        return self.depth * (base + adapters)

    def bytes_moved(self) -> int:
        """Weights, twice, and the inputs of the layers."""
        w, up = self.width, 2 if self.kind == "llama" else 1
        weights = 4 * w * w + (1 + up) * w * self.inner
        rows = self.sequences * self.tokens * (6 * w + self.inner)
        return self.depth * self.dtype.itemsize * (2 * weights + rows)

    def tiny(self) -> FineTuning:
        return replace(self, depth=1, width=64, inner=32, heads=1, rank=4, sequences=2, tokens=5)


def _place(name: str) -> str:
    """The path of the adapted module, whatever wraps it."""
    path = name.split("lambda_")[0].removesuffix("vera_").rstrip(".")
    return path.removeprefix("base_model.").removeprefix("model.")


def _ours(problem: FineTuning) -> nn.Module:
    from fmkernels.api import VeraConfig, get_vera_model

    config = VeraConfig(r=problem.rank, target_modules=problem.targets)
    return get_vera_model(problem.model(), config)


def _peft(problem: FineTuning) -> nn.Module:
    import peft

    config = peft.VeraConfig(r=problem.rank, target_modules=problem.targets)
    return peft.get_peft_model(problem.model(), config)


def _accelerated(problem: FineTuning) -> nn.Module:
    from fmkernels.api import accelerate_peft

    model = _peft(problem)
    accelerate_peft(model)
    return model


PROVIDERS: dict[str, Callable[[FineTuning], nn.Module]] = {
    "fmkernels": _ours,
    "fmkernels-peft": _accelerated,
    "peft": _peft,
    "peft-autocast": _peft,
}

_SIZES = {
    "vera-model-roberta": FineTuning("roberta", 12, 768, 3072, 12, 1024, 8, 128),
    "vera-model-llama": FineTuning("llama", 8, 1024, 2816, 16, 256, 2, 512),
}

WORKLOADS: dict[str, Workload] = {
    **_SIZES,
    "vera-model-llama-2048": replace(_SIZES["vera-model-llama"], sequences=4),
    **{f"{name}-float32": replace(it, dtype=torch.float32) for name, it in _SIZES.items()},
}
