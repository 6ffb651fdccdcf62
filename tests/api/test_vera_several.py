"""Several adapters in a model: added, deleted, switched and renamed, each beside a model of its own."""

import copy
import pickle

import pytest
import torch
import vera_reference as reference
from torch import nn
from vera_reference import BASE, CONFIGS, Net, adapted

from fmkernels.api import VeraConfig, VeraModel
from fmkernels.api.vera_layer import VeraLayer


def tensors():
    torch.manual_seed(7)
    return torch.randn(4, 5, 12, dtype=torch.float64)


def is_reference(model, name, x):
    expected = reference.separate(model, BASE if name is None else name)(x)
    return torch.allclose(model(x), expected, rtol=1e-12, atol=1e-12)


def test_switching_is_what_a_model_of_each_adapter_gives():
    net = Net().double()
    x = tensors()
    base = net(x)
    model = adapted(net)
    outputs = {}
    for name in [*CONFIGS, None, *reversed(CONFIGS)]:
        model.set_adapter(name)
        assert model.active_adapter == name
        assert is_reference(model, name, x)
        outputs.setdefault(name, model(x))
        assert torch.equal(model(x), outputs[name])
        with model.disable_adapter():
            assert torch.equal(model(x), base)
        assert model.active_adapter == name
    assert torch.equal(outputs[None], base)
    values = list(outputs.values())
    for i, a in enumerate(values):
        for b in values[:i]:
            assert not torch.allclose(a, b, rtol=1e-3)


def test_the_first_is_active_and_a_deleted_one_leaves_the_base():
    net = Net().double()
    x = tensors()
    base = net(x)
    model = adapted(net)
    assert model.active_adapter == "all"
    expected = model(x, adapter_names=["few", "dvora", BASE, "mixed"])
    model.delete_adapter("all")
    assert model.active_adapter is None
    assert torch.equal(model(x), base)
    assert list(model.adapters) == ["twin", "few", "dvora", "mixed"]
    assert torch.equal(model(x, adapter_names=["few", "dvora", BASE, "mixed"]), expected)
    model.set_adapter("mixed")
    model.delete_adapter("few")
    assert model.active_adapter == "mixed"
    assert is_reference(model, "mixed", x)
    with pytest.raises(ValueError, match=r"adapter_names: expected some of .* got 'few' in row 0"):
        model(x, adapter_names=["few"] * 4)
    for name in list(model.adapters):
        model.delete_adapter(name)
    assert not model.adapters
    assert not [m for m in model.modules() if isinstance(m, VeraLayer) and len(m.lambda_d)]
    assert len(model.shared) == 0
    assert torch.equal(model(x), base)
    model.add_adapter("all", CONFIGS["all"])
    assert model.active_adapter == "all"
    assert torch.equal(model(x), base)  # lambda_b is 0


def test_matrices_are_shared_where_they_are_equal_and_go_with_the_last_adapter():
    model = adapted(Net())
    pairs = {name: model._adapters.state.adapters[name].matrices for name in CONFIGS}
    assert pairs["all"] is pairs["twin"] is pairs["dvora"]
    assert len(model.shared) == 3
    for name, left in (("all", 3), ("dvora", 3), ("twin", 2), ("mixed", 1), ("few", 0)):
        model.delete_adapter(name)
        assert len(model.shared) == left


def test_a_name_can_be_used_again():
    x = tensors()
    model = adapted(Net().double())
    model.delete_adapter("dvora")
    model.add_adapter(
        "dvora", VeraConfig(r=3, target_modules=["q"], use_dora=True, init_weights=False)
    )
    model.set_adapter("dvora")
    assert is_reference(model, "dvora", x)
    rows = model(x, adapter_names=["dvora", BASE, "all", "dvora"])
    assert torch.allclose(rows[[0, 3]], model(x)[[0, 3]], rtol=1e-12, atol=1e-12)


def test_renaming_keeps_the_parameters_their_gradients_and_what_they_do():
    x = tensors()
    model = adapted(Net().double())
    for name in CONFIGS:
        model.set_adapter(name)
        before = model(x)
        before.square().sum().backward()
        parameters = model.adapter_parameters(name)
        gradients = [p.grad for p in parameters]
        position = list(model.adapters).index(name)
        model.rename_adapter(name, "other")
        assert list(model.adapters).index("other") == position
        assert model.active_adapter == "other"
        assert torch.equal(model(x), before)
        now = model.adapter_parameters("other")
        assert all(a is b for a, b in zip(parameters, now, strict=True))
        assert all(p.grad is g for p, g in zip(now, gradients, strict=True))
        assert torch.allclose(model(x, adapter_names=["other"] * 4), before, rtol=1e-12, atol=1e-12)
        with pytest.raises(ValueError, match="adapter_name: expected one of"):
            model.set_adapter(name)
        with pytest.raises(ValueError, match="which is taken"):
            model.rename_adapter("other", next(n for n in CONFIGS if n != name))
        model.rename_adapter("other", name)
        model.zero_grad()


