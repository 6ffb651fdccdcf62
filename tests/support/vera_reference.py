"""Models with one VeRA or DVoRA adapter written out with PyTorch's operators, and small nets."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D
from vera_layers import composed, composed_dvora

from fmkernels.api import VeraConfig, VeraModel
from fmkernels.api.vera_base import is_conv1d
from fmkernels.api.vera_layer import VeraLayer
from fmkernels.api.vera_trained import TrainedModule
from fmkernels.testing import assert_parity

BASE = "__base__"
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
KINDS = ("lambda_d", "lambda_b", "magnitude")


class Net(nn.Module):
    """Query, key and value of one input, a sum of two layers, and a head; for (batch, …, 12).

    Args:
        conv: GPT-2's layers in the place of linear ones.
        reentrant: of activation checkpoints around both halves; None for none.
    """

    def __init__(self, conv=False, reentrant=None):
        super().__init__()
        self.reentrant = reentrant

        def linear(into, out, bias=True):
            if not conv:
                return nn.Linear(into, out, bias)
            layer = Conv1D(out, into)
            nn.init.normal_(layer.weight, std=0.3)
            nn.init.normal_(layer.bias)
            return layer

        self.q, self.k, self.v = linear(12, 12), linear(12, 12), linear(12, 12, bias=False)
        self.up, self.down = linear(12, 20), linear(20, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        for half in (self.attend, self.feed):
            if self.reentrant is None:
                x = half(x)
            else:
                x = checkpoint(half, x, use_reentrant=self.reentrant)
        return self.head(x)

    def attend(self, x):
        return self.q(x) * torch.sigmoid(self.k(x)) + self.v(x)

    def feed(self, x):
        return x + self.down(torch.tanh(self.up(x)))


CONFIGS = {
    "all": VeraConfig(r=4, target_modules=["q", "k", "v", "up", "down"]),
    "twin": VeraConfig(r=4, target_modules=["q", "k", "v", "up", "down"]),
    "few": VeraConfig(r=7, target_modules=["q", "v"], modules_to_save=["head"]),
    "dvora": VeraConfig(r=4, target_modules=["q", "k", "v", "up", "down"], use_dora=True),
    "mixed": VeraConfig(r=16, target_modules=["k", "up"], use_dora=True, modules_to_save=["head"]),
}
"""Two that share matrices with DVoRA's, and two of other ranks and targets."""
NAMES = ["few", BASE, "dvora", "all", "twin", "mixed", "dvora", BASE, "few"]
"""An adapter for every row of a batch."""


def adapted(model, configs=CONFIGS, seed=0):
    """A model with adapters whose vectors, magnitudes and copies are random."""
    found = VeraModel(model)
    for name, config in configs.items():
        found.add_adapter(name, config)
    generator = torch.Generator().manual_seed(seed)

    def shift(parameter, by):
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter += (by * noise).to(parameter.dtype)

    with torch.no_grad():
        for layer in found.modules():
            if isinstance(layer, VeraLayer):
                for name in layer.lambda_d:
                    for key, vector in layer.vectors(name).items():
                        shift(vector, {"lambda_d": 0.5, "lambda_b": 0.5, "magnitude": 0.2}[key])
            elif isinstance(layer, TrainedModule):
                for parameter in layer.copies.parameters():
                    shift(parameter, 0.3)
    return found


class Naive(nn.Module):
    """The formula in place of an adapted layer; what it trains are copies."""

    def __init__(self, layer, name, drop=None):
        super().__init__()
        matrices = layer.state.adapters[name].matrices
        self.base = layer.base_layer
        self.register_buffer("A", matrices.A.clone())
        self.register_buffer("B", matrices.B.clone())
        self.vectors = nn.ParameterDict(
            {key: nn.Parameter(v.detach().clone()) for key, v in layer.vectors(name).items()}
        )
        self.dropout = layer.state.adapters[name].config.vera_dropout
        self.drop = drop

    def forward(self, x):
        weight = self.base.weight.mT if is_conv1d(self.base) else self.base.weight
        arguments = [x, weight, self.base.bias, self.A.to(x.dtype), self.B.to(x.dtype)]
        arguments += [self.vectors[key] for key in KINDS if key in self.vectors]
        if self.drop is None or not self.dropout:
            return (composed_dvora if len(self.vectors) == 3 else composed)(*arguments)
        assert len(self.vectors) == 2
        seen = composed(self.drop(x, self.dropout), torch.zeros_like(weight), None, *arguments[3:])
        return nn.functional.linear(x, weight, self.base.bias) + seen


