"""Views of images are those of PIL, which the published code uses; views of texts."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fmkernels.api import CustomViews, ImageViews, TextViews
from fmkernels.api.fungi_random import derived_seed
from fmkernels.api.fungi_views import random_box

CPU = torch.device("cpu")
PLAIN = {"mean": (0, 0, 0), "std": (1, 1, 1)}


def pil_resized(image, size, filter_, box=None):
    """(3, H, W) -> (3, *size), channel by channel in PIL's mode of 32-bit floats."""
    channels = []
    for channel in image:
        picture = Image.fromarray(channel.numpy(), mode="F")
        if box is not None:
            top, left, height, width = box
            picture = picture.crop((left, top, left + width, top + height))
        channels.append(np.array(picture.resize(size[::-1], filter_)))
    return torch.from_numpy(np.stack(channels))


@pytest.mark.parametrize("size", [(40, 60), (17, 90), (16, 16), (200, 120)])
def test_crops_are_pil_s(size):
    views = ImageViews(size=16, **PLAIN)
    images = torch.rand(2, 3, *size)
    crops = views.make("crops", images, CPU, [5, 6]).unflatten(0, (2, 12))
    for image, own, seed in zip(images, crops, (5, 6), strict=True):
        draw = torch.Generator().manual_seed(seed)
        scales = [(0.25, 1.0)] * 2 + [(0.05, 0.25)] * 10
        for crop, scale in zip(own, scales, strict=True):
            box = random_box(draw, size, scale)
            expected = pil_resized(image, (16, 16), Image.BICUBIC, box).clamp(0, 1)
            torch.testing.assert_close(crop, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(40, 60), (300, 90)])
def test_patches_are_windows_of_the_resized_image(size):
    views = ImageViews(size=24, **PLAIN)
    images = torch.rand(2, 3, *size)
    patches = views.make("patches", images, CPU, [0, 0])
    assert views.counts["patches"] == 49 == len(patches) // 2
    for image, own in zip(images, patches.unflatten(0, (2, 7, 7)), strict=True):
        whole = pil_resized(image, (24, 24), Image.BICUBIC).clamp(0, 1)
        for row in range(7):
            for column in range(7):
                window = whole[:, 2 * row : 2 * row + 12, 2 * column : 2 * column + 12]
                expected = pil_resized(window.contiguous(), (24, 24), Image.BICUBIC)
                torch.testing.assert_close(own[row, column], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(40, 60), (300, 90), (16, 16)])
def test_plain_views(size):
    images = torch.rand(2, 3, *size)
    side = round(28 * 256 / 224)
    square = ImageViews(size=28, resize="square", **PLAIN).make("plain", images, CPU, [0, 0])
    shorter = ImageViews(size=28, resize="shorter", **PLAIN).make("plain", images, CPU, [0, 0])
    low = (side - 28) // 2
    scaled = [max(side, int(length * side / min(size))) for length in size]
    top, left = (round((length - 28) / 2) for length in scaled)
    for image, a, b in zip(images, square, shorter, strict=True):
        expected = pil_resized(image, (side, side), Image.BILINEAR)
        torch.testing.assert_close(a, expected[:, low : low + 28, low : low + 28])
        expected = pil_resized(image, tuple(scaled), Image.BICUBIC).clamp(0, 1)
        torch.testing.assert_close(b, expected[:, top : top + 28, left : left + 28])


def test_images_of_all_kinds_and_sizes():
    array = np.random.default_rng(0).integers(256, size=(20, 30, 3), dtype=np.uint8)
    other = torch.rand(3, 25, 18)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    kinds = [array, Image.fromarray(array), tensor, tensor / 255]
    views = ImageViews(size=8, local_crops=1, stride_scale=1)
    for kind, count in views.counts.items():
        expected = views.make(kind, [tensor], CPU, [1])
        for image in kinds:
            mixed = views.make(kind, [other, image, other], CPU, [0, 1, 2])
            torch.testing.assert_close(mixed[count : 2 * count], expected)
            torch.testing.assert_close(mixed[:count], views.make(kind, [other], CPU, [0]))
    grey = views.make("plain", [Image.fromarray(array[:, :, 0])], CPU, [0])
    assert grey.shape == (1, 3, 8, 8)


