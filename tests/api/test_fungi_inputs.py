"""What an extractor is handed, from one text to a folder: what it means, or why it is refused."""

import functools

import numpy as np
import pytest
import torch
from fungi_models import LAST, small_vit
from PIL import Image
from torch import nn

from fmkernels.api import DINO, KL, FungiExtractor, ImageViews, SimCLR, TextViews

VIEWS = ImageViews(size=16, local_crops=2, stride_scale=1)


def extractor_of(*objectives, **settings):
    return FungiExtractor(small_vit(), LAST, objectives or [KL(32)], views=VIEWS, **settings)


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.layer = nn.Embedding(128, 12), nn.Linear(12, 12)

    def forward(self, input_ids):
        return self.layer(self.embed(input_ids)).mean(dim=1)


def tokenize(texts):
    ids = [torch.tensor([ord(letter) % 128 for letter in text.ljust(20)]) for text in texts]
    return {"input_ids": torch.stack(ids)}


def test_one_text_is_no_batch_of_letters():
    reader = FungiExtractor(Reader(), "layer", [KL(16)], views=TextViews(tokenize))
    assert reader(["hello world"]).shape == (1, 24)
    with pytest.raises(TypeError, match=r"inputs: expected a batch .* got str; put one input in a"):
        reader("hello world")
    with pytest.raises(TypeError, match="texts: expected a list of texts, got dict"):
        reader(tokenize(["a", "b"]))


PICTURE = Image.new("RGB", (20, 20))


@pytest.mark.parametrize("work", [FungiExtractor.__call__, FungiExtractor.gradients])
@pytest.mark.parametrize(
    ("inputs", "got"), [(PICTURE, "Image"), ("folder", "str"), (iter([PICTURE]), "list_iterator")]
)
def test_what_is_no_batch_is_refused(work, inputs, got):
    with pytest.raises(TypeError, match=f"inputs: expected a batch .* got {got}; put one input"):
        work(extractor_of(), inputs)


@pytest.mark.parametrize("numbers", [7, [0.0, 1.0], ["a", "b"], torch.rand(2)])
def test_numbers_are_integers(numbers):
    with pytest.raises(TypeError, match="numbers: expected 2 integers, one for each input, got"):
        extractor_of()(torch.rand(2, 3, 16, 16), numbers)


def test_integers_of_any_kind_are_numbers():
    extractor, images = extractor_of(DINO(16)), torch.rand(2, 3, 16, 16)
    expected = extractor(images, [3, 4])
    for numbers in (range(3, 5), np.array([3, 4]), torch.tensor([3, 4])):
        assert torch.equal(extractor(images, numbers), expected)


@pytest.mark.parametrize("seed", [-1, 1.5, None, 2**63, True])
def test_seeds_are_integers(seed):
    with pytest.raises(ValueError, match=r"FungiExtractor: seed: expected an integer from 0 to 2"):
        extractor_of(seed=seed)


def test_objectives_come_in_a_list():
    with pytest.raises(TypeError, match=r"objectives: expected a list such as .* got KL\("):
        FungiExtractor(small_vit(), LAST, KL())


def test_the_words_of_settings():
    with pytest.raises(
        ValueError, match=r"dtype: .* or None for that of the model, got 'bfloat16'"
    ):
        extractor_of(dtype="bfloat16")
    with pytest.raises(ValueError, match=r"got 'kronecker'; others are passed as objects"):
        extractor_of(projection="kronecker")


class Items:
    """A dataset of items that are all alike."""

    def __init__(self, item):
        self.item = item

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return self.item


@pytest.mark.parametrize("method", ["extract", "fit_negatives"])
@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Items({"image": PICTURE, "label": 3}), "got a mapping with Image for 'image'; wrap the"),
        ({"a": 1}, "expected a folder, or a dataset with a length .* got dict"),
    ],
)
def test_datasets_of_mappings(method, dataset, message):
    with pytest.raises(TypeError, match=message):
        getattr(extractor_of(SimCLR(16, negatives=2)), method)(dataset)


def test_which_inputs_an_error_is_about():
    """A note, from Python 3.11 on."""
    pictures = [np.zeros((20, 20, 3), np.uint8)] * 6 + [np.zeros((20, 20), np.uint8)]
    with pytest.raises(ValueError, match=r"images\[0\]: expected an array of shape") as caught:
        extractor_of().extract(pictures, batch_size=3)
    if hasattr(caught.value, "__notes__"):
        assert "of the numbers [6]" in caught.value.__notes__[0]


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "pictures"
    (root / "b").mkdir(parents=True)
    draw = np.random.default_rng(0)
    for name in ("b/x.png", "a.png", "c.bmp"):
        Image.fromarray(draw.integers(256, size=(20, 24, 3), dtype=np.uint8)).save(root / name)
    return root


def test_a_file_that_pil_only_writes_is_no_image(folder):
    (folder / "paper.pdf").write_bytes(b"%PDF-1.4")
    assert extractor_of().extract(folder).shape == (3, 48)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_cannot_be_read_is_named(folder, workers):
    whole = (folder / "a.png").read_bytes()
    (folder / "b" / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"expected images, got .*cut.png, which cannot be read"):
        extractor_of().extract(folder, num_workers=workers)


def test_pictures_of_16_bits_are_not_cut_off(folder):
    deep = Image.fromarray(np.full((20, 20), 40_000, np.uint16))
    deep.save(folder / "deep.png")
    with pytest.raises(ValueError, match=r"got .*deep.png, .* 8 bits per channel, got mode 'I;16"):
        extractor_of().extract(folder)


def test_the_note_of_a_model_s_error_says_what_it_was_called_on():
    extractor = FungiExtractor(small_vit(), LAST, [KL(32)])  # of 224 pixels
    with pytest.raises(RuntimeError) as caught:
        extractor(torch.rand(1, 3, 16, 16))
    if hasattr(caught.value, "__notes__"):
        notes = "".join(caught.value.__notes__)
        assert "views of shape (1, 3, 224, 224); what makes them can be set" in notes


def test_a_function_that_is_no_tokenizer_of_tensors():
    reader = functools.partial(FungiExtractor, Reader(), "layer", [KL(16)])
    lists = TextViews(lambda texts: {"input_ids": [[1, 2]] * len(texts)})
    with pytest.raises(TypeError, match=r"got dict of lists; .* padding=True, return_tensors"):
        reader(views=lists)(["a", "b"])
    with pytest.raises(TypeError, match="got str; for texts take views=TextViews"):
        reader()(["a", "b"])
