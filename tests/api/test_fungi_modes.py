"""Features do not depend on the modes of the caller, on other passes, or on the user's hooks."""

import copy

import pytest
import torch
from fungi_models import LAST, small_vit
from torch import nn
from torch.nn import functional as F

from fmkernels.api import DINO, KL, CustomViews, FungiExtractor, ImageViews, SimCLR
from fmkernels.api.gradient_capture import evaluation_mode

VIEWS = ImageViews(size=16, local_crops=2, stride_scale=2)


@pytest.fixture
def bank():
    return list(torch.rand(4, 3, 20, 24))


@pytest.fixture
def images():
    return torch.rand(3, 3, 20, 24)


def extractor_of(**settings):
    objectives = [KL(32), DINO(16), SimCLR(20, negatives=3)]
    return FungiExtractor(small_vit(), LAST, objectives, views=VIEWS, **settings)


def test_negatives_that_are_made_in_inference_mode(bank, images):
    expected = extractor_of().fit_negatives(bank)(images)
    extractor = extractor_of()
    with torch.inference_mode():
        extractor.fit_negatives(bank)
        assert torch.equal(extractor(images), expected)
    assert torch.equal(extractor(images), expected)


def test_files_that_are_written_in_inference_mode(bank, images, tmp_path):
    extractor = extractor_of().fit_negatives(bank)
    fresh = FungiExtractor(small_vit(), LAST, [KL(32)], views=VIEWS)
    with torch.inference_mode():
        found = extractor.extract(list(images), tmp_path / "features.npy")
        fresh.extract(list(images), tmp_path / "first.npy")
    assert torch.equal(torch.tensor(found), extractor(images))
    assert torch.equal(fresh(images)[:, 24:], extractor(images)[:, 24:48])


def test_a_state_that_is_loaded_in_inference_mode(bank, images):
    made = extractor_of().fit_negatives(bank)
    expected = made(images)
    extractor = extractor_of()
    with torch.inference_mode():
        extractor.load_state_dict(copy.deepcopy(made.state_dict()))
    assert torch.equal(extractor(images), expected)


class Product(nn.Module):
    """What it is given has to be kept for the backward pass."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(12, 12)

    def forward(self, x):
        return x * self.layer(x)


def test_inputs_that_were_made_in_inference_mode():
    extractor = FungiExtractor(Product(), "layer", [KL(32)], views=CustomViews())
    with torch.inference_mode():
        inputs = torch.rand(3, 12) * 1
    assert torch.equal(extractor(inputs), extractor(inputs.clone()))


@pytest.fixture
def double():
    """float64 as the dtype of what is made without one."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_heads_and_crops_are_those_of_every_default_dtype(double):
    images, model = torch.rand(3, 3, 20, 24, dtype=torch.float32), small_vit(torch.float32)
    objectives = [KL(32), DINO(16)]
    found = FungiExtractor(model, LAST, objectives, views=VIEWS)(images)
    torch.set_default_dtype(torch.float32)
    expected = FungiExtractor(model, LAST, objectives, views=VIEWS)(images)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_negatives_under_the_caller_s_autocast(bank, images, dtype):
    """The model is in bfloat16 either way, its heads in float32."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = extractor_of(dtype=dtype).fit_negatives(bank)
        features = found(images)
    expected = extractor_of(dtype=torch.bfloat16).fit_negatives(bank)
    negatives = found.state.negatives["SimCLR"]
    assert negatives.dtype == torch.float32
    assert torch.equal(negatives, expected.state.negatives["SimCLR"])
    assert torch.equal(features, expected(images))


def test_tokens_under_the_caller_s_autocast():
    bank, images = list(torch.rand(4, 3, 16, 16)), torch.rand(2, 3, 16, 16)

    def features(dtype):
        objectives = [SimCLR(20, negatives=3)]
        extractor = FungiExtractor(
            small_vit(pool=None), LAST, objectives, per_token=True, views=CustomViews(), dtype=dtype
        )
        return extractor.fit_negatives(bank)(images)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = features(None)
    assert torch.equal(found, features(torch.bfloat16))


@pytest.mark.parametrize("first", [0, 1])
def test_passes_through_a_model_and_a_part_of_it(first):
    """Each needs evaluation mode to its own end, and the last one restores what there was."""
    whole = nn.Sequential(small_vit(), nn.Dropout()).train()
    whole[0].blocks[0].eval()
    before = [module.training for module in whole.modules()]
    passes = [evaluation_mode(whole), evaluation_mode(whole[0])]
    for each in passes:
        each.__enter__()
    passes[first].__exit__(None, None, None)
    assert not any(module.training for module in whole[0].modules())
    assert whole[1].training is (first == 0)
    passes[1 - first].__exit__(None, None, None)
    assert [module.training for module in whole.modules()] == before


def whole_gradient(model, extractor, images):
    """(out, in + 1) of KL, of all images together, by autograd on the layer itself."""
    views = extractor._views("plain", images, range(len(images)))
    head = extractor.state.heads["KL"]
    extractor.objectives["KL"].loss(model.eval()(views)[:, None], head).sum().backward()
    layer = model.get_submodule(LAST)
    return torch.cat([layer.weight.grad, layer.bias.grad[:, None]], dim=1)


@pytest.mark.parametrize("kind", ["before", "after"])
def test_hooks_of_the_user_that_change_what_the_layer_takes_or_gives(images, kind):
    model = small_vit()
    layer, mask = model.get_submodule(LAST), (torch.arange(24) < 12).float()
    if kind == "before":
        layer.register_forward_pre_hook(lambda module, args: (args[0] * mask,))
    else:
        layer.register_forward_hook(lambda module, args, output: output * mask)
    extractor = FungiExtractor(model, LAST, [KL(32)], views=VIEWS)
    delta, activation = extractor.gradients(images)["KL"]
    found = torch.einsum("bso,bsi->oi", delta, F.pad(activation, (0, 1), value=1))
    expected = whole_gradient(model, extractor, images)
    torch.testing.assert_close(found / expected.norm(), expected / expected.norm())
