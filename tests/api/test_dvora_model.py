"""DVoRA in a model: magnitudes trained, norms computed again, files, copies, mixed with others."""

import copy
import pickle

import pytest
import torch
import vera_reference as reference
from vera_reference import BASE, DTYPES, Net, adapted, check_same, of_several

from fmkernels.api import VeraConfig, VeraModel, get_vera_model
from fmkernels.api.vera_layer import VeraLayer

TARGETS = ["q", "k", "v", "up", "down"]
CONFIG = VeraConfig(r=4, target_modules=TARGETS, use_dora=True)
MIXED = {
    "dvora": CONFIG,
    "other": VeraConfig(r=4, target_modules=["q", "up"], use_dora=True),
    "vera": VeraConfig(r=4, target_modules=TARGETS),
    "wide": VeraConfig(r=20, target_modules=TARGETS, use_dora=True, modules_to_save=["head"]),
}
MODELS = 4
"""With weights of their own, of one case."""
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
every_kind = pytest.mark.parametrize("conv", [False, True], ids=["Linear", "Conv1D"])


def inputs(rows=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(4)
    sizes = (rows, 5, 12), (rows, 5, 3)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in sizes]


def is_reference(model, name, x):
    expected = reference.separate(model, name)(x)
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-11)


@every_dtype
@every_kind
@pytest.mark.parametrize("name", list(MIXED))
def test_values_and_gradients_are_the_formula_s(dtype, conv, name):
    """Of the magnitudes too; norms without a gradient."""
    x, grad = inputs(dtype=dtype)
    found, plain, exact = [], [], []
    for seed in range(1, 1 + MODELS):
        model = adapted(Net(conv).to(dtype), MIXED, seed)
        model.set_adapter(name)
        leaf = x.clone().requires_grad_()
        y = model(leaf)
        y.backward(grad)
        found.append({"y": y.detach(), "x": leaf.grad, **reference.gradients_of(model)})
        given = model, [name] * len(x), x, grad
        plain.append(reference.rows_by_separate_models(*given, dtype))
        exact.append(reference.rows_by_separate_models(*given, torch.float64))
    check_same(*(of_several(results) for results in (found, plain, exact)), dtype)
    kinds = {key[2] for key in exact[0] if isinstance(key, tuple)}
    assert ("magnitude" in kinds) == (name != "vera")


@every_dtype
@every_kind
def test_rows_of_vera_dvora_and_none(dtype, conv):
    model = adapted(Net(conv).to(dtype), MIXED)
    names = ["dvora", BASE, "vera", "wide", "other", "dvora"]
    x, grad = inputs(dtype=dtype)
    leaf = x.clone().requires_grad_()
    y = model(leaf, adapter_names=names)
    y.backward(grad)
    found = {"y": y.detach(), "x": leaf.grad, **reference.gradients_of(model)}
    given = model, names, x, grad
    exact = reference.rows_by_separate_models(*given, torch.float64)
    check_same(found, reference.rows_by_separate_models(*given, dtype), exact, dtype)


@every_kind
def test_it_starts_as_the_base_model(conv):
    net = Net(conv).double()
    x, _ = inputs()
    y = net(x)
    model = get_vera_model(net, CONFIG)
    torch.testing.assert_close(model(x), y, rtol=1e-12, atol=1e-12)
    for layer in model._adapters.layers().values():
        weight = layer.base_layer.weight.mT if conv else layer.base_layer.weight
        torch.testing.assert_close(
            layer.magnitude["default"], weight.norm(dim=1), rtol=1e-13, atol=0.0
        )
        assert layer.magnitude["default"].requires_grad


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.03),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.03, fused=True),
    "foreach": lambda p: torch.optim.AdamW(p, lr=0.03, foreach=True),
}


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
@pytest.mark.parametrize("rows", [False, True], ids=["active", "rows"])
def test_norms_are_those_of_the_vectors_after_every_step(optimizer, rows):
    """Training is that of the formula, step for step."""
    model = adapted(Net().double(), {"dvora": CONFIG})
    exact = reference.separate(model, "dvora")
    x, target = inputs()
    names = ["dvora"] * len(x) if rows else None
    runs = []
    for net, own in ((model, {"adapter_names": names}), (exact, {})):
        parameters = [p for p in net.parameters() if p.requires_grad]
        step, losses = OPTIMIZERS[optimizer](parameters), []
        for _ in range(8):
            step.zero_grad()
            loss = (net(x, **own) - target).square().mean()
            loss.backward()
            step.step()
            losses.append(loss.detach())
        runs.append(torch.stack(losses))
    torch.testing.assert_close(*runs, rtol=1e-10, atol=1e-12)
    assert runs[0][-1] < runs[0][0]
    is_reference(model, "dvora", x)


def changed_weight(layer):
    with torch.no_grad():
        layer.base_layer.weight.mul_(1.5)


def replaced_data(layer):
    layer.base_layer.weight.data = layer.base_layer.weight.data * 1.5


def replaced_weight(layer):
    layer.base_layer.weight = torch.nn.Parameter(layer.base_layer.weight * 1.5)


def loaded_weight(layer):
    layer.base_layer.load_state_dict({k: v * 1.5 for k, v in layer.base_layer.state_dict().items()})


def assigned_weight(layer):
    state = {k: v * 1.5 for k, v in layer.base_layer.state_dict().items()}
    layer.base_layer.load_state_dict(state, assign=True)


def vectors_through_data(layer):
    layer.lambda_d["dvora"].data.mul_(1.5)
    layer.lambda_b["dvora"].data = layer.lambda_b["dvora"].data * 0.5


