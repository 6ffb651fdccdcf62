"""Adapters merged into the base weights, and these weights put back bit for bit."""

import copy
import pickle

import pytest
import torch
import vera_reference as reference
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from vera_reference import BASE, CONFIGS, DTYPES, Net, adapted

from fmkernels.api import VeraConfig, get_vera_model
from fmkernels.testing import assert_parity

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
every_kind = pytest.mark.parametrize("conv", [False, True], ids=["Linear", "Conv1D"])


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_weights(model, before):
    now = weights(model)
    assert now.keys() == before.keys()
    for name, value in before.items():
        assert now[name].dtype == value.dtype, name
        assert torch.equal(now[name].nan_to_num(), value.nan_to_num()), name


def merged_by_hand(model, name):
    """The base model with W0 + ΔW written into its weights: built in float32 at least, and rounded
    to their dtype; and in float64."""
    found = []
    for rounds in (True, False):
        wide = torch.float32 if rounds else torch.float64
        net = copy.deepcopy(reference.separate(model, name))
        for path, layer in list(net.named_modules()):
            if not isinstance(layer, reference.Naive):
                continue
            base = layer.base
            wide = torch.promote_types(base.weight.dtype, wide)
            vectors = {k: v.detach().to(wide) for k, v in layer.vectors.items()}
            conv = isinstance(base, reference.Conv1D)
            weight = (base.weight.mT if conv else base.weight).detach().to(wide)
            out, into = weight.shape
            A, B = layer.A[:, :into].to(wide), layer.B[:out].to(wide)
            new = weight + torch.diag(vectors["lambda_b"]) @ B @ torch.diag(vectors["lambda_d"]) @ A
            if "magnitude" in vectors:
                new = torch.diag(vectors["magnitude"] / new.square().sum(1).sqrt()) @ new
            dtype = base.weight.dtype
            base = base.double() if not rounds else base
            new = new.to(dtype) if rounds else new
            base.weight = nn.Parameter(new.mT.contiguous() if conv else new)
            parent, _, child = path.rpartition(".")
            setattr(net.get_submodule(parent), child, base)
        found.append(net if rounds else net.double())
    return found


@every_dtype
@every_kind
@pytest.mark.parametrize("name", list(CONFIGS))
def test_merging_is_the_adapter_and_unmerging_its_opposite(dtype, conv, name):
    """The merged model is that of a weight built in float64 and rounded once; for W0 (n, n) too."""
    model = adapted(Net(conv).to(dtype))
    model.set_adapter("twin")
    before = weights(model)
    objects = dict(model.named_parameters())
    x = torch.randn(4, 5, 12, dtype=dtype)
    expected, active = model(x), reference.separate(model, name, torch.float64)(x.double())
    rounded, exact = merged_by_hand(model, name)
    torch.testing.assert_close(exact(x.double()), active, rtol=1e-9, atol=1e-10)
    model.merge(name)
    assert model.active_adapter == name
    y = model(x).detach()
    if dtype == torch.float64:
        torch.testing.assert_close(y, active.detach(), rtol=1e-10, atol=1e-10)
    else:
        assert_parity(y, rounded(x).detach(), exact(x.double()).detach())
    for path in model._adapters.targets(name):
        own = model.model.get_submodule(path).base_layer.weight
        right, same = (net.get_submodule(path).weight.detach() for net in (exact, rounded))
        assert own.dtype == dtype
        assert own.is_contiguous()
        assert not own.requires_grad
        assert_parity(own.detach(), same, right, name=path)
        assert not torch.equal(own, before[f"model.{path}.base_layer.weight"])
    model.unmerge()
    assert_weights(model, before)
    assert all(p is objects[n] for n, p in model.named_parameters())
    assert model.active_adapter == "twin"
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("name", ["all", "mixed", "dvora"])
def test_unloaded_it_is_a_plain_model_and_can_be_taken_back(name):
    net = Net().double()
    kinds = {path: type(module) for path, module in net.named_modules()}
    keys = list(net.state_dict())
    model = adapted(net)
    x = torch.randn(4, 5, 12, dtype=torch.float64)
    names = ["few", "dvora", BASE, "mixed"]
    before, rows, plain = weights(model), model(x, adapter_names=names), model(x)
    model.set_adapter(name)
    expected = model(x)
    model.set_adapter("all")
    for is_merged in (False, True):
        if is_merged:
            model.merge(name)
        unloaded = model.merge_and_unload(name)
        assert unloaded is net
        assert {path: type(module) for path, module in unloaded.named_modules()} == kinds
        assert list(unloaded.state_dict()) == keys
        torch.testing.assert_close(unloaded(x), expected, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(model(x), expected, rtol=1e-11, atol=1e-11)
        assert model.merge_and_unload() is net
        model.unmerge()
        assert_weights(model, before)
        assert model.active_adapter == "all"
        assert torch.equal(model(x, adapter_names=names), rows)
        assert torch.equal(model(x), plain)
    fresh = Net().double()
    fresh.load_state_dict(model.merge_and_unload(name).state_dict())
    assert torch.equal(fresh(x), net(x))


def test_while_it_is_merged_what_would_be_wrong_is_refused(tmp_path):
    model = adapted(Net().double())
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    y = model(x)
    with pytest.raises(ValueError, match="unmerge: expected a merged adapter, got none"):
        model.unmerge()
    model.merge()
    for action in (
        lambda: model(x, adapter_names=["all", BASE]),
        lambda: model.merge("few"),
        lambda: model.set_adapter("few"),
        lambda: model.set_adapter(None),
        lambda: model.add_adapter("new", CONFIGS["all"]),
        lambda: model.delete_adapter("all"),
        lambda: model.rename_adapter("all", "new"),
        lambda: model.load_adapter(tmp_path, "new"),
        lambda: model.disable_adapter().__enter__(),
    ):
        with pytest.raises(ValueError, match="expected adapters that are not merged, got 'all' in"):
            action()
    torch.testing.assert_close(model(x), y, rtol=1e-11, atol=1e-11)
    model.save_pretrained(tmp_path / "merged")
    model.to_lora(tmp_path / "lora")
    model.merge_and_unload()
    for action in (
        lambda: model.save_pretrained(tmp_path / "unloaded"),
        lambda: model.to_lora(tmp_path / "unloaded"),
        lambda: model.adapter_parameters("all"),
    ):
        with pytest.raises(ValueError, match="expected adapters that are loaded; unmerge"):
            action()
    assert not (tmp_path / "unloaded").exists()
    model.unmerge()
    assert torch.equal(model(x), y)
    again = adapted(Net().double(), {})
    again.model.load_state_dict({k.replace(".base_layer", ""): v for k, v in _base(model).items()})
    again.load_adapter(tmp_path / "merged", "all")
    torch.testing.assert_close(again(x), y, rtol=1e-11, atol=1e-11)


def _base(model):
    return reference.separate(model, BASE).state_dict()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["all", "dvora", "mixed"])
