"""The model is left exactly as found, and a layer that cannot be seen into is refused."""

import sys
import threading

import pytest
import torch
from fungi_models import LAST, SmallViT, small_vit
from torch import nn

from fmkernels.api import DINO, KL, FungiExtractor, ImageViews, Objective, gradient_capture

VIEWS = ImageViews(size=16, local_crops=2, stride_scale=2)


def snapshot(model):
    return (
        [(name, module.training) for name, module in model.named_modules()],
        [(name, p.requires_grad, p.grad is None) for name, p in model.named_parameters()],
        [
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for m in model.modules()
        ],
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
    )


def assert_as_found(model, before):
    after = snapshot(model)
    assert after[:3] == before[:3]
    for name, tensor in before[3].items():
        assert torch.equal(after[3][name], tensor), name


def mixed_model():
    """Training and evaluation mode, frozen and trained parameters, a gradient."""
    model = small_vit()
    model.train()
    model.blocks[0].eval()
    model.embed.requires_grad_(False)
    model.norm.weight.grad = torch.ones(24)
    return model


def extractor_of(model, **settings):
    return FungiExtractor(model, LAST, [KL(32), DINO(16)], views=VIEWS, **settings)


def test_the_model_is_left_as_found():
    model = mixed_model()
    before = snapshot(model)
    extractor_of(model)(torch.rand(2, 3, 16, 16))
    assert_as_found(model, before)
    assert torch.equal(model.norm.weight.grad, torch.ones(24))
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["blocks.0", LAST, "norm"])
def test_also_after_an_exception(error, where):
    model = mixed_model()
    extractor = extractor_of(model)
    extractor(torch.rand(1, 3, 16, 16))

    def stop(*_):
        raise error("stop")

    handle = model.get_submodule(where).register_forward_hook(stop)
    before = snapshot(model)
    with pytest.raises(error, match="stop"):
        extractor(torch.rand(2, 3, 16, 16))
    assert_as_found(model, before)
    assert torch.is_grad_enabled()
    handle.remove()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_whatever_mode_the_caller_is_in(mode):
    model, batch = small_vit(), torch.rand(2, 3, 16, 16)
    expected = extractor_of(model)(batch)
    with mode():
        found = extractor_of(model)(batch)
        enabled = torch.is_grad_enabled()
    assert enabled == (mode is torch.enable_grad)
    assert torch.equal(found, expected)
    assert not found.requires_grad


def test_frozen_parameters_make_no_difference():
    model, batch = small_vit(), torch.rand(2, 3, 16, 16)
    expected = extractor_of(model)(batch)
    model.requires_grad_(False)
    assert torch.equal(extractor_of(model)(batch), expected)


def test_dropout_is_off():
    model, batch = small_vit(), torch.rand(2, 3, 16, 16)
    expected = extractor_of(model)(batch)
    model.norm = nn.Sequential(model.norm, nn.Dropout(0.5))
    model.train()
    assert torch.equal(extractor_of(model)(batch), expected)
    assert model.training


@pytest.fixture
def restless():
    """Threads take turns every 10 µs instead of every 5 ms."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def test_threads_share_a_model_and_an_extractor(restless):
    """Each with its own batch and an own kind of pass, over and over, in training mode."""
    model = mixed_model()
    before = snapshot(model)
    shared, own = extractor_of(model), extractor_of(model, batch_size=2)
    batches = [torch.rand(3, 3, 16, 16) for _ in range(4)]
    expected = [extractor_of(small_vit())(batch) for batch in batches]
    wrong = []

    def work(index):
        extractor = shared if index % 2 else own
        for _ in range(25):
            found = extractor(batches[index])
            if not torch.allclose(found, expected[index], rtol=0, atol=1e-5):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert_as_found(model, before)


def test_a_hook_that_is_removed_during_another_thread_s_pass():
    """PyTorch then calls it with one argument less, because it has forgotten what it takes."""
    model = small_vit()
    layer = model.get_submodule(LAST)
    with gradient_capture.capture("op", model, LAST) as record:
        (number,) = layer._forward_hooks_with_kwargs
        del layer._forward_hooks_with_kwargs[number]
        thread = threading.Thread(target=model, args=(torch.rand(2, 3, 16, 16),))
        thread.start()
        thread.join()
        layer._forward_hooks_with_kwargs[number] = True
        result = model(torch.rand(1, 3, 16, 16))
    assert record.gradient(result, torch.ones_like(result)).shape == (1, 17, 24)


def test_the_tape_begins_at_the_layer():
    """Nothing before it is kept for a backward pass."""
    model = small_vit()
    seen = []
    model.blocks[1].norm1.register_forward_hook(lambda m, a, out: seen.append(out.requires_grad))
    model.blocks[1].norm2.register_forward_hook(lambda m, a, out: seen.append(out.requires_grad))
    with gradient_capture.capture("op", model, LAST) as record:
        result = model(torch.rand(2, 3, 16, 16))
    assert seen == [False, True]
    assert result.requires_grad
    assert record.activation.shape == record.output.shape == (2, 17, 24)


class AttentionModel(nn.Module):
    """As torchvision's ViT uses it."""

    def __init__(self):
        super().__init__()
        self.self_attention = nn.MultiheadAttention(24, 2, batch_first=True)
        self.embed = nn.Conv2d(3, 24, 4, 4)

    def forward(self, images):
        x = self.embed(images).flatten(2).mT
        return self.self_attention(x, x, x, need_weights=False)[0][:, 0]


