"""Files of features: they go on where a run stopped, and are never mixed with another run's."""

import json
import os

import numpy as np
import pytest
import torch
from fungi_models import LAST, small_vit
from PIL import Image

from fmkernels.api import DINO, KL, CustomViews, FungiExtractor, ImageViews, SimCLR
from fmkernels.api.fungi_file import FeatureFile

VIEWS = ImageViews(size=16, local_crops=2, stride_scale=1)


def extractor_of(*objectives, model=None, **settings):
    return FungiExtractor(model or small_vit(), LAST, objectives, **{"views": VIEWS, **settings})


class Pictures:
    """A dataset of (image, label), which counts what is asked for."""

    def __init__(self, number, stop_at=None, first=0):
        self.number, self.stop_at, self.first, self.asked = number, stop_at, first, []

    def __len__(self):
        return self.number

    def __getitem__(self, index):
        if index >= self.number:
            raise IndexError(index)
        if index == self.stop_at:
            raise KeyboardInterrupt
        self.asked.append(index)
        draw = torch.Generator().manual_seed(self.first + index)
        return torch.rand(3, 18 + index % 3, 20, generator=draw), index


def test_extract_goes_on_where_it_stopped(tmp_path):
    path = tmp_path / "features.npy"
    extractor = extractor_of(KL(32), DINO(16))
    expected = extractor.extract(Pictures(7), batch_size=2)
    assert expected.shape == (7, 72)
    with pytest.raises(KeyboardInterrupt):
        extractor.extract(Pictures(7, stop_at=5), path, batch_size=2)
    assert json.loads((tmp_path / "features.npy.json").read_text())["rows"] == 4
    again = Pictures(7)
    other = extractor_of(KL(32), DINO(16))
    other.load_state_dict(extractor.state_dict())
    found = other.extract(again, path, batch_size=3)
    assert again.asked == [0, 6, 4, 5, 6]  # by the first and the last it is known
    assert isinstance(found, np.ndarray)
    torch.testing.assert_close(torch.tensor(found), expected, rtol=0, atol=1e-5)
    done = Pictures(7)
    extractor.extract(done, path)
    assert done.asked == [0, 6]


def test_features_of_another_run_are_not_mixed_in(tmp_path):
    path = tmp_path / "features.npy"
    extractor_of(KL(32)).extract(Pictures(3), path)
    model = small_vit()
    with torch.no_grad():
        model.norm.weight[0] += 1
    begun = "path: expected features of the same extractor, .* which was begun with"
    for other, dataset, what in (
        (extractor_of(KL(32), model=model), Pictures(3), "weights of the model"),
        (extractor_of(KL(32), seed=1), Pictures(3), "heads: .*; seed: 42, not 1;"),
        (extractor_of(KL(32, temperature=2.0)), Pictures(3), r"KL: .* not KL\(.*=2.0\);"),
        (extractor_of(KL(32), dtype=torch.bfloat16), Pictures(3), "dtype: None, not torch.bfl"),
        (extractor_of(KL(32)), Pictures(4), "number of inputs: 3, not 4"),
        (extractor_of(KL(32)), Pictures(3, first=1), "first input: .*; last input: "),
    ):
        with pytest.raises(ValueError, match=f"{begun} {what}"):
            other.extract(dataset, path)
    np.save(tmp_path / "foreign.npy", np.zeros(3))
    with pytest.raises(ValueError, match=r"or has no foreign.npy.json beside it"):
        extractor_of(KL(32)).extract(Pictures(3), tmp_path / "foreign.npy")


def test_functions_of_another_process_count_as_the_same(tmp_path):
    """They lie at another address there."""
    path = tmp_path / "features.npy"
    for stop_at in (1, None):

        def halved(images, seeds):
            return images[:, None].expand(-1, 2, -1, -1, -1).flatten(0, 1)[..., :16, :16]

        def given(images):
            return torch.stack([image[:, :16, :16] for image in images])

        views = CustomViews(given, {"crops": (2, lambda images, seeds: halved(given(images), []))})
        extractor = extractor_of(KL(32), DINO(16), views=views)
        if stop_at is None:
            again = Pictures(3)
            assert extractor.extract(again, path, batch_size=1).shape == (3, 72)
            assert again.asked == [0, 0, 2, 1, 2]
            continue
        with pytest.raises(KeyboardInterrupt):
            extractor.extract(Pictures(3, stop_at=1), path, batch_size=1)