def test_what_is_not_finite_is_refused_and_all_is_as_it_was(bad, name):
    model = adapted(Net().double())
    model.set_adapter("twin")
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    y = model(x)
    last = list(model._adapters.targets(name).values())[-1]
    vectors = list(last.vectors(name).values())
    with torch.no_grad():
        vectors[-1][3] = bad
    before = weights(model)
    with pytest.raises(
        ValueError, match=r"merge: expected finite weights, got some that are not in (up|down)$"
    ):
        model.merge(name)
    assert_weights(model, before)
    assert model.active_adapter == "twin"
    assert model._adapters.state.merged is None
    assert torch.equal(model(x), y)
    model.merge("twin")
    model.unmerge()
    assert_weights(model, before)


def test_a_row_of_zeros_has_no_direction():
    net = Net()
    with torch.no_grad():
        net.up.weight[2] = 0
    model = adapted(net)
    with torch.no_grad():
        model.model.up.lambda_b["dvora"][2] = 0
    with pytest.raises(ValueError, match="finite weights, got some that are not in up"):
        model.merge("dvora")


class Quantised(nn.Module):
    """A linear layer of 8 bits; not the library's, but of its kind."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = linear.weight.detach().abs().max() / 127
        weight = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


class Packed(torch.Tensor):
    """As torchao's: a tensor of its own kind that says it is bfloat16."""


def packed(linear):
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Packed), requires_grad=False)
    return linear


@pytest.mark.parametrize(
    "change", [Quantised, packed, weight_norm], ids=["int8", "subclass", "weight_norm"]
)
def test_quantised_weights_and_computed_ones_are_refused(change):
    net = Net()
    net.down = change(net.down)
    configs = {k: CONFIGS[k] for k in ("all", "dvora")}
    model = adapted(net, configs)
    x = torch.randn(2, 5, 12)
    y = model(x)
    before = weights(model)
    with pytest.raises(ValueError, match="merge: expected floating-point base weights, got down"):
        model.merge()
    assert_weights(model, before)
    assert torch.equal(model(x), y)
    model.model.down = model.model.down.base_layer  # the adapter's other layers can be merged
    model.merge()


