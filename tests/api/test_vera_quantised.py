"""VeRA and DVoRA over base layers without a weight that can be read: quantised ones, and others."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from vera_models import randomize_vectors

from fmkernels.api import VeraConfig, get_vera_model

INPUTS, OUTPUTS = 128, 10


class FourBit(nn.Module):
    """Like bitsandbytes': two numbers in a byte, in one column, and a scale for each output."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        scale = weight.abs().amax(dim=1, keepdim=True) / 7
        codes = (weight / scale).round().to(torch.int8).add(8).to(torch.uint8).flatten()
        self.weight = nn.Parameter((codes[::2] * 16 + codes[1::2]).unsqueeze(1), False)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def dequantised(self):
        high_low = torch.stack([self.weight // 16, self.weight % 16], dim=-1).flatten()
        codes = high_low.view(self.out_features, self.in_features).to(torch.int8) - 8
        return codes.to(self.scale.dtype) * self.scale

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.dequantised().to(x.dtype), bias)


class EightBit(nn.Module):
    """Its weight has a shape, and no attribute says how many inputs there are."""

    def __init__(self, linear):
        super().__init__()
        self.scale = linear.weight.detach().abs().max() / 127
        self.weight = nn.Parameter((linear.weight / self.scale).round().to(torch.int8), False)
        self.bias = linear.bias

    def dequantised(self):
        return self.weight * self.scale

    forward = FourBit.forward


class WithoutWeight(nn.Module):
    """Nothing to be read at all."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._own = [linear.requires_grad_(False)]

    def dequantised(self):
        return self._own[0].weight

    def forward(self, x):
        return F.linear(x, self._own[0].weight.to(x.dtype), self._own[0].bias.to(x.dtype))


KINDS = [FourBit, EightBit, WithoutWeight]


def pair(kind, dora, bias=True, dtype=torch.float32):
    """A model over such layers, and one over linear layers with the same weights."""
    torch.manual_seed(1)
    linears = [nn.Linear(INPUTS, OUTPUTS, bias), nn.Linear(OUTPUTS, INPUTS)]
    quantised = [kind(linear) for linear in linears]
    plain = [nn.Linear(INPUTS, OUTPUTS, bias), nn.Linear(OUTPUTS, INPUTS)]
    for own, other, linear in zip(plain, quantised, linears, strict=True):
        own.weight.data = other.dequantised().detach().clone()
        if own.bias is not None:
            own.bias.data = linear.bias.detach().clone()
    models = []
    for layers in (quantised, plain):
        base = nn.Sequential(layers[0], nn.Tanh(), layers[1])
        model = get_vera_model(base, VeraConfig(r=4, target_modules=["0", "2"], use_dora=dora))
        model.add_adapter("second", VeraConfig(r=3, target_modules=["2"]))
        models.append(randomize_vectors(model))
    return models


def results(model, x, **settings):
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x, **settings)
    y.square().sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [y.detach(), x.grad, *gradients]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("names", [None, ["second", "default", "__base__", "default"]])
def test_the_same_as_over_the_dequantised_weights(kind, dora, names):
    quantised, plain = pair(kind, dora)
    x = torch.randn(4, 3, INPUTS)
    found, expected = (results(m, x, adapter_names=names) for m in (quantised, plain))
    vectors = 4 + 2 * dora + (2 if names else 0)
    assert len(found) == 2 + vectors
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        base = plain.model[2].base_layer(torch.tanh(plain.model[0].base_layer(x)))
    assert not torch.allclose(found[0], base, atol=0.1)


@pytest.mark.parametrize("dora", [False, True])
def test_a_step_of_training_and_a_file(dora, tmp_path):
    """The norms of DVoRA follow the vectors; the quantised weights are left as they were."""
    quantised, plain = pair(FourBit, dora)
    before = quantised.model[0].base_layer.weight.clone()
    x = torch.randn(4, INPUTS)
    for model in (quantised, plain):
        optimizer = torch.optim.AdamW(model.adapter_parameters("default"), lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(quantised(x), plain(x))
    assert torch.equal(quantised.model[0].base_layer.weight, before)
    quantised.save_pretrained(tmp_path)
    again = pair(FourBit, dora)[0]
    again.load_adapter(tmp_path, "third")
    again.set_adapter("third")
    torch.testing.assert_close(again(x), quantised(x))


@pytest.mark.parametrize("kind", KINDS)
def test_refused_to_merge(kind):
    quantised, _ = pair(kind, dora=False)
    x = torch.randn(4, INPUTS)
    before = quantised(x)
    with pytest.raises(ValueError, match="merge: expected floating-point base weights"):
        quantised.merge()
    assert torch.equal(quantised(x), before)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16(dora, autocast):
    """Of the dtype of nn.Linear's output; about as far from float32 as over linear layers."""
    quantised, plain = pair(FourBit, dora)
    x = torch.randn(16, INPUTS)
    expected = plain(x)
    own = x if autocast else x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, same = quantised(own), plain(own)
    assert found.dtype == same.dtype == torch.bfloat16
    error, allowed = ((y.float() - expected).norm() for y in (found, same))
    assert error < 2 * allowed < 0.1 * expected.norm()


@pytest.mark.parametrize("dora", [False, True])
def test_compiled(dora):
    quantised, _ = pair(FourBit, dora)
    x = torch.randn(4, INPUTS)
    # what is asked of the layer is asked in eager mode
    expected = results(quantised, x)
    compiled = torch.compile(quantised, fullgraph=True, backend="aot_eager")
    compiled.zero_grad()
    y = compiled(x)
    y.square().sum().backward()
    gradients = [p.grad for p in quantised.parameters() if p.grad is not None]
    torch.testing.assert_close([y.detach(), *gradients], [expected[0], *expected[2:]])
    torch._dynamo.reset()


def over_dense(model):
    """The same adapter over linear layers with the weights that the quantised ones multiply by."""
    layers = []
    for layer in (model.model[0], model.model[2]):
        base = layer.base_layer
        # to ask without a gradient would make bitsandbytes pack the weight for inference alone
        bias = base(torch.zeros(1, layer.in_features, requires_grad=True)).detach()
        weight = (base(torch.eye(layer.in_features).requires_grad_()).detach() - bias).mT
        linear = nn.Linear(layer.in_features, layer.out_features)
        linear.weight.data, linear.bias.data = weight.contiguous(), bias[0]
        layers.append(linear)
    config = model.adapters["default"]
    dense = get_vera_model(nn.Sequential(layers[0], nn.Tanh(), layers[1]), config)
    return randomize_vectors(dense)


def assert_follows(model, tolerance):
    """Beside linear layers; of what these libraries round inside, tolerance is the share."""
    dense, x = over_dense(model), torch.randn(4, INPUTS)
    for names in (None, ["default", "__base__", "default", "__base__"]):
        pairs = zip(*(results(m, x, adapter_names=names) for m in (model, dense)), strict=True)
        for found, expected in pairs:
            assert (found - expected).norm() <= tolerance * expected.norm()


def loaded(layers, factory):
    """Layers of a library, with the weights of linear ones, which they quantise when moved."""
    torch.manual_seed(1)
    quantised = []
    for inputs, outputs in layers:
        layer = factory(inputs, outputs)
        layer.load_state_dict(nn.Linear(inputs, outputs).state_dict())
        quantised.append(layer.to("cpu"))
    return nn.Sequential(quantised[0], nn.Tanh(), quantised[1])


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_four_bits_of_bitsandbytes(dora, training):
    library = pytest.importorskip("bitsandbytes")

    def factory(*sizes):
        return library.nn.Linear4bit(*sizes, compute_dtype=torch.float32, quant_type="nf4")

    base = loaded([(INPUTS, 64), (64, INPUTS)], factory).train(training)
    config = VeraConfig(r=4, target_modules=["0", "2"], use_dora=dora)
    assert_follows(randomize_vectors(get_vera_model(base, config)), 1e-5)


@pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning")
@pytest.mark.parametrize("dora", [False, True])
def test_eight_bits_of_bitsandbytes(dora):
    """They round the inputs to 8 bits too, and compute in half precision."""
    library = pytest.importorskip("bitsandbytes")

    def factory(*sizes):
        return library.nn.Linear8bitLt(*sizes, has_fp16_weights=False)

    base = loaded([(INPUTS, 64), (64, INPUTS)], factory)
    config = VeraConfig(r=4, target_modules=["0", "2"], use_dora=dora)
    assert_follows(randomize_vectors(get_vera_model(base, config)), 0.02)


@pytest.mark.parametrize("dora", [False, True])
def test_eight_bits_of_torchao(dora):
    library = pytest.importorskip("torchao.quantization")
    torch.manual_seed(1)
    base = nn.Sequential(nn.Linear(INPUTS, 64), nn.Tanh(), nn.Linear(64, INPUTS))
    library.quantize_(base, library.Int8WeightOnlyConfig())
    config = VeraConfig(r=4, target_modules=["0", "2"], use_dora=dora)
    model = randomize_vectors(get_vera_model(base, config))
    assert type(model.model[0].base_layer.weight) is not nn.Parameter
    assert_follows(model, 1e-5)
