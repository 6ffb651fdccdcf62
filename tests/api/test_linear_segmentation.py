"""The linear head beside the published order of steps, and trained on scikit-learn's digits."""

import copy
import io

import pytest
import torch
from torch.nn import functional as F

from fmkernels.api import ConfusionMatrix, LinearSegmentationHead


def published(head, maps, size):
    """Upsample the features, then convolve, as Leopart's and NeCo's linear_finetune.py."""
    maps = F.interpolate(maps, size=size, mode="bilinear")
    return F.conv2d(maps, head.weight, head.bias)


def kept_for_backward(function):
    """Bytes of the tensors that the graph of function() keeps, each storage once."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    assert result.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("size", [(100, 100), (17, 31), (7, 9), (3, 5)])
def test_equals_the_published_order(size):
    head = LinearSegmentationHead(12, 5).double()
    torch.nn.init.normal_(head.bias)
    maps = torch.randn(2, 12, 7, 9, dtype=torch.float64, requires_grad=True)
    scores, expected = head(maps, size), published(head, maps, size)
    assert scores.shape == (2, 5, *size)
    assert (scores - expected).abs().max() < 1e-12
    target = torch.randint(5, (2, *size))
    inputs = (head.weight, head.bias, maps)
    ours = torch.autograd.grad(F.cross_entropy(scores, target), inputs)
    theirs = torch.autograd.grad(F.cross_entropy(expected, target), inputs)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() < 1e-12


def test_keeps_patches_instead_of_pixels():
    """ViT-S/16 at 448 pixels, masks of 100 pixels as published: (100 / 28)² = 12.8 times less."""
    head = LinearSegmentationHead(384, 21)
    maps = torch.randn(1, 384, 28, 28)
    ours = kept_for_backward(lambda: head(maps, 100))
    theirs = kept_for_backward(lambda: published(head, maps, (100, 100)))
    weight = head.weight.untyped_storage().nbytes()
    assert ours == maps.untyped_storage().nbytes() + weight
    assert theirs == 384 * 100**2 * 4 + weight
    assert (theirs - weight) / (ours - weight) == pytest.approx((100 / 28) ** 2)


def test_tokens_and_maps_are_the_same():
    head = LinearSegmentationHead(6, 3)
    maps = torch.randn(2, 6, 4, 4)
    tokens = maps.flatten(2).mT
    assert torch.equal(head(tokens, 9), head(maps, (9, 9)))
    torch.testing.assert_close(head(tokens.contiguous()), head(maps))
    wide = torch.randn(2, 6, 2, 8)
    assert torch.equal(head(wide.flatten(2).mT, 9, grid=(2, 8)), head(wide, 9, grid=(2, 8)))
    assert head(maps[:0], 9).shape == (0, 3, 9, 9)


def test_frozen_features_get_no_gradient_and_half_types_work():
    head = LinearSegmentationHead(6, 3)
    maps = torch.randn(2, 6, 4, 4)
    expected = head(maps, 9)
    half = head(maps.bfloat16(), 9)  # a float32 head on stored bfloat16 features
    assert torch.equal(half, head(maps.bfloat16().float(), 9))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = head(maps, 9)
        assert head(maps).dtype == torch.bfloat16
    assert scores.dtype == torch.float32
    assert 0 < (scores - expected).abs().max() < 0.05
    scores.sum().backward()
    assert maps.grad is None
    assert head.weight.grad.isfinite().all()
    assert head.bfloat16()(maps, 9).dtype == torch.float32


def test_state_dict_is_the_published_one():
    head = LinearSegmentationHead(6, 3)
    released = {
        "finetune_head." + name: value
        for name, value in torch.nn.Conv2d(6, 3, 1).state_dict().items()
    }
    head.load_state_dict({name.removeprefix("finetune_head."): v for name, v in released.items()})
    assert torch.equal(head.weight, released["finetune_head.weight"])
    file = io.BytesIO()
    torch.save(head.state_dict(), file)
    file.seek(0)
    other = LinearSegmentationHead(6, 3)
    other.load_state_dict(torch.load(file, weights_only=True))
    twin = copy.deepcopy(head)
    maps = torch.randn(1, 6, 4, 4)
    assert torch.equal(other(maps, 8), head(maps, 8))
    assert torch.equal(twin(maps, 8), head(maps, 8))
    assert repr(head) == "LinearSegmentationHead(6, 3)"


def test_compiles_as_one_graph():
    head = LinearSegmentationHead(6, 3)
    tokens = torch.randn(2, 16, 6)
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens, 9), head(tokens, 9))


def digit_scenes(number, seed):
    """Canvases of 3 × 3 digits: pixels as features of a patch, digits and empty cells as classes."""
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = datasets.load_digits(return_X_y=True)
    images, labels = torch.from_numpy(images).float() / 16, torch.from_numpy(labels)
    few = labels < 4
    images, labels = images[few], labels[few]
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(images), (number, 9), generator=generator)
    empty = torch.rand(number, 9, generator=generator) < 0.3
    tokens = images[chosen].masked_fill(empty.unsqueeze(2), 0)
    cells = (labels[chosen] + 1).masked_fill(empty, 0).view(number, 3, 3)
    return tokens, cells.repeat_interleave(8, dim=1).repeat_interleave(8, dim=2)


def test_learns_to_segment_digits():
    """With the published optimiser. Chance is 0.2 of the pixels."""
    tokens, masks = digit_scenes(60, seed=0)
    others, truth = digit_scenes(20, seed=1)
    head = LinearSegmentationHead(64, 5)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)

    def measured():
        confusion = ConfusionMatrix(5)
        with torch.no_grad():
            confusion.update(head(others, 24).argmax(dim=1), truth)
        return confusion.miou()

    before, losses = measured(), []
    for _ in range(60):
        loss = F.cross_entropy(head(tokens, 24), masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert before < 0.3
    assert measured() > 0.6


def test_refusals():
    head = LinearSegmentationHead(6, 3)
    maps, tokens = torch.randn(2, 6, 4, 4), torch.randn(2, 16, 6)
    cases = (
        (lambda: head(tokens[..., :5]), r"features: expected width 6, .* got \(2, 16, 5\)"),
        (lambda: head(torch.randn(2, 17, 6)), "features: expected a square .*, got 17; pass"),
        (lambda: head(tokens, grid=(3, 5)), r"grid: expected h·w = 16, .* got \(3, 5\)"),
        (lambda: head(maps, grid=(2, 8)), r"grid: expected \(4, 4\), .* got \(2, 8\)"),
        (lambda: head(maps[0, 0]), r"features: expected maps \(B, D, h, w\) or tokens"),
        (lambda: head(maps, 0), "size: expected an integer >= 1, got 0"),
        (lambda: head(maps, (4, 4, 4)), r"size: expected \(H, W\) or one number"),
        (lambda: LinearSegmentationHead(0, 3), "dim: expected an integer >= 1"),
        (lambda: LinearSegmentationHead(6, 2.5), "num_classes: expected an integer >= 1"),
    )
    for call, words in cases:
        with pytest.raises(ValueError, match="LinearSegmentationHead: " + words):
            call()
    with pytest.raises(TypeError, match="features: expected a floating-point dtype"):
        head(maps.long())