@every_kind
@pytest.mark.parametrize("hooked", [False, True], ids=["read", "called"])
@pytest.mark.parametrize(
    "change",
    [
        changed_weight,
        replaced_data,
        replaced_weight,
        loaded_weight,
        assigned_weight,
        vectors_through_data,
    ],
)
def test_norms_follow_what_was_changed(conv, hooked, change):
    model = adapted(Net(conv).double(), {"dvora": CONFIG})
    x, _ = inputs()
    if hooked:
        for layer in model._adapters.layers().values():
            layer.base_layer.register_forward_hook(lambda *_: None)
    before = model(x)
    with torch.no_grad():
        is_reference(model, "dvora", x)
    for layer in model._adapters.layers().values():
        change(layer)
    assert not torch.allclose(model(x), before, rtol=1e-3)
    is_reference(model, "dvora", x)
    model.merge()
    model.unmerge()
    is_reference(model, "dvora", x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@every_kind
def test_cast_to_another_dtype(dtype, conv):
    model = adapted(Net(conv).double(), {"dvora": CONFIG})
    x, grad = inputs()
    model(x)
    model.to(dtype)
    x, grad = x.to(dtype), grad.to(dtype)
    leaf = x.clone().requires_grad_()
    y = model(leaf)
    y.backward(grad)
    found = {"y": y.detach(), "x": leaf.grad, **reference.gradients_of(model)}
    given = model, ["dvora"] * len(x), x, grad
    exact = reference.rows_by_separate_models(*given, torch.float64)
    check_same(found, reference.rows_by_separate_models(*given, dtype), exact, dtype)
    model.double()
    is_reference(model, "dvora", x.double())


@pytest.mark.parametrize(
    "change", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_have_norms_of_their_own(change):
    model = adapted(Net().double(), {"dvora": CONFIG})
    x, _ = inputs()
    y = model(x)
    other = change(model)
    assert torch.equal(other(x), y)
    for layer in other._adapters.layers().values():
        changed_weight(layer)
        vectors_through_data(layer)
    is_reference(other, "dvora", x)
    assert torch.equal(model(x), y)


@every_kind
def test_files_hold_the_magnitudes(tmp_path, conv):
    net = Net(conv).double()
    fresh = copy.deepcopy(net)
    model = adapted(net, MIXED)
    x, _ = inputs()
    for name in ("dvora", "wide"):
        model.save_pretrained(tmp_path / name, name)
    again = VeraModel.from_pretrained(fresh, tmp_path / "dvora", "dvora", is_trainable=True)
    again.load_adapter(tmp_path / "wide", "wide")
    for name in ("dvora", "wide"):
        model.set_adapter(name)
        again.set_adapter(name)
        torch.testing.assert_close(again(x), model(x), rtol=1e-12, atol=1e-13)
        for path, layer in again._adapters.targets(name).items():
            own = model.model.get_submodule(path)
            assert torch.equal(layer.magnitude[name], own.magnitude[name])
            assert layer.magnitude[name].requires_grad == (name == "dvora")
    state = {key: value.clone() for key, value in model.state_dict().items()}
    magnitudes = [key for key in state if ".magnitude." in key]
    assert len(magnitudes) == 5 + 2 + 5
    third = adapted(Net(conv).double(), MIXED, seed=9)
    third.load_state_dict(state)
    third.set_adapter("wide")
    torch.testing.assert_close(third(x), model(x), rtol=1e-12, atol=1e-13)


def test_a_magnitude_of_zero_is_a_row_of_zeros():
    """And its gradient is not lost: nothing is divided by it."""
    model = adapted(Net().double(), {"dvora": CONFIG})
    with torch.no_grad():
        model.model.up.magnitude["dvora"][:4] = 0
    x, grad = inputs()
    model(x).backward(grad)
    exact = reference.rows_by_separate_models(model, ["dvora"] * len(x), x, grad, torch.float64)
    wanted = {key: value for key, value in exact.items() if not isinstance(key, str)}
    check_same(reference.gradients_of(model), wanted, wanted, torch.float64)
    assert model.model.up.magnitude["dvora"].grad[:4].all()
    is_reference(model, "dvora", x)


def test_norms_are_computed_once_for_each_step(monkeypatch):
    from fmkernels.ops.dvora_linear import norms

    calls, own = [], norms.row_norms

    def counted(*arguments):
        calls.append(1)
        return own(*arguments)

    monkeypatch.setattr(norms, "row_norms", counted)
    model = adapted(Net().double(), {"dvora": CONFIG})
    x, _ = inputs()
    optimizer = torch.optim.AdamW(model.adapter_parameters("dvora"), lr=0.01)
    layers = sum(isinstance(m, VeraLayer) for m in model.modules())
    for names in (None, ["dvora"] * len(x)):
        calls.clear()
        for _ in range(3):
            optimizer.zero_grad()
            for _ in range(4):  # gradients are accumulated
                model(x, adapter_names=names).sum().backward()
            optimizer.step()
        assert len(calls) == 3 * layers


def test_under_autocast_norms_are_not_rounded():
    model = adapted(Net(), MIXED)
    x, grad = inputs(dtype=torch.float32)
    names = ["dvora", BASE, "vera", "wide", "other", "dvora"]
    for chosen in (names, None):
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = model(leaf, adapter_names=chosen)
        y.backward(grad.bfloat16())
        found = {"y": y.detach(), "x": leaf.grad, **reference.gradients_of(model)}
        given = model, chosen or ["dvora"] * len(x), x, grad.bfloat16()
        exact = reference.rows_by_separate_models(*given, torch.float64)
        plain = reference.rows_by_separate_models(*given, torch.bfloat16)
        check_same(found, plain, exact, torch.bfloat16)