def test_a_folder_of_images(tmp_path):
    (tmp_path / "b").mkdir()
    pictures = np.random.default_rng(0).integers(256, size=(3, 20, 24, 3), dtype=np.uint8)
    names = ("b/x.png", "a.png", "c.bmp")
    for name, picture in zip(names, pictures, strict=True):
        Image.fromarray(picture).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    extractor = extractor_of(KL(32), SimCLR(20, negatives=2)).fit_negatives(tmp_path)
    found = extractor.extract(tmp_path)
    torch.testing.assert_close(found, extractor(list(pictures[[1, 0, 2]])), rtol=0, atol=1e-5)
    workers = extractor.extract(str(tmp_path), num_workers=1, batch_size=2)
    torch.testing.assert_close(workers, found, rtol=0, atol=1e-5)


def test_a_folder_is_known_by_its_files(tmp_path):
    folder, path = tmp_path / "pictures", tmp_path / "features.npy"
    folder.mkdir()
    pictures = np.random.default_rng(0).integers(256, size=(3, 20, 24, 3), dtype=np.uint8)
    for number in range(2):
        Image.fromarray(pictures[number]).save(folder / f"{number}.png")
    extractor = extractor_of(KL(32))
    expected = extractor.extract(folder, path)
    assert np.array_equal(extractor.extract(folder, path), expected)
    (folder / "0.png").rename(folder / "00.png")
    with pytest.raises(ValueError, match="begun with files"):
        extractor.extract(folder, path)
    (folder / "00.png").rename(folder / "0.png")
    assert np.array_equal(extractor.extract(folder, path), expected)
    Image.fromarray(pictures[2]).save(folder / "0.png")
    os.utime(folder / "0.png", (1, 1))
    with pytest.raises(ValueError, match="begun with files"):
        extractor.extract(folder, path)


@pytest.mark.parametrize(
    "kind",
    [
        lambda x: x,
        lambda x: list(x.numpy().transpose(0, 2, 3, 1)),
        lambda x: [(Image.fromarray((255 * own[0]).byte().numpy()), 3) for own in x],
    ],
)
def test_datasets_of_every_kind_are_told_apart(tmp_path, kind):
    images, path = torch.rand(4, 3, 16, 16), tmp_path / "features.npy"
    extractor = extractor_of(KL(32))
    found = extractor.extract(kind(images), path)
    assert np.array_equal(extractor.extract(kind(images), path), found)
    with pytest.raises(ValueError, match=r"first input: .* last input: "):
        extractor.extract(kind(images.flip(0)), path)


def test_a_run_that_stops_before_its_first_rows_are_written(tmp_path, monkeypatch):
    path, file = tmp_path / "features.npy", {"model": "1f"}

    def stop(*args, **kwargs):
        path.write_bytes(b"half a header")
        raise KeyboardInterrupt

    begun = FeatureFile("op", path, 2, file)
    with monkeypatch.context() as patched:
        patched.setattr(np.lib.format, "open_memmap", stop)
        with pytest.raises(KeyboardInterrupt):
            begun.append(torch.ones(1, 3))
    again = FeatureFile("op", path, 2, file)
    assert again.done == 0
    again.append(torch.ones(2, 3))
    assert np.array_equal(again.result(), np.ones((2, 3)))
    with pytest.raises(ValueError, match="which was begun with model: 1f, not 2f; give another"):
        FeatureFile("op", path, 2, {"model": "2f"})


@pytest.mark.parametrize("name", ["features.npy", "features.npy.json"])
def test_files_that_are_broken(tmp_path, name):
    path = tmp_path / "features.npy"
    FeatureFile("op", path, 2, {}).append(torch.ones(1, 3))
    (tmp_path / name).write_text("{")
    with pytest.raises(
        ValueError, match=r"got .*, which cannot be read, or has no features.npy.json"
    ):
        FeatureFile("op", path, 2, {})


def test_models_with_numbers_that_have_no_dimension(tmp_path):
    """Of batches that a batch norm has seen."""
    model = small_vit()
    model.norm = torch.nn.Sequential(model.norm, torch.nn.Flatten(0, 1), torch.nn.BatchNorm1d(24))
    model.norm.append(torch.nn.Unflatten(0, (-1, 17)))
    found = extractor_of(KL(32), model=model).extract(Pictures(2), tmp_path / "features.npy")
    assert found.shape == (2, 48)
    assert not found.flags.writeable