@pytest.mark.parametrize("size", [16, 18])
def test_images_are_not_written_to(size):
    """Also where nothing has to be resized."""
    images = torch.rand(2, 3, size, size)
    before = images.clone()
    for resize in ("shorter", "square", "none"):
        for kind in ("plain", "crops", "patches"):
            views = ImageViews(size=16, resize=resize, global_scale=(1.0, 1.0))
            views.make(kind, images, CPU, [0, 1])
            views.make(kind, list(images), CPU, [0, 1])
            assert torch.equal(images, before)


def test_normalisation_is_imagenet_s():
    views = ImageViews(size=8).make("plain", torch.full((1, 3, 9, 9), 0.5), CPU, [0])
    expected = (0.5 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(views[0, :, 4, 4], expected)


def test_images_of_other_channels():
    """Where mean says so, or says nothing."""
    grey = torch.rand(2, 1, 9, 9)
    for settings in ({"mean": 0.5, "std": 0.5}, {"mean": (0.5,), "std": (0.5,)}):
        assert ImageViews(size=8, **settings).make("crops", grey, CPU, [0, 1]).shape[1] == 1
    two = ImageViews(size=8, mean=(0.5, 0.5), std=1)
    assert two.make("plain", torch.rand(1, 2, 9, 9), CPU, [0]).shape[1] == 2


def test_images_as_given():
    images = torch.rand(2, 3, 10, 14)
    views = ImageViews(size=8, resize="none", **PLAIN)
    assert torch.equal(views.make("plain", images, CPU, [0, 0]), images)
    with pytest.raises(ValueError, match='one size with resize="none", got several'):
        views.make("plain", [torch.rand(3, 8, 8), torch.rand(3, 9, 8)], CPU, [0, 0])


@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 1000))
def test_random_boxes_lie_in_the_image(height, width, seed):
    draw = torch.Generator().manual_seed(seed)
    for scale in ((0.25, 1.0), (0.05, 0.25)):
        top, left, h, w = random_box(draw, (height, width), scale)
        assert 0 <= top <= top + h <= height
        assert 0 <= left <= left + w <= width
        assert h >= 1
        assert w >= 1


def test_random_boxes_have_the_distribution_of_random_resized_crop():
    """Areas uniform in the scale, log ratios uniform in ±log(4/3): 2,000 draws, errors 3 sigma."""
    draw, number = torch.Generator().manual_seed(0), 2000
    boxes = [random_box(draw, (1000, 1000), (0.05, 0.25)) for _ in range(number)]
    areas = torch.tensor([h * w / 1e6 for _, _, h, w in boxes])
    ratios = torch.tensor([math.log(w / h) / math.log(4 / 3) for _, _, h, w in boxes])
    lefts = torch.tensor([left / (1000 - w) for _, left, _, w in boxes])
    deviation = 1 / math.sqrt(12)
    for values, low, width in ((areas, 0.05, 0.2), (ratios, -1, 2), (lefts, 0, 1)):
        share = (values - low) / width
        assert abs(float(share.mean()) - 0.5) < 3 * deviation / math.sqrt(number)
        assert abs(float(share.std()) - deviation) < 0.02
        assert share.min() > -0.01
        assert share.max() < 1.01


def test_seeds_are_golden():
    assert derived_seed(42, "head", "KL", "head") == 474128349967865735
    assert len({derived_seed(42, "crops", number) for number in range(1000)}) == 1000


