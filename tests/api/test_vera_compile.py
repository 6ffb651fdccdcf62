"""VeRA models under torch.compile: one graph, of all batch sizes, with the same results."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from vera_models import inputs_for, randomize_vectors, tiny_llama

from fmkernels.api import VeraConfig, get_vera_model

INPUTS, INNER = 13, 11


class Attention(nn.Module):
    """Two layers that read the same input, and one that does not; some have a bias."""

    def __init__(self):
        super().__init__()
        self.query = nn.Linear(INPUTS, INNER)
        self.key = nn.Linear(INPUTS, INNER, bias=False)
        self.output = nn.Linear(INNER, INPUTS)

    def forward(self, x):
        h = torch.tanh(x)
        return x + self.output(self.query(h) * self.key(h))


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def adapted(dora=False):
    """Adapters of two ranks, one of them not of all layers; the last is never DVoRA."""
    model = get_vera_model(Attention(), config(4, use_dora=dora))
    model.add_adapter("second", config(4, use_dora=dora, target_modules=["query", "key"]))
    model.add_adapter("third", config(3))
    return randomize_vectors(model)


def config(rank, **changes):
    return VeraConfig(**{"r": rank, "target_modules": ["query", "key", "output"], **changes})


def results(model, function, x, **settings):
    """The output, and the gradients of the input and of all that is trained."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = function(x, **settings)
    y.square().sum().backward()
    named = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **named}


def assert_same(model, function, *args, **settings):
    found = results(model, function, *args, **settings)
    torch.testing.assert_close(found, results(model, model, *args, **settings))
    return found


@pytest.mark.parametrize("dora", [False, True])
def test_one_graph_for_all_sizes_and_the_active_adapter(dora):
    model, counter = adapted(dora), CompileCounterWithBackend("aot_eager")
    model(torch.randn(2, 5, INPUTS))
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for rows in (3, 4, 6, 9, 40):
        first = assert_same(model, compiled, torch.randn(rows, 5, INPUTS))
    assert counter.frame_count == 2  # of one size, and of all others
    model.set_adapter("second")
    second = assert_same(model, compiled, torch.randn(3, 5, INPUTS))
    assert first.keys() ^ second.keys()
    model.set_adapter("default")
    assert_same(model, compiled, torch.randn(5, 5, INPUTS))
    assert counter.frame_count <= 4
    with model.disable_adapter():
        x = torch.randn(5, 5, INPUTS)
        torch.testing.assert_close(compiled(x), model.model(x))


def shapes_in(graphs):
    return {
        tuple(value.shape)
        for graph in graphs
        for node in graph.graph.nodes
        if node.op != "placeholder"
        and node.target != "to"  # to the dtype that it has
        and isinstance(value := node.meta.get("example_value"), torch.Tensor)
    }


@pytest.mark.parametrize("called_before", [True, False])
def test_norms_of_dvora_are_not_built_in_each_call(called_before):
    """No matrix of the size of a weight is made, if the constants are known from a call before."""
    model, counter = adapted(dora=True), CompileCounterWithBackend("aot_eager")
    if called_before:
        model(torch.randn(2, 5, INPUTS))
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    assert_same(model, compiled, torch.randn(3, 5, INPUTS))
    assert ((INNER, INPUTS) in shapes_in(counter.graphs)) != called_before
    with torch.no_grad():
        for parameter in model.adapter_parameters("default"):
            parameter.mul_(1.5)
    assert_same(model, compiled, torch.randn(3, 5, INPUTS))  # the norms are not constants


def test_norms_of_weights_that_were_cast():
    """The constants that a call before has left are of other weights."""
    model = adapted(dora=True)
    model(torch.randn(2, 5, INPUTS))
    with torch.no_grad():
        for parameter in model.model.double().parameters():
            parameter.data = parameter.data.mul(2)
    x = torch.randn(3, 5, INPUTS).double()
    torch.testing.assert_close(torch.compile(model, backend="eager")(x), model(x))


def test_an_adapter_for_every_row():
    model = adapted(dora=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(
        model, compiled, torch.randn(3, 5, INPUTS), adapter_names=["second", "__base__", "third"]
    )
    assert_same(
        model, compiled, torch.randn(3, 5, INPUTS), adapter_names=["third", "second", "third"]
    )


def test_one_graph_for_all_orders_of_names_if_what_is_adapted_is_compiled():
    model, counter = adapted(dora=True), CompileCounterWithBackend("aot_eager")
    batches = [
        ["third", "default", "__base__"],
        ["default", "third", "third", "default"],
        ["third", "__base__", "__base__", "__base__", "default", "default"],
        ["default"] * 6 + ["third"] * 3,
    ]
    inputs = [torch.randn(len(names), 5, INPUTS) for names in batches]
    expected = [
        results(model, model, x, adapter_names=names)
        for x, names in zip(inputs, batches, strict=True)
    ]
    model.model.compile(fullgraph=True, backend=counter)
    for x, names, wanted in zip(inputs, batches, expected, strict=True):
        torch.testing.assert_close(results(model, model, x, adapter_names=names), wanted)
    assert counter.frame_count == 2


def test_activation_checkpoints():
    class Checkpointed(nn.Sequential):
        def forward(self, x):
            for block in self:
                x = checkpoint(block, x, use_reentrant=False)
            return x

    model = randomize_vectors(get_vera_model(Checkpointed(Attention(), Attention()), config(4)))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(model, compiled, torch.randn(3, 5, INPUTS))


def test_language_model():
    model = get_vera_model(
        tiny_llama(), VeraConfig(r=4, target_modules=["q_proj", "v_proj"], use_dora=True)
    )
    randomize_vectors(model)
    batch = inputs_for(model)

    def gradients(function):
        model.zero_grad()
        output = function(**batch, labels=batch["input_ids"])
        output.loss.backward()
        return [output.logits, *(p.grad for p in model.parameters() if p.requires_grad)]

    expected = gradients(model)
    found = gradients(torch.compile(model, fullgraph=True, backend="aot_eager"))
    torch.testing.assert_close(found, expected)