def test_layers_that_are_called_are_merged_if_they_do_no_more_than_their_weight():
    calls = []
    net = Net()
    hook = net.up.register_forward_hook(lambda *_: calls.append(1))
    model = adapted(net)
    x = torch.randn(2, 5, 12)
    for name in ("all", "dvora"):
        model.set_adapter(name)
        y = model(x)
        model.merge()
        calls.clear()
        torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)
        assert len(calls) == 1
        model.unmerge()
        assert torch.equal(model(x), y)
    hook.remove()
    net.up.base_layer.register_forward_hook(lambda _, inputs, y: 2 * y)
    y = model(x)
    before = weights(model)
    with pytest.raises(ValueError, match="by their weight and do no more, got up"):
        model.merge()
    assert_weights(model, before)
    assert torch.equal(model(x), y)


def test_a_weight_that_another_module_has_too_is_left_to_it():
    """A language model's output layer, tied to its embeddings."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.out = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
            self.out.weight = self.table.weight

        def forward(self, tokens):
            return self.out(self.table(tokens))

    net = Tied().double()
    tokens = torch.randint(0, 9, (3, 4))
    model = adapted(net, {"a": VeraConfig(r=4, target_modules=["out"])})
    y, table = model(tokens), net.table.weight.detach().clone()
    model.merge()
    assert torch.equal(net.table.weight, table)
    torch.testing.assert_close(model(tokens), y, rtol=1e-12, atol=1e-12)
    model.unmerge()
    assert net.out.base_layer.weight is net.table.weight
    assert torch.equal(model(tokens), y)


@pytest.mark.parametrize(
    "change", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_a_copy_of_a_merged_model_can_be_unmerged(change):
    model = adapted(Net().double())
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    y, before = model(x), weights(model)
    for unload in (False, True):
        model.merge("all")
        if unload:
            model.merge_and_unload()
        other = change(model)
        other.unmerge()
        assert_weights(other, before)
        assert torch.equal(other(x), y)
        assert not torch.equal(model(x), y)
        model.unmerge()
        assert torch.equal(model(x), y)


def test_a_cast_while_it_is_merged_is_one_of_the_originals_too():
    model = adapted(Net().double())
    expected = weights(copy.deepcopy(model).float())
    model.merge("dvora")
    model.float()
    model(torch.randn(2, 5, 12))
    model.unmerge()
    assert_weights(model, expected)


def test_gradients_flow_through_a_merged_model():
    model = adapted(Net().double())
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    found = []
    for merge in (False, True):
        if merge:
            model.merge()
        leaf = x.clone().requires_grad_()
        model(leaf).square().sum().backward()
        found.append(leaf.grad)
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


def test_small_updates_are_rounded_away_over_bfloat16_as_documented():
    model = adapted(Net().bfloat16(), {"all": CONFIGS["all"]})
    for layer in model._adapters.layers().values():
        layer.lambda_b["all"].data.fill_(1e-5)
    before = weights(model)
    model.merge()
    for path in ("q", "up"):
        key = f"model.{path}.base_layer.weight"
        changed = weights(model)[key] != before[key]
        assert (before[key][changed].abs() < 0.01).all()
        assert changed.float().mean() < 0.1


def small(seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.5), nn.Linear(5, 4)).double()
    model = get_vera_model(net, VeraConfig(r=3, target_modules=["0"], vera_dropout=0.5))
    for parameter in model.adapter_parameters("default"):
        parameter.data.normal_()
    return model


def test_another_than_what_is_merged_is_not_unloaded():
    model = small()
    model.add_adapter("b", VeraConfig(r=3, target_modules=["0"]))
    model.merge("default")
    for name in ("b", "unknown"):
        with pytest.raises(ValueError, match=rf"expected 'default', which is merged, got '{name}'"):
            model.merge_and_unload(name)
    assert type(model.model[0]).__name__ == "VeraLayer"


def test_what_was_unloaded_comes_back_in_the_mode_of_the_model():
    model, x = small().train(), torch.randn(3, 6, dtype=torch.float64)
    model.merge_and_unload()
    model.eval()
    expected = model(x)
    model.unmerge()
    assert not model.model[0].training
    torch.testing.assert_close(model(x), expected)


def test_unmerge_leaves_alone_what_was_put_into_the_unloaded_model():
    model, x = small().eval(), torch.randn(3, 6, dtype=torch.float64)
    bare = model.merge_and_unload()
    other = get_vera_model(bare, VeraConfig(r=3, target_modules=["0"], init_weights=False))
    expected = other(x)
    with pytest.raises(ValueError, match="expected the model that merge_and_unload left, got Vera"):
        model.unmerge()
    assert torch.equal(other(x), expected)
