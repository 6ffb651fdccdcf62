"""Gradients and features are those of the written-out losses, by torch.func, in float64."""

import pytest
import torch
from fungi_losses import LIBRARY, PAPER, materialised, unit, whole_gradients
from fungi_models import LAST, small_vit
from torch.nn import functional as F

import fmkernels
from fmkernels.api import DINO, KL, FungiExtractor, ImageViews, SimCLR

VIEWS = ImageViews(size=16, local_crops=3, stride_scale=2)
OBJECTIVES = {"KL": KL(32), "DINO": DINO(48), "SimCLR": SimCLR(20)}
KINDS = {"KL": "plain", "DINO": "crops", "SimCLR": "patches"}


def images(count=3):
    return torch.rand(count, 3, 21, 30)


def extractor_of(model, name, preset=PAPER, target=LAST, **settings):
    views = settings.pop("views", VIEWS)
    extractor = FungiExtractor(
        model, target, [OBJECTIVES[name]], preset=preset, views=views, **settings
    )
    return extractor.fit_negatives(list(images(4)))


def expected_gradients(extractor, batch, name, preset, model, **settings):
    kind = KINDS[name]
    made = extractor._views(kind, batch, range(len(batch)))
    dtype = next(model.parameters()).dtype
    views = made.to(dtype).unflatten(0, (len(batch), -1))
    state = extractor.state_dict()
    return whole_gradients(
        model,
        extractor.backbone.target_layer,
        views,
        name,
        preset,
        state["heads"][name],
        state["negatives"].get(name),
        **settings,
    )


@pytest.mark.parametrize("preset", [PAPER, LIBRARY])
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_gradients_are_those_of_the_written_out_loss(name, preset, pool):
    model = small_vit(torch.float64, pool=pool)
    extractor = extractor_of(model, name, preset)
    batch = images()
    found = extractor.gradients(batch)[name]
    expected = expected_gradients(extractor, batch, name, preset, model)
    torch.testing.assert_close(materialised(found), expected, rtol=1e-9, atol=1e-14)
    rows = VIEWS.counts[KINDS[name]] * (1 if pool == "cls" else 17)
    assert found[0].shape[1] == rows  # only the CLS token's where only it is used


@pytest.mark.parametrize("preset", [PAPER, LIBRARY])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_features_are_the_materialised_product(name, preset):
    model = small_vit(torch.float64)
    for projection in ("count", "rademacher", "khatri_rao"):
        extractor = extractor_of(model, name, preset, projection=projection)
        batch = images()
        features = extractor(batch)
        matrix = extractor.state.projection.materialize().double()
        gradients = expected_gradients(extractor, batch, name, preset, model)
        embeddings = model(extractor._views("plain", batch, range(3)).double()).detach()
        expected = torch.cat([unit(embeddings), unit(gradients.flatten(1) @ matrix.T)], dim=1)
        assert features.dtype == torch.float32
        torch.testing.assert_close(
            features.double(), expected, rtol=0, atol=3e-6
        )  # sums in float32


def test_the_objectives_in_one_extractor_are_those_of_three():
    model = small_vit()
    batch, bank = images(), list(images(4))
    together = FungiExtractor(model, LAST, list(OBJECTIVES.values()), views=VIEWS)
    features = together.fit_negatives(bank)(batch)
    assert features.shape == (3, 4 * 24)
    blocks = [FungiExtractor(model, LAST, [], views=VIEWS)(batch)]
    for objective in OBJECTIVES.values():
        alone = FungiExtractor(model, LAST, [objective], views=VIEWS, embedding=False)
        blocks.append(alone.fit_negatives(bank)(batch))
    torch.testing.assert_close(features, torch.cat(blocks, dim=1), rtol=0, atol=1e-5)
    torch.testing.assert_close(features.unflatten(1, (4, 24)).norm(dim=2), torch.ones(3, 4))


def test_features_do_not_depend_on_the_batch_or_on_its_chunks():
    batch = images(5)
    whole = FungiExtractor(small_vit(), LAST, list(OBJECTIVES.values()), views=VIEWS)
    whole.fit_negatives(list(images(4)))
    split = FungiExtractor(small_vit(), LAST, list(OBJECTIVES.values()), views=VIEWS, batch_size=1)
    split.load_state_dict(whole.state_dict())
    features = whole(batch)
    torch.testing.assert_close(split(batch), features, rtol=0, atol=1e-5)
    torch.testing.assert_close(whole(batch[3:], numbers=[3, 4]), features[3:], rtol=0, atol=1e-5)
    other_crops = whole(batch[3:])[:, 48:72]
    assert (other_crops - features[3:, 48:72]).abs().max() > 1e-2


def test_exact_similarity_is_the_product_of_the_gradients():
    extractor = FungiExtractor(small_vit(), LAST, [KL(32), DINO(48)], views=VIEWS)
    found = extractor.gradients(images())
    for factors in found.values():
        flat = materialised(factors).flatten(1)
        similarity = fmkernels.gradient_similarity(*factors, *factors)
        scale = float((flat @ flat.T).abs().max())
        torch.testing.assert_close(similarity, flat @ flat.T, rtol=1e-4, atol=1e-5 * scale)


def test_a_projection_of_ones_own():
    sketch = fmkernels.Kronecker(24, 24, 30, dims=(5, 6))
    extractor = FungiExtractor(small_vit(), LAST, [KL(32)], views=VIEWS, projection=sketch)
    batch = images()
    gradients = materialised(extractor.gradients(batch)["KL"]).flatten(1)
    expected = F.normalize(gradients.double() @ sketch.materialize().double().T, dim=1)
    torch.testing.assert_close(extractor(batch)[:, 24:].double(), expected, rtol=0, atol=1e-4)


def test_a_layer_without_bias():
    model = small_vit()
    model.blocks[1].attn.proj.bias = None
    extractor = FungiExtractor(model, LAST, [KL(32)], views=VIEWS)
    batch = images()
    features = extractor(batch)[:, 24:]
    matrix = extractor.state.projection.materialize()
    assert matrix.shape == (24, 24 * 24)
    delta, activation = extractor.gradients(batch)["KL"]
    expected = torch.einsum("bso,bsi->boi", delta, activation).flatten(1) @ matrix.T
    torch.testing.assert_close(features, F.normalize(expected, dim=1), rtol=0, atol=1e-5)


def test_the_library_s_normalizer_turns_the_gradient():
    """How far depends on the model."""
    batch, found = images(), []
    for preset in (PAPER, LIBRARY):
        extractor = FungiExtractor(
            small_vit(), LAST, [SimCLR(20, negatives=4)], preset=preset, views=VIEWS
        )
        extractor.fit_negatives(list(batch))
        found.append(materialised(extractor.gradients(batch)["SimCLR"]).flatten(1))
    cosines = F.cosine_similarity(*found)
    assert (cosines < 0.9999).all()