def test_texts_lose_words():
    views = TextViews(lambda texts: {"texts": texts}, num_views=5, deletion=0.3)
    text = "a b c d e f g h i j"
    first = views.make("patches", [text, "alone", ""], CPU, [1, 2, 3])["texts"]
    assert first == views.make("patches", [text, "alone", ""], CPU, [1, 2, 3])["texts"]
    assert first[5:] == ["alone"] * 5 + [""] * 5
    assert len(set(first[:5])) > 1
    for view in first[:5]:
        words = view.split()
        assert len(words) == 7
        assert words == [word for word in text.split() if word in words]
    assert views.make("plain", [text], CPU, [1])["texts"] == [text]
    long = " ".join(map(str, range(1000)))
    assert len(views.make("patches", [long], CPU, [1])["texts"][0].split()) == 990


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.rand(3, 8, 8), TypeError, "images: .* got 3 dimensions; one image goes in"),
        ("folder", TypeError, "images: .* got str"),
        ([torch.rand(8, 8)], ValueError, r"images\[0\]: expected shape \(3, H, W\), got \(8, 8\)"),
        ([object()], TypeError, r"images\[0\]: expected a tensor .* got object"),
        ([torch.ones(3, 8, 8, dtype=torch.int64)], TypeError, r"images\[0\]: expected uint8"),
        (
            torch.full((1, 3, 8, 8), 2.0),
            ValueError,
            "images: expected floats from 0 to 1, got 2; di",
        ),
        ([-torch.ones(3, 8, 8)], ValueError, r"images\[0\]: expected floats from 0 to 1, got -1"),
        (torch.rand(2, 1, 8, 8), ValueError, "images: expected 3 channels, .* got 1 .*; repeat a"),
        (torch.rand(2, 4, 8, 8), ValueError, "images: expected 3 channels, .* got 4 .*; leave out"),
        ([np.ones((8, 8, 4), np.uint8)], ValueError, r"images\[0\]: .* got 4 in shape \(8, 8, 4\)"),
        (
            [np.ones((3, 8, 9))],
            ValueError,
            r"images\[0\]: .* got 9 .* in a tensor and last in an a",
        ),
        ([np.ones((8, 9))], ValueError, r"images\[0\]: expected an array .* got \(8, 9\); of a gr"),
        (np.ones((2, 8, 8, 3)), TypeError, "images: .* got ndarray; .* pass list"),
        (["a cat"], TypeError, r"images\[0\]: .* got str; for texts take views=TextViews"),
        ([(torch.rand(3, 8, 8), 1)], TypeError, r"images\[0\]: .* got tuple; of pairs pass the im"),
        ([Image.new("I;16", (8, 8))], ValueError, r"images\[0\]: expected a picture with 8 bits"),
        ([Image.new("F", (8, 8))], ValueError, ".* got mode 'F'; make a tensor of it"),
    ],
)
def test_what_is_no_image_is_refused(images, error, message):
    with pytest.raises(error, match=f"^ImageViews: {message}"):
        ImageViews(size=8).make("plain", images, CPU, [0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "size: expected an integer >= 1"),
        ({"size": 9}, "grid: expected a divisor of size, 9, got 2"),
        ({"resize": "long"}, "resize: expected one of shorter, square, none"),
        ({"local_scale": (0.5, 0.1)}, "local_scale: expected shares 0 < low <= high <= 1"),
        ({"std": (0.2, 0.0, 0.2)}, "std: expected numbers > 0"),
        ({"std": 0}, "std: expected numbers > 0"),
        ({"mean": (0.5, 0.5)}, "std: expected one number or 2, as mean has, got 3"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=f"ImageViews: {message}"):
        ImageViews(**settings)


def test_kinds_and_texts_are_checked():
    with pytest.raises(ValueError, match="kind: expected one of plain, patches, got 'crops'"):
        TextViews(list).make("crops", ["a"], CPU, [0])
    with pytest.raises(TypeError, match=r"texts\[1\]: expected a str, got int"):
        TextViews(list).make("plain", ["a", 3], CPU, [0, 1])
    with pytest.raises(ValueError, match="deletion: expected a share below 1"):
        TextViews(list, deletion=1.0)
    for wrong in ("a cat", {"input_ids": torch.ones(1, 3)}):
        with pytest.raises(TypeError, match="TextViews: texts: expected a list of texts, got"):
            TextViews(list).make("plain", wrong, CPU, [0])
    for wrong in (None, "bert-base"):
        with pytest.raises(TypeError, match=r"tokenizer: expected a function .* padding=True"):
            TextViews(wrong)
    for lists in (lambda texts: {"input_ids": [[1, 2]]}, lambda texts: [[1, 2]]):
        with pytest.raises(TypeError, match=r"that gives a mapping of tensors, .* padding=True"):
            TextViews(lists).make("plain", ["a"], CPU, [0])
    with pytest.raises(TypeError, match=r"CustomViews: inputs: .* got list; stack them, or give"):
        CustomViews().make("plain", [np.ones(3)], CPU, [0])
    assert CustomViews().counts == {"plain": 1}
