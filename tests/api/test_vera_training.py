"""Training VeRA models: autocast, activation checkpoints, and what several layers share."""

import copy
import importlib

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from vera_models import inputs_for, randomize_vectors, tiny_gpt2, tiny_llama, tiny_roberta

from fmkernels.api import VeraConfig, get_vera_model
from fmkernels.ops.vera_linear.formulation import formulation

WIDTH = 12


class Attention(nn.Module):
    """Three layers that read the same input, by one checkpoint, by several, or by none."""

    def __init__(self, use_reentrant=None, apart=False):
        super().__init__()
        for name in ("query", "key", "value"):
            self.add_module(name, nn.Linear(WIDTH, WIDTH))
        self.use_reentrant = use_reentrant
        self.apart = apart

    def call(self, function, x):
        if self.use_reentrant is None:
            return function(x)
        return checkpoint(function, x, use_reentrant=self.use_reentrant)

    def forward(self, x):
        h = torch.tanh(x)
        if self.apart:
            query, key = self.call(self.query, h), self.call(self.key, h)
            return x + query * key + self.value(h)
        return self.call(lambda h: h + self.query(h) * self.key(h) + self.value(h), h)


def adapted(base, **changes):
    config = VeraConfig(**{"r": 2, "target_modules": ["query", "key", "value"], **changes})
    return randomize_vectors(get_vera_model(base, config))


def attention(dora=False, **settings):
    torch.manual_seed(1)
    return adapted(nn.Sequential(Attention(**settings), Attention(**settings)), use_dora=dora)


def results(model, x, **settings):
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x, **settings)
    y.float().square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.fixture
def shrinks(monkeypatch):
    """How often X Aᵀ is computed on its own."""
    calls = []
    for name in ("fmkernels.api.vera_shared", "fmkernels.ops.vera_linear"):
        module = importlib.import_module(name)
        original = module.vera_shrink
        counted = lambda *args, own=original: (calls.append(1), own(*args))[1]  # noqa: E731
        monkeypatch.setattr(module, "vera_shrink", counted)
    return calls


# autocast


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("names", [None, ["second", "default", "__base__", "second"]])
def test_autocast(dora, names):
    """Of the dtype of nn.Linear's output, and as near to float64 as that of the base model is."""
    model = attention(dora)
    model.add_adapter("second", VeraConfig(r=3, target_modules=["query", "value"]))
    randomize_vectors(model)
    x = torch.randn(4, 5, WIDTH)
    exact = results(copy.deepcopy(model).double(), x.double(), adapter_names=names)
    with torch.autocast("cpu", torch.bfloat16):
        found = results(model, x, adapter_names=names)
        for name in ("query", "key"):
            layer = model.model[0].get_submodule(name)
            assert layer(x).dtype == layer.base_layer(x).dtype == torch.bfloat16
    assert {g.dtype for g in found[1:]} == {torch.float32}
    assert_rounded(found, exact)


def assert_rounded(found, exact):
    """To bfloat16, at about two places in each of two blocks; of all vectors' gradients at once."""
    for part in (slice(0, 1), slice(1, 2), slice(2, None)):
        own, expected = (torch.cat([v.double().flatten() for v in r[part]]) for r in (found, exact))
        assert (own - expected).norm() < 4 * 2**-8 * expected.norm()


@pytest.mark.parametrize("dora", [False, True])
def test_autocast_to_half_inside_of_bfloat16_is_not_shared(dora):
    """U in one dtype is not handed to a layer that multiplies in another."""
    model = attention(dora)
    block, x = model.model[0], torch.randn(3, WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        block.query(x)
    assert torch.equal(block.key(x), copy.deepcopy(block).key(x.clone()))


# activation checkpoints


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("names", [None, ["default", "__base__", "second", "default"]])
def test_activation_checkpoints(dora, use_reentrant, apart, names):
    plain = attention(dora, apart=apart)
    checkpointed = attention(dora, use_reentrant=use_reentrant, apart=apart)
    for model in (plain, checkpointed):
        model.add_adapter("second", VeraConfig(r=3, target_modules=["query", "value"]))
        randomize_vectors(model)
    x = torch.randn(4, 5, WIDTH)
    expected = results(plain, x, adapter_names=names)
    assert len(expected) > 8
    torch.testing.assert_close(results(checkpointed, x, adapter_names=names), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert_rounded(results(checkpointed, x, adapter_names=names), expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("tiny", [tiny_roberta, tiny_gpt2, tiny_llama])
def test_activation_checkpoints_of_transformers(tiny, use_reentrant):
    targets = {tiny_roberta: ["query", "value"], tiny_gpt2: ["c_attn", "c_proj"]}
    model = adapted(tiny(), target_modules=targets.get(tiny, ["q_proj", "k_proj", "v_proj"]))
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    batch = inputs_for(model)

    def gradients():
        model.zero_grad()
        model(**batch).logits.square().mean().backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    found = gradients()
    assert found.keys() == expected.keys() != set()
    torch.testing.assert_close(found, expected)


# what is shared


@pytest.mark.parametrize("use_reentrant", [None, False, True])
@pytest.mark.parametrize("tokens", [1, 30], ids=["products", "folded"])
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"bias": "vera_only"}], ids=str)
def test_x_times_a_is_computed_once_for_all_that_read_x(shrinks, use_reentrant, tokens, settings):
    torch.manual_seed(1)
    model = adapted(nn.Sequential(*(Attention(use_reentrant) for _ in range(2))), **settings)
    results(model, torch.randn(4, tokens, WIDTH))
    # a checkpoint computes again in backward; the reentrant kind is without gradients before that,
    # where a folded weight needs no U
    twice = use_reentrant is False or (use_reentrant and (tokens == 1 or "bias" in settings))
    assert len(shrinks) == (4 if twice else 2)