def separate(model, name, dtype=None, drop=None):
    """The model with this adapter alone, or none, by the formula; in another dtype if given."""
    adapted_model = copy.deepcopy(model.model)
    adapted_model.reentrant = None
    for path, module in list(adapted_model.named_modules()):
        own = None
        if isinstance(module, VeraLayer):
            own = Naive(module, name, drop) if name in module.lambda_d else module.base_layer
        elif isinstance(module, TrainedModule):
            own = module.of(name)
        if own is not None:
            parent, _, child = path.rpartition(".")
            setattr(adapted_model.get_submodule(parent), child, own)
    return adapted_model if dtype is None else adapted_model.to(dtype)


def gradients_of(model):
    """(adapter, path, vector or parameter) -> gradient, of all that a model's adapters train."""
    found = {}
    for path, module in model.model.named_modules():
        if isinstance(module, VeraLayer):
            for name in module.lambda_d:
                for key, vector in module.vectors(name).items():
                    found[name, path, key] = vector.grad
        elif isinstance(module, TrainedModule):
            for name, own in module.copies.items():
                for key, parameter in own.named_parameters():
                    found[name, path, key] = parameter.grad
    return found


def rows_by_separate_models(model, names, x, grad, dtype, drop=None):
    """Output, gradient of x, and gradients of all adapters, of a model for each adapter.

    Each takes the rows that name it, in ``dtype``.
    """
    y = torch.empty(0)
    x = x.detach().to(dtype).requires_grad_()
    found, outputs = {}, {}
    for name in dict.fromkeys(names):
        own = separate(model, name, dtype, drop)
        rows = [i for i, other in enumerate(names) if other == name]
        outputs[name] = rows, own(x[rows])
        outputs[name][1].backward(grad[rows].to(dtype), inputs=[x, *_trained(own).values()])
        found |= {(name, *key): parameter.grad for key, parameter in _trained(own).items()}
        if name != BASE:
            for adapter, path, key in gradients_of(model):
                if adapter == name and key not in KINDS:
                    found[name, path, key] = own.get_submodule(path).get_parameter(key).grad
    y = torch.empty(len(names), *next(iter(outputs.values()))[1].shape[1:], dtype=dtype)
    for rows, output in outputs.values():
        y[rows] = output.detach().to(dtype)
    return {"y": y, "x": x.grad, **found}


def _trained(model):
    trained = {
        (path, key): vector
        for path, module in model.named_modules()
        if isinstance(module, Naive)
        for key, vector in module.vectors.items()
    }
    heads = {("", n): p for n, p in model.named_parameters() if p.requires_grad}
    own = {id(p) for p in trained.values()}
    return trained | {key: p for key, p in heads.items() if id(p) not in own}


def of_several(results):
    """Those of several models as of one, side by side: what a few numbers err by is chance."""
    return {
        (i, "call", key) if isinstance(key, str) else (i, *key[1:], key[0]): value
        for i, result in enumerate(results)
        for key, value in result.items()
    }


def check_same(found, plain, exact, dtype, where=""):
    """Fail unless all errs at most twice as much as the formula in the same dtype.

    Tensors of one kind are pooled: each is divided by its largest element first.
    """
    pools = {}
    for key, right in exact.items():
        if isinstance(key, tuple) and key[1] == "":
            continue  # of a copy, which is there by its path
        value = found[key]
        assert value is not None, f"no gradient of {key} {where}"
        assert value.shape == right.shape, f"{key} {where}"
        scale = right.double().abs().max().clamp(min=1e-30)
        kind = key if isinstance(key, str) else key[2]
        if dtype == torch.float64:
            worst = ((value - right).abs().max() / scale).item()
            assert worst <= 1e-10, f"{key} {where}: {worst}"
            continue
        pools.setdefault(kind, []).append(
            [v.double().flatten() / scale for v in (value, plain[key], right)]
        )
    for kind, parts in pools.items():
        value, same, right = (torch.cat(part) for part in zip(*parts, strict=True))
        assert_parity(value.to(dtype), same.to(dtype), right, name=f"{kind} {where}")