def test_training_one_leaves_the_others():
    x = tensors()
    model = adapted(Net().double())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    names = ["few", "dvora", BASE, "dvora"]
    for chosen in (None, names):
        trained = {"mixed"} if chosen is None else {"few", "dvora"}
        if chosen is None:
            model.set_adapter("mixed")
        own = {id(p) for name in trained for p in model.adapter_parameters(name)}
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
        optimizer.zero_grad()
        model(x, adapter_names=chosen).square().sum().backward()
        optimizer.step()
        for name, parameter in model.named_parameters():
            changed = not torch.equal(parameter, before[name])
            assert changed == (id(parameter) in own), name
            before[name] = parameter.detach().clone()


def test_training_many_at_once_is_training_each_alone():
    """Ten steps with rows for four adapters, and ten of each in a model of its own."""
    x = torch.randn(8, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    target = torch.randn(8, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    names = ["few", "all", "dvora", "mixed"] * 2
    together = adapted(Net().double())
    alone = {name: copy.deepcopy(together) for name in set(names)}

    def train(model, names, x, target, parameters):
        optimizer = torch.optim.SGD(parameters, lr=0.001, momentum=0.5)
        losses = []
        for _ in range(10):
            optimizer.zero_grad()
            loss = (model(x, adapter_names=names) - target).square().sum()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    parameters = [p for name in alone for p in together.adapter_parameters(name)]
    losses = train(together, names, x, target, parameters)
    assert losses[-1] < 0.8 * losses[0]
    for name, model in alone.items():
        rows = [i for i, n in enumerate(names) if n == name]
        model.set_adapter(name)
        train(model, None, x[rows], target[rows], model.adapter_parameters(name))
        both = zip(together.adapter_parameters(name), model.adapter_parameters(name), strict=True)
        for ours, theirs in both:
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "change", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_a_copy_is_a_model_of_its_own(change):
    x = tensors()
    names = ["few", "dvora", BASE, "mixed"]
    model = adapted(Net().double())
    model.set_adapter("dvora")
    y = model(x, adapter_names=names)
    expected = y, model(x)
    other = change(model)
    assert other.active_adapter == "dvora"
    assert torch.equal(other(x, adapter_names=names), expected[0])
    assert torch.equal(other(x), expected[1])
    other.set_adapter("few")
    other.delete_adapter("dvora")
    other.rename_adapter("all", "renamed")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    assert torch.equal(model(x, adapter_names=names), expected[0])
    assert torch.equal(model(x), expected[1])
    assert model.active_adapter == "dvora"


def test_refusals_leave_the_model_as_it_was():
    model = adapted(Net().double())
    x = tensors()
    expected = model(x, adapter_names=["few", "dvora", "all", "mixed"])
    state = {n: v.clone() for n, v in model.state_dict().items()}
    for action in (
        lambda: model.add_adapter("all", CONFIGS["all"]),
        lambda: model.add_adapter(BASE, CONFIGS["all"]),
        lambda: model.add_adapter("x.y", CONFIGS["all"]),
        lambda: model.add_adapter("new", VeraConfig(r=2, target_modules=["nowhere"])),
        lambda: model.add_adapter("new", VeraConfig(r=2, target_modules=["q"], bias="all")),
        lambda: model.add_adapter(
            "new", VeraConfig(r=2, target_modules=["q"], projection_prng_key=1)
        ),
        lambda: model.add_adapter("new", VeraConfig(r=2, target_modules=["head"])),
        lambda: model.delete_adapter("nobody"),
        lambda: model.delete_adapter(BASE),
        lambda: model.set_adapter("nobody"),
        lambda: model.rename_adapter("nobody", "new"),
        lambda: model.rename_adapter("all", BASE),
        lambda: VeraModel(model.model),
        lambda: VeraModel(model),
    ):
        with pytest.raises(ValueError, match="VeraModel"):
            action()
    assert list(model.adapters) == list(CONFIGS)
    assert model.active_adapter == "all"
    now = model.state_dict()
    assert now.keys() == state.keys()
    assert all(torch.equal(now[key], value) for key, value in state.items())
    assert torch.equal(model(x, adapter_names=["few", "dvora", "all", "mixed"]), expected)


def test_attributes_and_modes_reach_every_copy():
    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.head = nn.Linear(6, 6), nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 2))

        def forward(self, x):
            return self.head(self.net(x))

    config = VeraConfig(r=2, target_modules=["net"], modules_to_save=["head"], init_weights=False)
    model = adapted(Dropping(), {"a": config, "b": config})
    x = torch.randn(4, 6)
    names = ["a", "b", BASE, "b"]
    assert not torch.equal(model.train()(x, adapter_names=names), model(x, adapter_names=names))
    assert torch.equal(model.eval()(x, adapter_names=names), model(x, adapter_names=names))