@pytest.mark.parametrize("rows", [3, 60], ids=["products", "folded"])
def test_graphs_of_what_was_shared_may_be_freed(rows):
    """Backward through one reader, and then the next reads the same input."""
    model = attention()
    block, x = model.model[0], torch.randn(rows, WIDTH, requires_grad=True)
    block.query(x).sum().backward()
    block.key(x).sum().backward()
    found = x.grad
    x.grad = None
    (block.query(x) + block.key(x)).sum().backward()
    torch.testing.assert_close(found, x.grad)


@pytest.mark.parametrize("order", ["qk", "kq"])
def test_a_reader_may_fold_its_update_where_another_does_not(shrinks, order):
    """Keys that are narrower than queries: of U these need the graph, those only the numbers."""

    class Grouped(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(24, 24), nn.Linear(24, 4)

    model = adapted(Grouped().double(), target_modules=["q", "k"])
    x = torch.randn(14, 24, dtype=torch.float64, requires_grad=True)
    readers = [getattr(model.model, name) for name in order]
    forms = [
        formulation(14, 24, each.out_features, 2, builds=True, merge=True, readers=2)
        for each in readers
    ]
    assert [form == "products" for form in forms] == [name == "q" for name in order]
    sum(each(x).sum() for each in readers).backward()
    assert len(shrinks) == (1 if order == "qk" else 2)
    expected = sum(
        each.adapted_weight("default", each.base_layer.weight).sum(0) for each in readers
    )
    torch.testing.assert_close(x.grad, expected.detach().expand(14, 24))


def test_without_gradients_a_folded_weight_needs_no_x_times_a(shrinks):
    block, x = attention().model[0], torch.randn(60, WIDTH)
    expected = block(x).detach()
    shrinks.clear()
    with torch.no_grad():
        assert torch.equal(block(x), expected)
    assert not shrinks


def test_an_input_that_is_changed_is_multiplied_again():
    model = attention()
    block, x = model.model[0], torch.randn(3, WIDTH)
    block.query(x)
    x.mul_(2)
    torch.testing.assert_close(block.key(x), block.key(x.clone()))


# training


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
def test_training_is_that_of_the_formula(dora, optimizer):
    """Steps on the vectors of one layer, beside the same steps on the formula written out."""
    torch.manual_seed(2)
    base = nn.Sequential(nn.Linear(WIDTH, 8)).double()
    model = adapted(base, target_modules=["0"], use_dora=dora)
    layer, (pair,) = model.model[0], model.shared.values()
    own = {
        name: v.detach().clone().requires_grad_() for name, v in layer.vectors("default").items()
    }
    weight, bias = layer.base_layer.weight.detach(), layer.base_layer.bias.detach()

    def formula(x):
        delta = own["lambda_b"].unsqueeze(1) * pair.B @ (own["lambda_d"].unsqueeze(1) * pair.A)
        adapted = weight + delta
        if dora:
            norms = adapted.detach().norm(dim=1)
            adapted = (own["magnitude"] / norms).unsqueeze(1) * adapted
        return nn.functional.linear(x, adapted, bias)

    kind = getattr(torch.optim, optimizer)
    optimizers = kind(model.adapter_parameters("default"), lr=0.05), kind(own.values(), lr=0.05)
    x, target = torch.randn(16, WIDTH).double(), torch.randn(16, 8).double()
    losses = []
    for _ in range(10):
        for function, each in zip((model, formula), optimizers, strict=True):
            each.zero_grad()
            loss = (function(x) - target).square().mean()
            loss.backward()
            each.step()
            losses.append(float(loss.detach()))
    torch.testing.assert_close(losses[::2], losses[1::2])
    assert losses[-1] < losses[0]
    for name, vector in layer.vectors("default").items():
        torch.testing.assert_close(vector.detach(), own[name].detach())


def test_gradients_are_accumulated_and_two_calls_share_a_backward_pass():
    model = attention(dora=True)
    first, second = torch.randn(2, 3, 5, WIDTH)
    model.zero_grad()
    (model(first).sum() + 2 * model(second).sum()).backward()
    together = [p.grad.clone() for p in model.adapter_parameters("default")]
    model.zero_grad()
    model(first).sum().backward()
    (2 * model(second).sum()).backward()
    apart = [p.grad for p in model.adapter_parameters("default")]
    torch.testing.assert_close(together, apart)
