"""Scenes of digits: exact, reproducible, nothing of a test scene in training; and the demo itself."""

import pytest
import torch

pytest.importorskip("sklearn")

from fmkernels.demo import in_context, photographs, scenes


@pytest.fixture
def textures(monkeypatch):
    """Photographs whose left third is 0 and whose rest is 0.25, so that digits are light."""
    photo = torch.full((3, 300, 450), 0.25)
    photo[:, :, : photographs.border(photo)] = 0
    monkeypatch.setattr(photographs, "load", lambda: {"plain": photo})


@pytest.mark.parametrize("test", [False, True])
def test_masks_are_exact_and_textures_disjoint(textures, test):
    drawn = scenes.make(20, seed=0, test=test)
    texture = torch.tensor(0.0 if test else 0.25)
    for image, mask in drawn.pairs():
        distance = (image - texture).amax(dim=0)  # a digit is at least 0.65 there, blended at edges
        assert (distance[mask > 0] > 0.19).all()
        assert (distance[mask == 0] <= 0.51 * (1 - texture)).all()
        assert (distance == 0).any()
    assert set(drawn.masks.unique().tolist()) == set(range(len(scenes.CLASSES)))
    assert torch.equal(
        drawn.tags()[3], torch.tensor([float((drawn.masks[3] == c).any()) for c in range(1, 7)])
    )


def test_digits_are_disjoint():
    train, test = (
        {d.numpy().tobytes() for c in scenes._digits(t) for d in c} for t in (False, True)
    )
    assert train
    assert test
    assert not train & test


def test_the_same_arguments_give_the_same_scenes(textures):
    first, again, other = (scenes.make(3, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.masks, again.masks)
    assert not torch.equal(first.images, other.images)
    assert scenes.make(2, seed=0, size=36, attempts=1).images.shape == (2, 3, 36, 36)


def test_crops_show_what_their_boxes_say(monkeypatch):
    monkeypatch.setattr(in_context, "jitter", lambda images: images)
    line = (torch.arange(48) + 0.5).expand(1, 48, 48)
    image = torch.cat([line, line.mT, line])[None]  # the place of every pixel
    views, boxes = in_context.random_crops(image.expand(5, -1, -1, -1))
    for v, view in enumerate(views):
        size = view.shape[3]
        x1, y1, x2, y2 = boxes[:, v].unbind(dim=1)
        for channel, (low, high) in enumerate(((x1, x2), (y1, y2))):
            steps = (torch.arange(size) + 0.5) / size
            expected = torch.lerp(low[:, None], high[:, None], steps).clamp(0.5, 47.5)
            seen = view[:, channel].mean(dim=1 if channel == 0 else 2)
            torch.testing.assert_close(seen, expected, atol=1e-3, rtol=0)


def test_runs_and_draws(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    make = scenes.make
    monkeypatch.setattr(scenes, "make", lambda count, **rest: make(min(count, 24), **rest))
    monkeypatch.setattr(in_context, "SIZES", (24, 240))  # and all, 24 · 144
    lines = []
    report = in_context.run(2, steps=3, neco_steps=2, pictures=tmp_path, say=lines.append)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(in_context.PICTURES)
    assert list(report.by_size) == [24, 240, 3456]
    assert report.by_size[3456] == report.before[0]
    assert len(report.before) == len(report.control) == len(report.after) == 2
    assert all(0 < miou < 1 for part in report[1:] for miou in part)
    assert report.before != report.after
    assert any("gain by 2 steps of NeCo" in line and "±" in line for line in lines)


def test_pretraining_learns_the_digits():
    torch.manual_seed(0)
    model = in_context.Classifier()
    labelled = scenes.make(300, seed=3, size=in_context.ONE_DIGIT, attempts=1)
    in_context.pretrain(model, labelled, 120, in_context.LEARNING_RATE)
    right = model.eval()(labelled.images).argmax(dim=1) == labelled.tags().argmax(dim=1)
    assert right.float().mean() > 0.35  # 0.50 to 0.56 when this was written; chance is 0.17


def test_neco_brings_student_and_teacher_together():
    torch.manual_seed(0)
    losses = in_context.neco(in_context.Encoder(), scenes.make(60, seed=1).images, 24)
    assert sum(losses[-6:]) < sum(losses[:6]) - 6 * 0.1
