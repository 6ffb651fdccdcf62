"""bfloat16 on a CPU that multiplies it, and passes of a size that suits the memory."""

import pytest
import torch
from fungi_models import LAST, small_vit
from torch import nn
from torch.nn import functional as F

from fmkernels import _inference
from fmkernels.api import DINO, KL, FungiExtractor, ImageViews, SimCLR
from fmkernels.testing import assert_parity

VIEWS = ImageViews(size=16, local_crops=2, stride_scale=2)
CPU = torch.device("cpu")


@pytest.fixture(params=["as it is", "with the instructions"])
def native(request, monkeypatch):
    """Everywhere, what a CPU with AVX512-BF16 and without AMX does."""
    if request.param == "with the instructions":
        monkeypatch.setattr(_inference, "has_fast_bfloat16", lambda: True)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return request.param


def extractor_of(model, **settings):
    objectives = [KL(32), DINO(16), SimCLR(20, negatives=2)]
    extractor = FungiExtractor(model, LAST, objectives, views=VIEWS, **settings)
    draw = torch.Generator().manual_seed(1)
    return extractor.fit_negatives(list(torch.rand(2, 3, 16, 16, generator=draw)))


def test_features_in_bfloat16_are_those_in_float32(native):
    """Negatives are made in bfloat16, too."""
    model, batch = small_vit(depth=2), torch.rand(3, 3, 16, 16)
    exact, low = extractor_of(model), extractor_of(model, dtype=torch.bfloat16)
    pairs = zip(*(x(batch).split(24, dim=1) for x in (exact, low)), strict=True)
    assert all((F.cosine_similarity(*pair) > 0.999).all() for pair in pairs)


def test_weights_that_change_between_two_calls_are_seen(native):
    model, batch = small_vit(), torch.rand(2, 3, 16, 16)
    extractor = extractor_of(model, dtype=torch.bfloat16)
    before = extractor(batch)
    model.blocks[0].mlp[0].weight.data.mul_(2)  # which its version does not show
    after = extractor(batch)
    assert not torch.equal(after, before)
    again = extractor_of(model, dtype=torch.bfloat16)
    again.load_state_dict(extractor.state_dict())
    assert torch.equal(again(batch), after)


def test_the_model_s_own_weights_stay_in_float32(native):
    model = small_vit()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    extractor_of(model, dtype=torch.bfloat16)(torch.rand(2, 3, 16, 16))
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, before[name])
    assert model(torch.rand(1, 3, 16, 16)).dtype == torch.float32


def test_weights_are_cast_once_in_a_call(monkeypatch):
    model, batch = small_vit(), torch.rand(5, 3, 16, 16)
    extractor = extractor_of(model, dtype=torch.bfloat16, batch_size=4)
    monkeypatch.setattr(_inference, "has_fast_bfloat16", lambda: True)
    cast, seen = _inference._cast, []
    monkeypatch.setattr(_inference, "_cast", lambda weight: seen.append(weight) or cast(weight))
    extractor(batch)
    linear = {id(p) for module in model.modules() if isinstance(module, nn.Linear)
              for p in module.parameters()}  # fmt: skip
    assert {id(weight) for weight in seen} == linear
    assert len(seen) <= len(linear) + 3  # the last block's, that a gradient passes through, twice


def heads(*shape, offset=0.0, dtype=torch.float64):
    """Q, K and V as a model has them: parts of one tensor."""
    found = torch.randn(shape[0], shape[2], 3, shape[1], shape[3], dtype=torch.float64)
    found[:, :, 1] += offset
    return found.to(dtype).permute(2, 0, 3, 1, 4).unbind(0)


@pytest.mark.parametrize("offset", [0.0, 5.0])
@pytest.mark.parametrize("shape", [(5, 3, 197, 64), (2, 2, 7, 33), (1, 1, 1, 8), (3, 2, 700, 16)])
def test_attention_errs_at_most_twice_as_much_as_written_out(shape, offset):
    """As models without a fused one have it; PyTorch's fused one keeps scores in float32."""
    tensors = heads(*shape, offset=offset)
    halves = [each.bfloat16() for each in tensors]
    for scale in (None, 0.3):
        exact = F.scaled_dot_product_attention(*(each.double() for each in halves), scale=scale)
        found = _inference.attention(*halves, scale=scale)
        assert found.dtype == torch.bfloat16
        assert_parity(found, written_out(*halves, scale), exact)


