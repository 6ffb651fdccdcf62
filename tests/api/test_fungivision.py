"""fungivision's example runs after a change of imports."""

import numpy as np
import pytest
import torch
from fungi_models import LAST, small_vit
from PIL import Image

from fmkernels import Rademacher
from fmkernels.api import (
    DINO,
    KL,
    DINOConfig,
    FungiExtractor,
    FUNGIWrapper,
    ImageViews,
    KLConfig,
    SimCLR,
    SimCLRConfig,
)


def pictures(number):
    draw = np.random.default_rng(0)
    arrays = [draw.integers(256, size=(18 + i, 20, 3), dtype=np.uint8) for i in range(number)]
    return [(Image.fromarray(array), i) for i, array in enumerate(arrays)]


def test_the_wrapper_is_the_extractor_with_the_library_s_preset():
    fungi = FUNGIWrapper(
        model=small_vit(),
        target_layer=LAST,
        device=torch.device("cpu"),
        input_dim=16,
        extractor_configs=[
            KLConfig(),
            DINOConfig(),
            SimCLRConfig(num_patches=4, stride_scale=2, comparison_batch_size=3),
        ],
    )
    dataset = pictures(5)
    fungi.setup(dataset=dataset)
    features = fungi(next(zip(*dataset, strict=True)))
    extractor = FungiExtractor(
        small_vit(),
        LAST,
        [KL(), DINO(), SimCLR(negatives=3)],
        preset="library",
        views=ImageViews(16, stride_scale=2),
        embedding=False,
    )
    extractor.fit_negatives(dataset)
    assert torch.equal(features, extractor([image for image, _ in dataset]))
    assert features.shape == (5, 72)


def test_a_matrix_of_fungivision_s():
    matrix = torch.randint(2, (10, 24 * 25)).float() * 2 - 1
    fungi = FUNGIWrapper(
        small_vit(), LAST, "cpu", projection=matrix, input_dim=16, extractor_configs=[KLConfig()]
    )
    images = [image for image, _ in pictures(2)]
    assert fungi(images).shape == (2, 10)
    assert fungi.extractor.state.projection == Rademacher.from_matrix(matrix, 24, 24)
    assert fungi.gradients_dim(fungi.model.blocks[1].attn.proj) == 24 * 25


def test_half_precision():
    settings = {"input_dim": 16, "extractor_configs": [KLConfig()]}
    images = [image for image, _ in pictures(3)]
    exact = FUNGIWrapper(small_vit(), LAST, "cpu", **settings)(images)
    half = FUNGIWrapper(small_vit(), LAST, "cpu", use_fp16=True, **settings)(images)
    assert half.dtype == torch.float32
    assert not torch.equal(half, exact)
    assert ((half * exact).sum(dim=1) > 0.999).all()


def test_what_is_refused_in_its_own_words():
    layer, config = (small_vit(), LAST), SimCLRConfig(comparison_batch_size=2)
    with pytest.raises(
        TypeError, match=r"extractor_configs\[1\]: expected a KLConfig, .* got KL\("
    ):
        FUNGIWrapper(*layer, "cpu", input_dim=16, extractor_configs=[config, KL()])
    with pytest.raises(ValueError, match="FUNGIWrapper: device: expected a device that PyTorch"):
        FUNGIWrapper(*layer, "gpu", input_dim=16, extractor_configs=[config])
    fungi = FUNGIWrapper(*layer, "cpu", input_dim=16, extractor_configs=[config])
    with pytest.raises(ValueError, match=r"got none; .* of a FUNGIWrapper setup\(dataset\)"):
        fungi([image for image, _ in pictures(1)])


def test_heads_of_fungivision_s_are_copied_as_the_guide_says():
    settings = {"input_dim": 16, "extractor_configs": [KLConfig(latent_dim=32)]}
    images = [image for image, _ in pictures(2)]
    theirs = torch.nn.Linear(24, 32)
    fungi = FUNGIWrapper(small_vit(), LAST, "cpu", **settings)
    before = fungi(images)
    state = fungi.extractor.state_dict()
    state["heads"]["KL"]["head"] = theirs.state_dict()
    fungi.extractor.load_state_dict(state)
    assert torch.equal(fungi.extractor.state.heads["KL"]["head"].weight, theirs.weight)
    assert not torch.equal(fungi(images), before)


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        ([], "FUNGIWrapper: extractor_configs: expected at least one, got none"),
        (
            [SimCLRConfig(), SimCLRConfig(stride_scale=3)],
            "extractor_configs: expected one num_patches and stride_scale, got 2",
        ),
        ([SimCLRConfig(num_patches=5)], "num_patches: expected a square number, got 5"),
        (
            [SimCLRConfig(self_similarity_constant=0.0)],
            "self_similarity_constant: expected at most -1000",
        ),
    ],
)
def test_refusals(configs, message):
    with pytest.raises(ValueError, match=message):
        FUNGIWrapper(small_vit(), LAST, "cpu", input_dim=16, extractor_configs=configs)
