"""Patch labels and the memory: against one-hot masks and loops, on disk, and what is refused."""

import os
import sys

import hummingbird
import pytest
import torch
from torch import nn

from fmkernels import _memory
from fmkernels.api import PatchMemory, patch_label_counts
from fmkernels.api.patch_memory import favour_rare, rarity_scores

CLASSES = 5


def scene(images=6, size=32, classes=CLASSES, seed=0):
    """Images, and masks of a few rectangles with some ignored pixels; classes are unlike often."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.zeros(images, size, size, dtype=torch.uint8)
    for mask in masks:
        for c in range(1, classes):
            y, x = torch.randint(size, (2,), generator=generator).tolist()
            mask[y : y + size // (2 * c), x : x + size // 3] = c
        mask[torch.rand(size, size, generator=generator) < 0.02] = 255
    return torch.rand(images, 3, size, size, generator=generator), masks


class Encoder(nn.Module):
    """Images -> maps (B, 12, H / patch, W / patch), with a dropout that must be off."""

    def __init__(self, patch=4):
        super().__init__()
        self.embed = nn.Conv2d(3, 12, patch, patch)
        self.drop = nn.Dropout(0.5)

    def forward(self, images):
        return self.drop(self.embed(images))


@pytest.mark.parametrize("patch", [1, 2, 14, 15, 16, 17])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64], ids=str)
def test_counts_are_those_of_a_one_hot_mask(patch, dtype):
    masks = torch.randint(CLASSES, (3, 2 * patch, 3 * patch)).to(dtype)
    masks[torch.rand(masks.shape) < 0.1] = 255
    masks[0, :patch, :patch] = 3  # one patch of a single class
    masks[1, :patch, :patch] = 255
    counts = patch_label_counts(masks, CLASSES, (2, 3))
    assert counts.dtype == (torch.uint8 if patch <= 16 else torch.int16)
    shares = counts.double() / counts.double().sum(dim=2, keepdim=True)
    expected = hummingbird.patch_labels(masks, CLASSES, patch).double()
    torch.testing.assert_close(shares, expected, rtol=0, atol=1e-7)  # the mean there is float32
    assert shares[0, 0, 3] == shares[1, 0, 0] == 1


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32], ids=str)
def test_masks_of_any_strides(dtype):
    masks = torch.randint(CLASSES, (4, 12, 24)).to(dtype)
    kept = masks.clone()
    for strided in (masks.mT, masks[::2, :, ::2], masks[:1].expand(3, -1, -1), masks.flip(1)):
        expected = patch_label_counts(strided.contiguous(), CLASSES, (4, 4))
        assert torch.equal(patch_label_counts(strided, CLASSES, (4, 4)), expected)
    assert torch.equal(masks, kept)


def test_large_patches_keep_exact_counts():
    masks = torch.zeros(1, 400, 200, dtype=torch.int32)
    masks[:, :3] = 2
    counts = patch_label_counts(masks, 3, (2, 1))
    assert counts.dtype == torch.int32
    assert counts.tolist() == [[[39400, 0, 600], [40000, 0, 0]]]


def test_ignored_pixels_can_be_left_out_or_have_a_class_of_their_own():
    mask = torch.tensor([[[255, 255, 1, 255], [255, 255, 0, 255]]], dtype=torch.uint8)
    assert patch_label_counts(mask, 2, (1, 2), ignored_as=None).tolist() == [[[0, 0], [1, 1]]]
    assert patch_label_counts(mask, 2, (1, 2), ignored_as=1).tolist() == [[[0, 4], [1, 3]]]
    assert patch_label_counts(mask.clamp(max=1), 2, (1, 2), ignore_index=0).tolist() == [
        [[0, 4], [1, 3]]
    ]


@pytest.mark.parametrize(("dtype", "ignored"), [(torch.int8, 255), (torch.uint8, -1)])
def test_a_class_never_wraps_around_to_the_ignored_one(dtype, ignored):
    masks = torch.full((1, 2, 2), -1 if dtype == torch.int8 else 255).to(dtype)
    with pytest.raises(
        ValueError, match=r"masks\[0\]: expected classes from 0 to 2 .*, got (-1|255)"
    ):
        patch_label_counts(masks, 3, (1, 1), ignore_index=ignored)


def test_more_classes_than_a_byte_has():
    masks = torch.randint(300, (2, 8, 8))
    counts = patch_label_counts(masks, 300, (2, 2), ignore_index=-1, ignored_as=None)
    for image, mask in enumerate(masks):
        block = mask[:4, 4:].flatten()
        assert torch.equal(counts[image, 1].long(), torch.bincount(block, minlength=300))


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_counting_takes_a_few_bytes_per_pixel():
    classes, size, side = 150, 4096, 64  # so large that the allocator keeps nothing back
    masks = torch.randint(classes, (1, size, size), dtype=torch.uint8)
    patch_label_counts(masks[:, :64, :64], classes, (1, 1))
    peak = _memory.peak_extra_bytes(lambda: patch_label_counts(masks, classes, (side, side)))
    assert peak < 5.5 * masks.numel() + 3 * 8 * side**2 * classes  # of one-hot: 1200 per pixel


@pytest.mark.parametrize("ignored_as", [0, None])
def test_rare_classes_score_low(ignored_as):
    _, masks = scene()
    masks[0, :8, :8] = 255
    counts = patch_label_counts(masks, CLASSES, (8, 8), ignored_as=ignored_as)
    for image, patches in enumerate(hummingbird.patchify(masks, 4)):
        if ignored_as is None:
            blocks = hummingbird.patchify(masks + 0 * masks, 4)  # where 255 became 0
            seen = (masks[image] != 255).unfold(0, 4, 4).unfold(1, 4, 4).flatten(2).flatten(0, 1)
            patches = [block[kept] for block, kept in zip(blocks[image], seen, strict=True)]
        expected, some = hummingbird.patch_scores(patches, CLASSES)
        scores = rarity_scores(counts[image])
        assert torch.equal(scores.isfinite(), some)
        assert torch.equal(scores[some], expected[some])
    assert (ignored_as is None) == bool((~rarity_scores(counts[0]).isfinite()).any())


def test_empty_patches_come_last():
    counts = torch.zeros(10, 3, dtype=torch.uint8)
    counts[[2, 5, 7], 1] = 4
    for seed in range(5):
        chosen = favour_rare(counts, 6, torch.Generator().manual_seed(seed)).tolist()
        assert set(chosen[:3]) == {2, 5, 7}
        assert chosen[3:] == [0, 1, 3]


def test_the_draw_favours_rare_classes():
    images, masks = scene(images=40)
    pairs = list(zip(images, masks, strict=True))
    everything = PatchMemory.build(Encoder(), pairs, CLASSES)
    some = PatchMemory.build(Encoder(), pairs, CLASSES, size=40 * 8)
    share = [(memory.labels[:, 1:] > 0).any(dim=1).float().mean() for memory in (everything, some)]
    assert share[1] > 1.5 * share[0]


def test_holds_the_normalised_features_in_order():
    images, masks = scene()
    encoder = Encoder().train()
    memory = PatchMemory.build(encoder, zip(images, masks, strict=True), CLASSES)
    features = encoder.embed(images).detach().flatten(2).mT.flatten(0, 1)
    torch.testing.assert_close(memory.features, nn.functional.normalize(features, dim=1))
    assert torch.equal(memory.labels, patch_label_counts(masks, CLASSES, (8, 8)).flatten(0, 1))
    numbers = torch.arange(6 * 64)
    assert torch.equal(memory.origins.long(), torch.stack([numbers // 64, numbers % 64], dim=1))
    assert len(memory) == 384
    assert str(memory.report()).startswith("384 patches: features 0.0 MiB")
    assert memory.report().features == 384 * 12 * 4


@pytest.mark.parametrize("size", [None, 6 * 5, 6 * 5 + 4, 10**6])
def test_the_limit(size):
    pairs = list(zip(*scene(), strict=True))
    everything = PatchMemory.build(encoder := Encoder(), pairs, CLASSES)
    memory = PatchMemory.build(encoder, pairs, CLASSES, size=size)
    assert len(memory) == (30 if size in (30, 34) else 384)
    rows = 64 * memory.origins[:, 0] + memory.origins[:, 1]
    assert len(rows.unique()) == len(rows)
    assert torch.equal(memory.features, everything.features[rows])
    assert torch.equal(memory.labels, everything.labels[rows])
    assert memory.origins[:, 0].bincount().tolist() == [len(memory) // 6] * 6


def test_depends_on_the_seed_and_on_nothing_else():
    images, masks = scene()
    pairs, encoder = list(zip(images, masks, strict=True)), Encoder()
    settings = {"num_classes": CLASSES, "size": 60, "num_images": 6}
    built = []
    for source in (pairs, [(images[:4], masks[:4]), (images[4:], masks[4:])], iter(pairs)):
        torch.rand(3)  # the global generator is not looked at, nor changed
        state = torch.get_rng_state()
        built.append(PatchMemory.build(encoder, source, batch_size=5, **settings))
        assert torch.equal(torch.get_rng_state(), state)
    other = PatchMemory.build(encoder, pairs, **settings, seed=1)
    for memory in built[1:]:
        assert torch.equal(memory.origins, built[0].origins)
        torch.testing.assert_close(memory.features, built[0].features)
    assert not torch.equal(other.origins, built[0].origins)


def test_augmentation_epochs():
    images, masks = scene()
    calls = []

    def augment(image, mask):
        calls.append(image.shape)
        if torch.rand(()) < 0.5:
            return image.flip(2), mask.flip(1)
        return image, mask

    def build(source):
        return PatchMemory.build(
            encoder, source, CLASSES, size=3 * 6 * 4, epochs=3, augment=augment, num_images=6
        )

    encoder = Encoder()
    memory = build(list(zip(images, masks, strict=True)))
    assert len(calls) == 18
    assert memory.origins[:, 0].bincount().tolist() == [4] * 18
    again = build([(images, masks)])
    assert torch.equal(memory.features, again.features)
    plain = [image for image, _ in memory.origins.tolist()]
    patches = encoder.embed(images).detach().flatten(2).mT
    flipped = encoder.embed(images.flip(3)).detach().flatten(2).mT
    for row, (number, (_, patch)) in enumerate(zip(plain, memory.origins.tolist(), strict=True)):
        candidates = torch.stack([x[number % 6, patch] for x in (patches, flipped)])
        cosines = torch.cosine_similarity(candidates, memory.features[row], dim=1)
        assert cosines.max() > 1 - 1e-6
    with pytest.raises(ValueError, match="dataset: expected one that can be read 2 times"):
        PatchMemory.build(Encoder(), zip(images, masks, strict=True), CLASSES, epochs=2)


def test_encoders_of_all_kinds():
    images, masks = scene(size=32)
    images, masks = images[:, :, :16], masks[:, :16]  # a grid of 4 x 8
    module = Encoder().eval()
    kinds = {
        "maps": module,
        "function": lambda x: module(x).detach(),
        "tokens": lambda x: module(x).flatten(2).mT,
        "float64": lambda x: module(x).double(),
        "bfloat16": lambda x: module(x).bfloat16(),
    }
    memories = {
        name: PatchMemory.build(encoder, [(images, masks)], CLASSES)
        for name, encoder in kinds.items()
    }
    for name in ("function", "tokens"):
        assert torch.equal(memories[name].features, memories["maps"].features)
        assert torch.equal(memories[name].labels, memories["maps"].labels)
    assert memories["float64"].features.dtype == torch.float64
    assert memories["bfloat16"].features.dtype == torch.float32
    wide = PatchMemory.build(kinds["tokens"], [(images, masks)], CLASSES, grid=(2, 16))
    assert not torch.equal(wide.labels, memories["maps"].labels)
    given = PatchMemory.build(kinds["tokens"], [(images, masks)], CLASSES, patch_size=4)
    assert torch.equal(given.labels, memories["maps"].labels)


def test_masks_of_another_size_than_the_image_and_with_a_channel():
    images, masks = scene()
    large = masks[:, None].repeat_interleave(2, 2).repeat_interleave(2, 3)
    memory = PatchMemory.build(encoder := Encoder(), [(images, large)], CLASSES)
    small = PatchMemory.build(encoder, [(images, masks)], CLASSES)
    assert torch.equal(memory.labels, 4 * small.labels)


def test_arrays_and_images_of_several_sizes():
    images, masks = scene()
    pairs = [(images[i].numpy(), masks[i].numpy()) for i in range(4)]
    pairs += [(images[i, :, :16].numpy(), masks[i, :16].numpy()) for i in (4, 5)]
    memory = PatchMemory.build(Encoder(), pairs, CLASSES)
    assert memory.origins[:, 0].bincount().tolist() == [64] * 4 + [32] * 2


@pytest.mark.parametrize("fails", [False, True])
def test_the_encoder_is_left_as_it_was(fails):
    encoder = nn.Sequential(Encoder(), nn.BatchNorm2d(12), nn.Dropout())
    encoder.train()
    encoder[1].eval()  # a frozen layer
    seen = []

    def watch(*_):
        seen.append((torch.is_grad_enabled(), [module.training for module in encoder.modules()]))
        if fails:
            raise RuntimeError("out of memory")

    encoder.register_forward_hook(watch)
    flags = [module.training for module in encoder.modules()]
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    images, masks = scene()
    if fails:
        with pytest.raises(RuntimeError, match="out of memory"):
            PatchMemory.build(encoder, [(images, masks)], CLASSES)
    else:
        PatchMemory.build(encoder, [(images, masks)], CLASSES)
    assert seen == [(False, [False] * len(flags))]
    assert [module.training for module in encoder.modules()] == flags
    assert torch.is_grad_enabled()
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, before[name]), name


def build(size=None):
    images, masks = scene()
    return PatchMemory.build(Encoder(), list(zip(images, masks, strict=True)), CLASSES, size=size)


def test_search_is_knn():
    memory = build()
    queries = torch.randn(3, 7, 12)
    scores, indices = memory.search(queries, 5)
    cosines = torch.cosine_similarity(queries[:, :, None], memory.features, dim=3)
    expected = cosines.sort(dim=2, descending=True)
    torch.testing.assert_close(scores, expected.values[..., :5])
    assert torch.equal(indices, expected.indices[..., :5])


def test_saves_and_loads(tmp_path):
    pytest.importorskip("safetensors")
    memory = build(60)
    path = tmp_path / "memory.safetensors"
    memory.save(path)
    memory.save(str(path))  # over the old one
    loaded = PatchMemory.load(path)
    for name in ("features", "labels", "origins"):
        ours, theirs = getattr(memory, name), getattr(loaded, name)
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    assert os.listdir(tmp_path) == ["memory.safetensors"]
    assert PatchMemory.load(path, device="cpu").search(memory.features[:1], 1)[1].item() == 0


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "memory.safetensors"
    memory = build(60)
    memory.save(path)
    old = path.read_bytes()

    def half(tables, unfinished, metadata):
        unfinished.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(safetensors, "save_file", half)
    with pytest.raises(OSError, match="no space"):
        memory.save(path)
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["memory.safetensors"]
    with pytest.raises(ValueError, match="save: path: expected a file in a folder that exists"):
        memory.save(tmp_path / "missing" / "memory.safetensors")


def test_damaged_files_are_refused(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "memory.safetensors"
    build(60).save(path)
    whole = path.read_bytes()
    damaged = [whole[:n] for n in (0, 4, 100, len(whole) // 2, len(whole) - 1)]
    damaged += [whole + b"x", b"x" + whole[1:]]
    for place in (len(whole) - 7, len(whole) // 2):
        damaged.append(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"PatchMemory.load: path: expected .* damaged"):
            PatchMemory.load(path)
    safetensors.save_file({"features": torch.zeros(2, 2)}, path)
    with pytest.raises(ValueError, match=r"expected a file that PatchMemory.save wrote, got .* fe"):
        PatchMemory.load(path)
    with pytest.raises(FileNotFoundError, match="path: expected a file that exists"):
        PatchMemory.load(tmp_path / "none")


def test_saving_keeps_links_and_modes_and_loading_checks_the_tables(tmp_path):
    pytest.importorskip("safetensors")
    path, link = tmp_path / "memory.safetensors", tmp_path / "link"
    link.symlink_to(path)
    memory = build(60)
    memory.save(link)
    assert link.is_symlink()
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode
    memory.labels = memory.labels[1:]
    memory.save(path)
    with pytest.raises(
        ValueError, match=r"memory\.safetensors: PatchMemory: labels: expected shape"
    ):
        PatchMemory.load(path)


def test_progress_counts_images(capsys):
    pytest.importorskip("tqdm")
    images, masks = scene()
    PatchMemory.build(
        Encoder(), list(zip(images, masks, strict=True)), CLASSES, epochs=2, progress=True
    )
    shown = capsys.readouterr().err
    assert "memory, epoch 2 of 2" in shown
    assert "6.00/6.00" in shown


def tokens_with_class_token(images):
    return torch.rand(len(images), 65, 8)


@pytest.mark.parametrize(
    ("encoder", "settings", "error", "words"),
    [
        (
            lambda x: (x, None),
            {},
            TypeError,
            r"encoder: expected tokens .* got tuple; wrap it, .* after model.eval",
        ),
        (lambda x: x[:1], {}, ValueError, r"encoder: expected tokens .* of the 6 images"),
        (lambda x: x.long(), {}, ValueError, "encoder: expected .* floating"),
        (lambda x: x.flatten(1), {}, ValueError, r"encoder: .* got torch.float32 of shape \(6, 30"),
        (tokens_with_class_token, {}, ValueError, ".* got 65 tokens; leave out the class token"),
        (
            lambda x: torch.rand(6, 50, 8),
            {},
            ValueError,
            "encoder: expected a grid of square patches .* got 50",
        ),
        (lambda x: torch.rand(6, 64, 8), {"grid": (8, 7)}, ValueError, "grid: expected 8 x 7"),
        (lambda x: torch.rand(6, 64, 8), {"grid": 8}, TypeError, r"grid: expected \(rows, col"),
        (lambda x: torch.rand(6, 64, 8), {"patch_size": 8}, ValueError, "patch_size: expected 4"),
        (lambda x: torch.rand(6, 64, 8), {"patch_size": 0}, ValueError, "patch_size: expected an"),
        (lambda x: torch.rand(6, 8, 7, 7), {}, ValueError, r"multiples of the grid, 7 x 7, got 32"),
        (lambda x: x / 0, {}, ValueError, "encoder: expected finite features"),
        (nn.Identity(), {"size": 5}, ValueError, "size: expected at least a patch .* 6, got 5"),
        (nn.Identity(), {"size": 0}, ValueError, "size: expected an integer >= 1, or None"),
        (nn.Identity(), {"epochs": 0}, ValueError, "epochs: expected an integer >= 1"),
        (nn.Identity(), {"size": 9, "num_images": 3}, ValueError, "num_images: expected at most 3"),
    ],
)
def test_refusals(encoder, settings, error, words):
    images, masks = scene()
    with pytest.raises(error, match=f"PatchMemory.build: {words}|patch_label_counts: .*{words}"):
        PatchMemory.build(encoder, list(zip(images, masks, strict=True)), CLASSES, **settings)


@pytest.mark.parametrize(
    ("dataset", "settings", "error", "words"),
    [
        ([], {}, ValueError, "dataset: expected at least one pair"),
        ([torch.zeros(3, 8, 8)], {}, TypeError, r"dataset: expected pairs .* got Tensor"),
        ([(1, 2, 3)], {}, TypeError, r"dataset: expected pairs .* got tuple of 3"),
        ([(torch.zeros(3, 8, 8), torch.zeros(2, 8, 8).int())], {}, ValueError, "dataset: expected"),
        ([(torch.zeros(3, 8, 8), torch.zeros(8, 8))], {}, TypeError, "masks: expected integer cla"),
        (
            [(torch.zeros(3, 8, 8), torch.full((8, 8), 7))],
            {},
            ValueError,
            "classes from 0 to 4 .*7",
        ),
        (iter([]), {"size": 9}, ValueError, "num_images: expected the number of images"),
    ],
)
def test_bad_datasets(dataset, settings, error, words):
    with pytest.raises(error, match=words):
        PatchMemory.build(nn.Identity(), dataset, CLASSES, **settings)


@pytest.mark.parametrize(
    ("tables", "error", "words"),
    [
        ((torch.zeros(3, 4).int(), torch.zeros(3, 2)), TypeError, "features: expected a floating"),
        ((torch.zeros(3), torch.zeros(3, 2)), ValueError, r"features: expected shape \(M, D\)"),
        ((torch.zeros(3, 4), torch.zeros(2, 2)), ValueError, r"labels: expected shape \(3, C\)"),
        ((torch.zeros(3, 4), torch.zeros(3, 0)), ValueError, r"labels: expected shape \(3, C\)"),
        ((torch.zeros(3, 4), None), TypeError, "labels: expected a torch.Tensor, got NoneType"),
        ((torch.zeros(3, 4), torch.zeros(3, 2), torch.zeros(3)), ValueError, r"origins: .*\(3, 2"),
    ],
)
def test_tables_that_do_not_fit(tables, error, words):
    with pytest.raises(error, match=f"PatchMemory: {words}"):
        PatchMemory(*tables)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((None, 3, (1, 1)), TypeError, "masks: expected a torch.Tensor, got NoneType"),
        ((torch.zeros(2, 4), 3, (1, 1)), TypeError, "restored by"),
        ((torch.zeros(4, 4).int(), 3, (1, 1)), ValueError, r"masks: expected shape \(B, H, W\)"),
        ((torch.zeros(1, 4, 6).int(), 3, (2, 4)), ValueError, "multiples of the grid, 2 x 4"),
        ((torch.zeros(1, 4, 4).int(), 0, (1, 1)), ValueError, "num_classes: expected an integer"),
        ((torch.zeros(1, 4, 4).int(), 3, (0, 1)), ValueError, "grid: expected an integer >= 1"),
    ],
)
def test_bad_masks(arguments, error, words):
    with pytest.raises(error, match=f"patch_label_counts: .*{words}"):
        patch_label_counts(*arguments)
    masks = torch.zeros(1, 4, 4).int()
    with pytest.raises(ValueError, match="ignored_as: expected a class from 0 to 2, or None"):
        patch_label_counts(masks, 3, (1, 1), ignored_as=3)