class Twice(SmallViT):
    def forward(self, images):
        return super().forward(images) + super().forward(images.flip(3))


class Unused(SmallViT):
    def __init__(self):
        super().__init__()
        self.other = nn.Linear(24, 24)

    def forward(self, images):
        result = super().forward(images)
        self.other(result)
        return result


class NoGrad(SmallViT):
    """As models are that are wrapped for inference."""

    @torch.no_grad()
    def forward(self, images):
        return super().forward(images)


class NoGradBlock(nn.Module):
    """What follows the block that has the layer is out of the graph."""

    def __init__(self):
        super().__init__()
        self.block, self.after = small_vit(), nn.Linear(24, 24)

    def forward(self, images):
        with torch.no_grad():
            x = self.block(images)
        return self.after(x)


class TokensFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.last = nn.Conv2d(3, 24, 4, 4), nn.Linear(24, 24)

    def forward(self, images):
        return self.last(self.embed(images).flatten(2).permute(2, 0, 1))[0]


@pytest.mark.parametrize(
    ("model", "layer", "message"),
    [
        (AttentionModel(), "self_attention.out_proj", "MultiheadAttention uses its weight without"),
        (Twice(), LAST, "called once in each pass, got .* which was called 2 times"),
        (Unused(), "other", "a layer that the model's result depends on, got 'other'"),
        (NoGradBlock(), f"block.{LAST}", "or the model leaves autograd off after it"),
        (TokensFirst(), "last", "with the 2 views in the first dimension"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_layers_that_cannot_be_seen_into_are_refused(model, layer, message):
    extractor = FungiExtractor(model, layer, [KL(32)], views=VIEWS)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        extractor(torch.rand(2, 3, 16, 16))
    assert_as_found(model, before)


def test_a_layer_that_is_never_called_is_refused():
    model = small_vit()
    model.spare = nn.Linear(3, 3)
    with pytest.raises(ValueError, match=r"target_layer: .* got 'spare', which was not called"):
        FungiExtractor(model, "spare", [KL(32)], views=VIEWS)(torch.rand(1, 3, 16, 16))


def test_what_is_no_linear_layer_is_refused():
    with pytest.raises(ValueError, match=r"such as 'blocks.1.attn.proj', .* got 'blocks.1.proj'"):
        FungiExtractor(small_vit(), "blocks.1.proj", [KL()])
    with pytest.raises(ValueError, match="of the model, which has none, got 'last'"):
        FungiExtractor(nn.Sequential(), "last", [KL()])
    with pytest.raises(TypeError, match=r"target_layer: expected a torch.nn.Linear, got LayerNorm"):
        FungiExtractor(small_vit(), "norm", [KL()])
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got function"):
        FungiExtractor(small_vit, LAST, [KL()])


def test_a_model_that_turns_autograd_off_gives_the_same():
    batch = torch.rand(2, 3, 16, 16)
    torch.manual_seed(7)
    assert torch.equal(extractor_of(NoGrad())(batch), extractor_of(small_vit())(batch))


def test_half_types_keep_the_direction():
    """bfloat16 has 8 bits: an error of 1/256 in a random direction is a cosine above 0.9999."""
    model, batch = small_vit(), torch.rand(4, 3, 16, 16)
    expected = extractor_of(model)(batch).unflatten(1, (3, 24))
    found = extractor_of(model, dtype=torch.bfloat16)(batch)
    assert found.dtype == torch.float32
    assert ((found.unflatten(1, (3, 24)) * expected).sum(dim=2) > 0.9999).all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(extractor_of(model)(batch), found)


def test_a_model_in_bfloat16():
    model, batch = small_vit(), torch.rand(4, 3, 16, 16)
    expected = extractor_of(model)(batch).unflatten(1, (3, 24))
    model.bfloat16()
    found = extractor_of(model)(batch)
    assert ((found.unflatten(1, (3, 24)) * expected).sum(dim=2) > 0.999).all()


def test_the_gradient_of_kl_survives_float16():
    """float16's smallest number is 6e-8, and KL's δ is below that."""
    model, batch = small_vit(), torch.rand(3, 3, 16, 16)
    exact = FungiExtractor(model, LAST, [KL(768)], views=VIEWS)
    delta = exact.gradients(batch)["KL"][0].flatten(1).double()
    assert float(delta.abs().max()) < 6e-8
    half = FungiExtractor(model, LAST, [KL(768)], views=VIEWS, dtype=torch.float16)
    found = half.gradients(batch)["KL"][0].flatten(1).double()
    norms = delta.norm(dim=1), found.norm(dim=1)
    assert ((delta * found).sum(dim=1) / (norms[0] * norms[1]) > 0.99999).all()
    torch.testing.assert_close(*norms, rtol=0.01, atol=0)


class FastPath(nn.Module):
    """In evaluation mode PyTorch fuses these layers, unless there are hooks on them."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 24, 4, 4)
        layer = nn.TransformerEncoderLayer(24, 2, 48, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, images):
        return self.layers(self.embed(images).flatten(2).mT).mean(dim=1)


def test_pytorch_s_own_transformer():
    model, batch = FastPath(), torch.rand(2, 3, 16, 16)
    extractor = FungiExtractor(model, "layers.layers.1.linear2", [KL(32)], views=VIEWS)
    delta, _ = extractor.gradients(batch)["KL"]
    views = extractor._views("plain", batch, [0, 1])
    head = extractor.state.heads["KL"]
    model.eval()
    for own, view in zip(delta, views, strict=True):
        model.zero_grad()
        extractor.objectives["KL"].loss(model(view[None])[None], head).sum().backward()
        expected = model.layers.layers[1].linear2.bias.grad
        scale = 1 / expected.norm()
        torch.testing.assert_close(own.sum(dim=0) * scale, expected * scale, rtol=0, atol=1e-5)


def test_compiled_models_are_refused():
    compiled = torch.compile(small_vit(), backend="eager")
    with pytest.raises(ValueError, match=r"not compiled.* got torch.compile of 'the model'"):
        FungiExtractor(compiled, LAST, [KL()])
    model = small_vit()
    model.blocks[0].compile(backend="eager")
    with pytest.raises(ValueError, match=r"not compiled.* got torch.compile of 'blocks.0'"):
        FungiExtractor(model, LAST, [KL()])


def test_no_pass_is_larger_than_asked_for():
    model, seen = small_vit(), []
    extractor = extractor_of(model, batch_size=9)  # of DINO's four views: those of two images
    extractor(torch.rand(1, 3, 16, 16))
    model.embed.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    extractor(torch.rand(5, 3, 16, 16))
    assert seen == [5, 8, 8, 4]


class Nothing(Objective):
    """Its gradient is zero."""

    def loss(self, embeddings, heads, negatives=None):
        return 0 * embeddings.sum(dim=(1, 2))


def test_a_gradient_of_zero_is_a_feature_of_zeros():
    extractor = FungiExtractor(small_vit(), LAST, [Nothing(3)], views=VIEWS)
    features = extractor(torch.rand(3, 3, 16, 16))
    assert torch.equal(features[:, 24:], torch.zeros(3, 24))


def test_nan_stays_in_its_image():
    batch = torch.rand(3, 3, 16, 16)
    extractor = extractor_of(small_vit())
    expected = extractor(batch)
    batch[1, 0, 4, 4] = torch.nan
    found = extractor(batch)
    assert found[1].isnan().any()
    torch.testing.assert_close(found[[0, 2]], expected[[0, 2]], rtol=0, atol=1e-5)