def written_out(q, k, v, scale):
    return (q * (scale or q.shape[-1] ** -0.5) @ k.mT).softmax(dim=-1) @ v


def test_attention_of_float32_under_autocast():
    tensors = heads(2, 3, 20, 8, dtype=torch.float32)
    assert _inference.attention(*tensors) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = _inference.attention(*tensors)
        theirs = F.scaled_dot_product_attention(*tensors)
    assert found.dtype == theirs.dtype == torch.bfloat16
    exact = F.scaled_dot_product_attention(*(each.double() for each in tensors))
    assert_parity(found, theirs, exact)


def test_attention_that_is_left_to_pytorch():
    q, k, v = heads(2, 3, 20, 8, dtype=torch.bfloat16)
    attend = _inference.attention
    assert attend(q, k, v, attn_mask=torch.ones(20, 20, dtype=torch.bool)) is None
    assert attend(q, k, v, dropout_p=0.1) is None
    assert attend(q, k, v, is_causal=True) is None
    assert attend(q, k, v, enable_gqa=True) is None
    assert attend(q[0], k[0], v[0]) is None
    assert attend(q.requires_grad_(), k, v) is None
    long = torch.zeros(1, 1, _inference.LONGEST + 1, 8, dtype=torch.bfloat16)
    assert attend(long, long, long) is None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 5, 33), (7, 33), (0, 33), (1, 33)])
def test_linear_layers_err_at_most_twice_as_much_as_pytorch_s(shape, bias):
    layer, x = nn.Linear(33, 17, bias=bias), torch.randn(shape)
    halves = {}
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        found = _inference.linear(halves, x, layer.weight, layer.bias)
        again = _inference.linear(halves, x, layer.weight, layer.bias)
        theirs = layer(x)
    assert found.shape == theirs.shape
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, again)
    if x.numel():
        assert_parity(found, theirs, layer.double()(x.double()).detach())


def test_linear_layers_of_another_precision_are_pytorch_s():
    layer, x = nn.Linear(33, 17), torch.randn(4, 33)
    halves = {}
    assert torch.equal(_inference.linear(halves, x, layer.weight, layer.bias), layer(x))
    with torch.autocast("cpu", dtype=torch.float16):
        assert torch.equal(_inference.linear(halves, x, layer.weight, layer.bias), layer(x))
    assert not halves


def test_a_gradient_passes_through_linear_layers():
    layer, x = nn.Linear(33, 17), torch.randn(4, 33, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = _inference.linear({}, x, layer.weight, layer.bias)
        theirs = layer(x)
    (found,), (expected,) = (torch.autograd.grad(each.sum(), x) for each in (ours, theirs))
    assert torch.equal(found, expected)


def test_passes_are_as_long_as_the_memory_likes(monkeypatch):
    assert _inference.pass_size(torch.empty(64, 3, 224, 224)) == 13
    assert _inference.pass_size(torch.empty(2, 3, 2000, 2000)) == 1
    assert _inference.pass_size(torch.empty(64, 3, 224, 224, device="meta")) == 64
    assert _inference.pass_size(torch.empty(0, 3, 8, 8)) == 1
    model, batch, seen = small_vit(), torch.rand(3, 3, 16, 16), []
    extractor = extractor_of(model)
    expected = extractor(batch)
    monkeypatch.setattr(_inference, "NUMBERS_OF_A_PASS", 5 * 3 * 16 * 16)
    model.embed.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    torch.testing.assert_close(extractor(batch), expected, rtol=0, atol=1e-5)
    assert seen == [3, 5, 5, 2, *(5,) * 5, 2]  # plain views, 12 crops, 27 patches
