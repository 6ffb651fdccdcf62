"""What somebody tries who has read nothing: it is refused in words, before any work is done."""

import sys

import numpy as np
import pytest
import torch
from torch import nn

import fmkernels
from fmkernels.api import (
    InContextSegmenter,
    KNNClassifier,
    Overclustering,
    PatchIndex,
    PatchMemory,
    open_bank,
    patch_label_counts,
    rank_database,
    retrieval_map,
)

# a bank


@pytest.mark.parametrize("searched", [False, True])
@pytest.mark.parametrize("settings", [{}, {"engine": "faiss", "factory": "Flat"}], ids=str)
def test_the_only_array_is_overwritten(settings, searched):
    """Else what was prepared of the old rows would answer for the new ones."""
    if settings:
        pytest.importorskip("faiss")
    rows = np.random.default_rng(0).standard_normal((300, 8), dtype=np.float32)
    index = PatchIndex(8, **settings)
    index.add(rows)
    if searched:
        index.search(rows[:1], 1)
    rows[:] = rows[::-1].copy()
    for use in (lambda: index.search(rows[:1], 1), lambda: index.features):
        with pytest.raises(ValueError, match=r"PatchIndex.add: features: .*shape \(300, 8\) that"):
            use()


def test_a_memory_that_is_overwritten():
    memory = PatchMemory(torch.eye(4), torch.ones(4, 2))
    memory.search(torch.eye(4), 1)
    memory.features.zero_()
    with pytest.raises(ValueError, match="expected an array that is not written to"):
        memory.search(torch.eye(4), 1)


@pytest.mark.parametrize(
    ("kept", "given", "largest"),
    [
        (torch.float16, torch.float32, "70000"),
        (torch.float16, torch.bfloat16, "70144"),
        (torch.float32, torch.float64, r"1e\+39"),
    ],
    ids=str,
)
def test_numbers_that_are_too_large_for_the_index(kept, given, largest):
    index = PatchIndex(2, dtype=kept)
    number = 1e39 if given == torch.float64 else 7e4
    with pytest.raises(ValueError, match=f"add: features: .* that {kept} has, .*got {largest}; ch"):
        index.add(torch.tensor([[1.0, 2.0], [number, torch.inf]], dtype=given))
    assert len(index) == 0
    index.add(torch.tensor([[torch.inf, 1.0]], dtype=given))  # lost nothing
    assert index.features[0, 0] == torch.inf


