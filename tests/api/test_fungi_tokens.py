"""Features of every patch: a sketch of each token's own gradient."""

import pytest
import torch
from fungi_losses import kl_loss, simclr_loss, unit
from fungi_models import LAST, small_vit
from torch.func import functional_call, grad
from torch.nn import functional as F

from fmkernels.api import DINO, KL, CustomViews, FungiExtractor, InContextSegmenter, SimCLR

TOKENS = 17


def extractor_of(*objectives, dtype=torch.float32, **settings):
    return FungiExtractor(
        small_vit(dtype, pool=None),
        LAST,
        objectives,
        per_token=True,
        views=CustomViews(),
        **settings,
    )


def whole_gradient(model, image, loss):
    """(out, in + 1) of a loss of the tokens (T, E)."""
    names = f"{LAST}.weight", f"{LAST}.bias"
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def of_parameters(own):
        return loss(functional_call(model, {**parameters, **own}, (image[None],))[0])

    weight, bias = grad(of_parameters)({name: parameters[name] for name in names}).values()
    return torch.cat([weight, bias.unsqueeze(1)], dim=1)


def outer(delta, activation):
    """(T, out), (T, in) -> (T, out, in + 1)"""
    return torch.einsum("to,ti->toi", delta, F.pad(activation, (0, 1), value=1))


def test_the_gradient_of_one_token_s_loss_is_that_token_s_row():
    extractor = extractor_of(KL(32), dtype=torch.float64)
    images = torch.rand(2, 3, 16, 16)
    delta, activation = extractor.gradients(images)["KL"]
    assert delta.shape == activation.shape == (2, TOKENS - 1, 24)
    model, heads = extractor.backbone.model, extractor.state_dict()["heads"]["KL"]
    for b in range(2):
        rows = outer(delta[b], activation[b])
        for token in (1, 5, 16):
            expected = whole_gradient(
                model,
                images[b].double(),
                lambda tokens, t=token: kl_loss(tokens[t : t + 1], heads, "paper"),
            )
            torch.testing.assert_close(rows[token - 1], expected, rtol=1e-9, atol=1e-16)


@pytest.mark.parametrize("preset", ["paper", "library"])
def test_infonce_over_the_tokens_against_their_neighbours(preset):
    extractor = extractor_of(
        SimCLR(20, negatives=3), dtype=torch.float64, prefix_tokens=0, neighbors=2, preset=preset
    )
    bank, images = torch.rand(3, 3, 16, 16), torch.rand(2, 3, 16, 16)
    extractor.fit_negatives(list(bank))
    delta, activation = extractor.gradients(images)["SimCLR"]
    model, heads = extractor.backbone.model, extractor.state_dict()["heads"]["SimCLR"]
    memory = extractor.state_dict()["negatives"]["SimCLR"].double()
    tokens = model(bank.double()).detach().flatten(0, 1)
    assert torch.cdist(tokens, memory).min(dim=1).values.max() < 1e-6  # all of them, in some order
    head = {name: value.double() for name, value in heads["head"].items()}
    for b in range(2):
        cosines = unit(model(images[b : b + 1].double())[0].detach()) @ unit(memory).T
        neighbours = memory[cosines.topk(2, dim=1).indices.flatten()]
        negatives = neighbours @ head["weight"].T + head["bias"]
        expected = whole_gradient(
            model,
            images[b].double(),
            lambda tokens, n=negatives: simclr_loss(tokens, heads, preset, n),
        )
        rows = outer(delta[b], activation[b])
        assert rows.shape == (TOKENS, 24, 25)
        torch.testing.assert_close(rows.sum(dim=0), expected, rtol=1e-8, atol=1e-12)


