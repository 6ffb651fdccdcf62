"""Calls of a VeraModel: from several threads, computed again in backward, disabled, of PEFT's names."""

from __future__ import annotations

import threading

import peft
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fmkernels.api import VeraConfig, VeraModel, get_vera_model


class Net(nn.Module):
    """Its adapted part is computed again in backward; its output is of a class of its own."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.reentrant = reentrant
        self.seen = None

    def part(self, x):
        return self.second(torch.tanh(self.first(x)))

    def forward(self, x):
        self.seen = checkpoint(self.part, x, use_reentrant=self.reentrant)
        return Output(2 * self.seen)


class Output:
    def __init__(self, logits):
        self.held = [{"logits": logits}]

    @property
    def logits(self):
        return self.held[0]["logits"]


CHECKPOINTS = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "other"])
NAMES = ["one", "two", "__base__"]


def adapted(reentrant: bool = False) -> VeraModel:
    torch.manual_seed(0)
    model = get_vera_model(Net(reentrant).double(), config(), "one")
    model.add_adapter("two", config())
    for parameter in [*model.adapter_parameters("one"), *model.adapter_parameters("two")]:
        parameter.data.normal_()
    return model


def config() -> VeraConfig:
    return VeraConfig(r=4, target_modules=["first", "second"])


def rows() -> torch.Tensor:
    return torch.randn(3, 8, dtype=torch.float64, requires_grad=True)


def gradients(model: VeraModel, loss: torch.Tensor) -> list[torch.Tensor | None]:
    model.zero_grad()
    loss.backward()
    return [p.grad for name in ("one", "two") for p in model.adapter_parameters(name)]


@CHECKPOINTS
@pytest.mark.parametrize("names", [None, NAMES], ids=["active", "rows"])
def test_backward_through_an_output_of_any_class_has_the_adapters_of_its_call(reentrant, names):
    model, x = adapted(reentrant), rows()
    expected = gradients(model, model(x, adapter_names=names).logits.square().sum())
    output = model(x, adapter_names=names)
    model.set_adapter("two")
    found = gradients(model, output.logits.square().sum())
    assert any(g is not None for g in expected)
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


@CHECKPOINTS
def test_backward_through_another_tensor_is_right_or_refused(reentrant):
    model, x = adapted(reentrant), rows()
    expected = gradients(model, model(x).logits.sum())
    model(x)
    found = gradients(model, 2 * model.model.seen.sum())  # only one adapter was ever asked for
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    model(x)
    seen = model.model.seen
    model.set_adapter("two")
    model(x)
    with pytest.raises(
        ValueError, match="expected a backward pass through what the model returned"
    ):
        gradients(model, seen.sum())


def test_calls_from_several_threads_take_turns():
    model = adapted()
    x = rows().detach()
    orders = [["one", "two", "two"], ["two", "__base__", "one"], None]
    with torch.no_grad():
        expected = [model(x, adapter_names=names).logits for names in orders]
    assert not torch.allclose(expected[0], expected[2])
    wrong = []

    def call(i: int) -> None:
        with torch.no_grad():
            found = [model(x, adapter_names=orders[i]).logits for _ in range(100)]
        wrong.extend(i for y in found if not torch.equal(y, expected[i]))

    threads = [threading.Thread(target=call, args=(i,)) for i in range(3) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_what_is_done_while_adapters_are_disabled_is_kept():
    model, x = adapted(), rows()
    base = model.model.part
    with model.disable_adapter():
        without = model(x).logits
        with pytest.raises(
            ValueError, match=r"adapter_names: expected None within disable_adapter"
        ):
            model(x, adapter_names=NAMES)
        with pytest.raises(ValueError, match=r"got a call within disable_adapter\(\)"):
            model.merge("one")
        model.rename_adapter("one", "renamed")
        model.set_adapter("two")
        with model.disable_adapter():
            assert torch.equal(model(x).logits, without)
        assert torch.equal(model(x).logits, without)
    assert model.active_adapter == "two"
    assert not torch.allclose(model(x).logits, without)
    with model.disable_adapter():
        model.delete_adapter("two")
    assert model.active_adapter is None
    assert torch.equal(model(x).logits, 2 * base(x))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("merge_adapter", r"here it is merge\(\)"),
        ("push_to_hub", "upload the folder"),
        ("peft_config", "adapters maps names"),
        ("active_adapters", "one is active"),
    ],
)
def test_pefts_names_say_what_there_is_instead(name, words):
    with pytest.raises(AttributeError, match=f"VeraModel has no attribute '{name}'; .*{words}"):
        getattr(adapted(), name)
    assert not hasattr(adapted(), name)


def test_models_that_are_not_bare_are_refused():
    def base() -> nn.Sequential:
        return nn.Sequential(nn.Linear(8, 8))

    own = VeraConfig(r=4, target_modules=["0"])
    theirs = peft.get_peft_model(base(), peft.VeraConfig(r=4, target_modules=["0"]))
    with pytest.raises(
        ValueError, match=r"without PEFT's adapters, got PeftModel; accelerate_peft"
    ):
        get_vera_model(theirs, own)
    with pytest.raises(ValueError, match="adapt it first, then compile"):
        get_vera_model(torch.compile(base()), own)
    model = get_vera_model(base(), own)
    with pytest.raises(ValueError, match="without VeRA adapters or a pool of them"):
        get_vera_model(model.model, own)


@pytest.mark.parametrize("call", ["set_adapter", "merge", "delete_adapter", "adapter_parameters"])
def test_a_list_of_names_is_refused_in_words(call):
    with pytest.raises(ValueError, match=r"adapter_name: expected one of \['one', 'two'\], got \["):
        getattr(adapted(), call)(["one"])