def test_files(tmp_path):
    pytest.importorskip("safetensors")
    rows, index = np.eye(3, dtype=np.float32), PatchIndex(3)
    np.save(tmp_path / "rows.npy", rows)
    (tmp_path / "empty.npy").touch()
    cases = (
        (open_bank, tmp_path / "none.npy", FileNotFoundError, "expected a file that exists, got "),
        (open_bank, tmp_path, FileNotFoundError, "expected a file that exists, got "),
        (open_bank, tmp_path / "empty.npy", ValueError, "got an empty file in .*empty.npy"),
        (open_bank, rows, TypeError, "expected the path of a file, got ndarray"),
        (PatchIndex.load, 3, TypeError, "expected the path of a file, got int"),
        (PatchIndex.load, tmp_path / "rows.npy", ValueError, "it is a .npy file; .*open_bank"),
        (PatchMemory.load, tmp_path / "rows.npy", ValueError, "it is a .npy file$"),
        (index.save, tmp_path, ValueError, "expected a file, got a folder, .*; add a name"),
        (index.save, None, TypeError, "expected the path of a file, got NoneType"),
    )
    for use, path, error, words in cases:
        with pytest.raises(error, match=r"^(open_bank|\w+\.(load|save)): path: .*" + words):
            use(path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.npy", "rows.npy"]


@pytest.mark.parametrize("device", ["gpu", "cuda:99", 99, 1.5], ids=str)
def test_devices_that_are_not_there(tmp_path, device):
    pytest.importorskip("safetensors")
    index, memory = PatchIndex(2), PatchMemory(torch.eye(2), torch.ones(2, 3))
    index.save(tmp_path / "index")
    memory.save(tmp_path / "memory")
    cases = {
        "PatchIndex": lambda: PatchIndex(2, device=device),
        "PatchIndex.to": lambda: index.to(device),
        "PatchIndex.load": lambda: PatchIndex.load(tmp_path / "index", device=device),
        "PatchMemory.to": lambda: memory.to(device),
        "PatchMemory.load": lambda: PatchMemory.load(tmp_path / "memory", device=device),
        "PatchMemory.build": lambda: PatchMemory.build(nn.Identity(), [], 3, device=device),
        "InContextSegmenter": lambda: InContextSegmenter(nn.Identity(), 3, device=device),
    }
    for op, use in cases.items():
        with pytest.raises(ValueError, match=f'^{op}: device: expected .* "cpu", got .*{device}'):
            use()


# arguments of all kinds


def test_arrays_where_tensors_are_wanted():
    array = np.ones((2, 3), dtype=np.float32)
    with pytest.raises(TypeError, match=r"got ndarray; convert it with torch.from_numpy\(queries"):
        fmkernels.knn(array, torch.ones(2, 3), 1)
    with pytest.raises(TypeError, match=r"convert it with torch.from_numpy\(masks\)"):
        patch_label_counts(np.zeros((1, 4, 4), dtype=np.int64), 2, (2, 2))
    with pytest.raises(TypeError, match=r"convert it with torch.from_numpy\(labels\)"):
        PatchMemory(torch.eye(2), np.ones((2, 3)))
    for value, kind in (([[1.0]], "list"), (np.float32(1), "float32")):
        with pytest.raises(TypeError, match=f"queries: expected a torch.Tensor, got {kind}$"):
            fmkernels.knn(value, torch.ones(2, 1), 1)
    for use in (PatchIndex(1).add, lambda rows: rank_database(rows, torch.ones(2, 1))):
        with pytest.raises(TypeError, match=r"expected a torch.Tensor or NumPy array, got list$"):
            use([[1.0]])


def test_a_flag_is_no_number():
    for use in (
        lambda: fmkernels.knn(torch.eye(2), torch.eye(2), True),
        lambda: PatchIndex(2).search(torch.eye(2), True),
    ):
        with pytest.raises(ValueError, match="k: expected an integer >= 1, got True"):
            use()


def test_the_published_ground_truth_as_it_is_read():
    truth = {"gnd": [{"easy": [0], "hard": []}], "imlist": ["a"], "qimlist": ["b"]}
    ranking = torch.tensor([[1, 0]])
    with pytest.raises(TypeError, match=r"ground_truth: .* got dict; pass ground_truth\['gnd'\]"):
        retrieval_map(ranking, truth)
    with pytest.raises(TypeError, match=r"a mapping for each query, got dict$"):
        retrieval_map(ranking, truth["gnd"][0])
    assert retrieval_map(ranking, truth["gnd"], ks=2)["easy"].mean_precision == {2: 0.5}
    with pytest.raises(ValueError, match=r"ks: expected an integer >= 1, got 2.5"):
        retrieval_map(ranking, truth["gnd"], ks=2.5)


def test_what_the_evaluators_look_like():
    classifier = KNNClassifier("fungi", k=1, pca_dim=None)
    assert repr(classifier) == "KNNClassifier('fungi', k=1, pca_dim=None), not fitted"
    fitted = KNNClassifier("dino", k=1).fit(torch.eye(3), torch.tensor([5, 5, 2]))
    assert repr(fitted) == "KNNClassifier('dino', k=1, temperature=0.07), 3 features of 2 classes"
    words = repr(Overclustering(21, 500, seeds=(7,), niter=3))
    assert words.startswith("Overclustering(21, 500, pca_dim=50, mask_size=(100, 100), ")
    assert "seeds=[7], matching='many_to_one', niter=3, nredo=5, " in words


# in-context segmentation


class Counted(nn.Module):
    """An encoder that knows how often it ran."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, images):
        self.calls += 1
        return nn.functional.pixel_unshuffle(images, 4)


@pytest.fixture
def fitted():
    images, masks = torch.rand(3, 3, 8, 8), torch.randint(4, (3, 8, 8))
    segmenter = InContextSegmenter(Counted(), 4).fit([(images, masks)])
    segmenter.encoder.calls = 0
    return segmenter, images, masks


def refused_at_once(fitted, error, words, **settings):
    segmenter, images, masks = fitted
    with pytest.raises(error, match="InContextSegmenter.evaluate" + words):
        segmenter.evaluate([(images, masks)], **settings)
    assert segmenter.encoder.calls == 0


def test_a_picture_of_an_unknown_kind(fitted, tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("scipy")
    words = r": picture: expected a file of a kind in .*\.png.*, got .*a\.xyz"
    refused_at_once(fitted, ValueError, words, picture=tmp_path / "a.xyz")
    refused_at_once(fitted, ValueError, ": picture: .* folder that exists", picture=tmp_path)
    segmenter, images, masks = fitted
    segmenter.evaluate([(images, masks)], tmp_path / "A.PNG")
    segmenter.evaluate([(images, masks)], tmp_path / "bare")  # matplotlib's own rule
    assert sorted(path.name for path in tmp_path.iterdir()) == ["A.PNG", "bare.png"]


def test_evaluate_without_scipy(fitted, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    refused_at_once(fitted, ImportError, ", which matches classes, needs scipy.* pip install scipy")


def test_datasets_that_are_none(fitted):
    pytest.importorskip("scipy")
    segmenter, images, masks = fitted
    once = zip(images, masks, strict=True)
    segmenter.evaluate(once)
    with pytest.raises(ValueError, match=r"evaluate: dataset: .*got none; an iterator such as zip"):
        segmenter.evaluate(once)
    for use, op in ((segmenter.fit, "PatchMemory.build"), (segmenter.evaluate, "evaluate")):
        words = rf"{op}: dataset: expected pairs .* goes in a list: \[\(images, masks\)\]"
        with pytest.raises(TypeError, match=words):
            use((images, masks))
        with pytest.raises(TypeError, match=words):
            use((images.numpy(), masks.numpy()))


@pytest.mark.parametrize("epochs", [1, 2])
def test_the_image_whose_mask_is_out_of_range(fitted, epochs):
    segmenter, images, masks = fitted
    pairs = [(image, mask.byte()) for image, mask in zip(images, masks, strict=True)]
    pairs[2][1][3, 4] = 9
    segmenter.batch_size, segmenter.epochs = 2, epochs
    words = ": dataset: mask of image 2: expected classes from 0 to 3 or ignore_index, 255, got 9"
    with pytest.raises(ValueError, match="PatchMemory.build" + words):
        segmenter.fit(pairs)
    with pytest.raises(ValueError, match="InContextSegmenter.evaluate" + words):
        segmenter.evaluate(pairs)
    with pytest.raises(ValueError, match=r"patch_label_counts: masks\[1\]: .* 255, got -3"):
        patch_label_counts(torch.tensor([[[0, 255]], [[1, -3]]]), 4, (1, 2))


def test_an_empty_batch_adds_nothing():
    images, masks = torch.rand(3, 3, 8, 8), torch.zeros(3, 8, 8).long()
    encoder = torch.nn.PixelUnshuffle(4)
    whole = PatchMemory.build(encoder, [(images, masks)], 3, progress=False)
    empty = PatchMemory.build(
        encoder, [(images[:0], masks[:0]), (images, masks)], 3, progress=False, num_images=3
    )
    assert len(empty) == len(whole)