def test_features_are_tokens_and_sketches_of_norm_one():
    extractor = extractor_of(KL(32))
    images = torch.rand(3, 3, 16, 16)
    features = extractor(images)
    assert features.shape == (3, TOKENS - 1, 48)
    torch.testing.assert_close(features.norm(dim=2), torch.ones(3, TOKENS - 1))
    delta, activation = extractor.gradients(images)["KL"]
    tokens = extractor.backbone.model(images).detach()[:, 1:]
    matrix = extractor.state.projection.materialize().double()
    for b in range(3):
        gradients = outer(delta[b].double(), activation[b].double()).flatten(1)
        expected = torch.cat([unit(tokens[b].double()), unit(gradients @ matrix.T)], dim=1)
        expected = expected / 2**0.5
        torch.testing.assert_close(features[b].double(), expected, rtol=0, atol=1e-5)
    split = extractor_of(KL(32), batch_size=1)
    torch.testing.assert_close(split(images), features, rtol=0, atol=1e-5)


def test_in_context_segmentation_with_them():
    """Bright patches are told from dark ones by a model of random weights; chance is a third."""
    extractor = extractor_of(KL(32), SimCLR(20, negatives=4), neighbors=2)
    masks = (torch.rand(8, 4, 4) > 0.5).long()
    images = masks.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None] + torch.rand(8, 3, 1, 1)
    extractor.fit_negatives(list(images.float()))
    pixels = masks.repeat_interleave(4, 1).repeat_interleave(4, 2)
    pairs = [(image.float(), mask) for image, mask in zip(images, pixels, strict=True)]
    segmenter = InContextSegmenter(extractor, 2, k=3).fit(pairs[:4])
    assert segmenter.memory.features.shape == (64, 72)
    assert segmenter.evaluate(pairs[4:]).miou > 0.6


def test_extract_to_a_file(tmp_path):
    extractor = extractor_of(KL(32))
    images = list(torch.rand(5, 3, 16, 16))
    found = extractor.extract(images, tmp_path / "tokens.npy", batch_size=2)
    torch.testing.assert_close(
        torch.tensor(found), extractor(torch.stack(images)), rtol=0, atol=1e-5
    )


def test_refusals():
    with pytest.raises(ValueError, match="of plain, patches for per_token=True, got DINO"):
        extractor_of(DINO(16))
    pooled = FungiExtractor(small_vit(), LAST, [KL(16)], per_token=True, views=CustomViews())
    with pytest.raises(ValueError, match=r"pooling: expected tokens \(N, T, E\)"):
        pooled(torch.rand(1, 3, 16, 16))
    for pooling in ("cls", "mean", "pooler"):
        with pytest.raises(ValueError, match=r"pooling: expected None or a function .* got"):
            extractor_of(KL(16), pooling=pooling)
    with pytest.raises(ValueError, match=r"prefix_tokens: expected an integer from 0 .* got -1"):
        extractor_of(KL(16), prefix_tokens=-1)
    images = torch.rand(2, 3, 16, 16)
    many = extractor_of(KL(16), SimCLR(16, negatives=2), prefix_tokens=TOKENS)
    for work in (many.fit_negatives, extractor_of(KL(16), prefix_tokens=TOKENS)):
        with pytest.raises(ValueError, match="prefix_tokens: expected fewer than the 17 tokens"):
            work(images)


def test_the_objectives_that_there_are_by_default():
    """DINO's crops have no tokens."""
    whole = FungiExtractor(small_vit(pool=None), LAST, per_token=True, views=CustomViews())
    assert list(whole.objectives) == ["KL", "SimCLR"]
    assert list(FungiExtractor(small_vit(), LAST, views=CustomViews()).objectives) == ["KL"]
    assert list(FungiExtractor(small_vit(), LAST).objectives) == ["KL", "DINO", "SimCLR"]


def test_a_pooling_function_finds_the_tokens():
    images = torch.rand(2, 3, 16, 16)
    twice = extractor_of(KL(16), pooling=lambda output, views: 2 * output)
    assert twice(images).shape == (2, TOKENS - 1, 48)
