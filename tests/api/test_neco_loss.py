"""NeCo's loss: against its published steps with diffsort, as a module, and what it refuses."""

import copy
import io

import neco_composition
import pytest
import torch
from crops import gradients, random_batch, random_crops, random_references

import fmkernels
from fmkernels.api import NeCoLoss, ProjectionHead, intersection_boxes


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"metric": "euclidean", "steepness": 5.0},
        {"grid_size": 4, "steepness": 30.0, "teacher_steepness": 80.0},
        {"grid_size": 3, "network": "odd_even"},
    ],
    ids=str,
)
@pytest.mark.parametrize("masked", [False, True])
def test_is_the_published_steps(settings, masked):
    student, teacher, boxes = random_batch()
    references = random_references(6, 2, 8, settings.get("grid_size", 7))
    mask = torch.zeros(2, 2, 16, 16, dtype=torch.bool)
    mask[:, :, 3:13, 2:12] = True
    mask = mask if masked else None
    criterion = NeCoLoss(queue_size=None, **settings)
    ours = criterion(student, teacher, boxes, mask, references=references)
    theirs = neco_composition.neco_loss(student, teacher, boxes, references, mask=mask, **settings)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=0)
    for a, b in zip(gradients(ours, student), gradients(theirs, student), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * b.abs().max().item())


class SmallViT(torch.nn.Module):
    """(B, 3, 8·H, 8·W) -> (B, 16, H, W): patches of 8 pixels, two blocks, NeCo's head."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Conv2d(3, 32, 8, stride=8)
        self.position = torch.nn.Parameter(0.1 * torch.randn(1, 32, 10, 10))
        self.blocks = torch.nn.ModuleList(
            torch.nn.TransformerEncoderLayer(32, 4, 64, 0.0, "gelu", batch_first=True)
            for _ in range(2)
        )
        self.head = ProjectionHead(32, hidden_dim=64, out_dim=16)

    def forward(self, images):
        tokens = self.embed(images)
        size = tokens.shape[2:]
        tokens = tokens + torch.nn.functional.interpolate(self.position, size, mode="bilinear")
        tokens = tokens.flatten(2).mT
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(tokens).mT.unflatten(-1, size)


def images_and_boxes(dtype=torch.float64, batch=2):
    """Crops of smooth random pictures: two global of 80 pixels, one local of 40."""
    sizes = ((10, 10), (10, 10), (5, 5))
    picture = torch.nn.functional.interpolate(
        torch.rand(batch, 3, 20, 20, dtype=dtype), (320, 320), mode="bicubic"
    )
    crops = random_crops(batch, sizes).round()
    images = []
    for v, (height, width) in enumerate(sizes):
        parts = []
        for b in range(batch):
            x1, y1, x2, y2 = crops[b, v].int().tolist()
            part = picture[b : b + 1, :, y1:y2, x1:x2]
            parts.append(torch.nn.functional.interpolate(part, (8 * height, 8 * width)))
        images.append(torch.cat(parts))
    return images, intersection_boxes(crops, sizes)


def train(loss_of, steps, dtype=torch.float64, seed=0):
    """Losses of training a small ViT; the teacher follows it slowly."""
    torch.manual_seed(seed)
    student = SmallViT().to(dtype)
    teacher = copy.deepcopy(student)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    losses = []
    for _ in range(steps):
        images, boxes = images_and_boxes(dtype)
        with torch.no_grad():
            teacher_maps = [teacher(crop) for crop in images[:2]]
        loss = loss_of([student(crop) for crop in images], teacher_maps, boxes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
                slow.lerp_(fast, 0.05)
        losses.append(loss.item())
    return losses


def test_a_vit_trains_the_same():
    criterion = NeCoLoss(grid_size=4, queue_size=None)

    def references(teacher_maps):
        patches = torch.cat([m.permute(0, 2, 3, 1).flatten(0, 2) for m in teacher_maps])
        return patches[torch.randperm(len(patches))][: 4 * 2 * 16].view(4, 2, 16, 16)

    def ours(student, teacher, boxes):
        return criterion(student, teacher, boxes, references=references(teacher))

    def theirs(student, teacher, boxes):
        return neco_composition.neco_loss(student, teacher, boxes, references(teacher), grid_size=4)

    torch.testing.assert_close(
        torch.tensor(train(ours, 20), dtype=torch.float64),
        torch.tensor(train(theirs, 20), dtype=torch.float64),
        rtol=1e-9,
        atol=0,
    )


@pytest.mark.parametrize("queue_size", [None, 128])
def test_learns(queue_size):
    """A student of the pixels finds the order of a teacher that sees only coarse colours."""

    def teacher(images):
        coarse = torch.nn.functional.avg_pool2d(images, 4)
        colours = torch.nn.functional.unfold(coarse, 2, stride=2) - 0.5
        return colours.unflatten(-1, (images.shape[2] // 8, images.shape[3] // 8))

    student = torch.nn.Sequential(
        torch.nn.Conv2d(3, 64, 8, stride=8), torch.nn.GELU(), torch.nn.Conv2d(64, 12, 1)
    )
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    criterion = NeCoLoss(4, queue_size, dim=12)
    excess = []  # over the loss of a student that equals the teacher
    for _ in range(60):
        images, boxes = images_and_boxes(torch.float32, batch=4)
        images = [crop.contiguous() for crop in images]
        maps = [teacher(x) for x in images]
        loss = criterion([student(x) for x in images], maps[:2], boxes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        excess.append(loss.item() - criterion(maps, maps[:2], boxes).item())
    assert sum(excess[-10:]) < 0.7 * sum(excess[:10])


def test_the_teacher_is_never_in_the_graph():
    student, teacher, boxes = random_batch()
    teacher = [tokens.requires_grad_() for tokens in teacher]
    NeCoLoss(queue_size=None)(student, teacher, boxes).backward()
    assert all(tokens.grad is None for tokens in teacher)
    assert all(tokens.grad.abs().sum() > 0 for tokens in student)


def test_references_come_from_the_pair_without_a_queue(monkeypatch):
    student, teacher, boxes = random_batch()
    seen = spy(monkeypatch)
    NeCoLoss(queue_size=None)(student, teacher, boxes)
    patches, references = (
        seen["teacher"].unflatten(0, (6, 2)),
        seen["references"].unflatten(0, (6, 2)),
    )
    for pair in range(6):
        a, b = (rows[pair].flatten(0, 1)[:, 0].sort().values for rows in (patches, references))
        assert torch.equal(a, b)
        assert not torch.equal(patches[pair], references[pair])


def spy(monkeypatch):
    """The features that NeCoLoss hands to the op."""
    import fmkernels.api.neco as module

    seen = {}

    def recorded(student, teacher, references, **settings):
        seen.update(student=student, teacher=teacher, references=references, **settings)
        return fmkernels.patch_neighbor_loss(student, teacher, references, **settings)

    monkeypatch.setattr(module, "patch_neighbor_loss", recorded)
    return seen


def test_references_are_foreground_only(monkeypatch):
    student, teacher, boxes = random_batch()
    mask = torch.zeros(2, 2, 16, 16)
    mask[:, :, 4:12, 4:12] = 1
    for tokens in teacher:  # the first feature tells foreground
        tokens[:, 0] = mask[:, 0]
    seen = spy(monkeypatch)
    criterion = NeCoLoss(queue_size=None)
    criterion(student, teacher, boxes, mask)
    assert (seen["references"][..., 0] > 1 - 1e-6).all()
    counted = seen["mask"] > 0
    assert 0 < counted.sum() < counted.numel()
    assert (seen["teacher"][..., 0][counted] > 1 - 1e-6).all()
    with_queue = NeCoLoss(queue_size=128, dim=8)
    with_queue(student, teacher, boxes, mask)
    assert with_queue.queue.written.tolist() == [20, 20]
    assert (with_queue.queue.patches[:, :20, 0] == 1).all()


def test_queue_is_first_in_first_out():
    criterion = NeCoLoss(grid_size=2, queue_size=50, dim=8)
    for step in range(4):
        student, teacher, boxes = random_batch(dtype=torch.float32)
        teacher = [torch.full_like(tokens, step + 1) for tokens in teacher]
        criterion(student, teacher, boxes)
    assert criterion.queue.written.tolist() == [80, 80]
    counts = [(criterion.queue.patches[..., 0] == step).sum().item() for step in (1, 2, 3, 4)]
    assert counts == [0, 20, 40, 40]


def test_references_come_from_the_queue_of_the_same_crop(monkeypatch):
    criterion = NeCoLoss(grid_size=2, queue_size=50, dim=8)
    student, teacher, boxes = random_batch(dtype=torch.float32)
    teacher = [torch.full_like(tokens, g + 1.0) for g, tokens in enumerate(teacher)]
    seen = spy(monkeypatch)
    criterion(student, teacher, boxes)
    references = seen["references"].unflatten(0, (2, 3, 2))
    assert (references[0] == 1).all()
    assert (references[1] == 2).all()


def test_evaluation_leaves_the_queue_alone():
    criterion = NeCoLoss(queue_size=128, dim=8).eval()
    student, teacher, boxes = random_batch(dtype=torch.float32)
    assert criterion(student, teacher, boxes).isfinite()
    assert criterion.queue.written.tolist() == [0, 0]


def test_no_foreground_gives_zero():
    student, teacher, boxes = random_batch()
    for queue_size in (None, 128):
        criterion = NeCoLoss(queue_size=queue_size, dim=8)
        loss = criterion(student, teacher, boxes, torch.zeros(2, 2, 16, 16))
        assert loss.item() == 0
        assert all((grad == 0).all() for grad in gradients(loss, student))


def test_state_dict_deepcopy_and_devices():
    criterion = NeCoLoss(queue_size=128, dim=8)
    student, teacher, boxes = random_batch(dtype=torch.float32)
    criterion(student, teacher, boxes)
    file = io.BytesIO()
    torch.save(criterion.state_dict(), file)
    file.seek(0)
    restored = NeCoLoss(queue_size=128, dim=8)
    restored.load_state_dict(torch.load(file, weights_only=True))
    twin = copy.deepcopy(criterion)
    criterion(student, teacher, boxes)
    assert twin.queue.written.tolist() == restored.queue.written.tolist() == [20, 20]
    assert torch.equal(twin.queue.patches, restored.queue.patches)
    assert not torch.equal(twin.queue.patches, criterion.queue.patches)
    assert not list(criterion.buffers())
    moved = criterion.to("meta").queue
    assert moved.patches.device.type == moved.written.device.type == "meta"
    assert restored.double().queue.patches.dtype == torch.float64
    assert restored.queue.written.dtype == torch.int64
    with pytest.raises(ValueError, match=r"queue_size, dim\), got \(2, 128, 8\)"):
        NeCoLoss(queue_size=64, dim=8).load_state_dict(twin.state_dict())
    assert repr(twin).startswith("NeCoLoss(\n  grid_size=7, metric='cosine'")


def test_gradients_accumulate():
    student, teacher, boxes = random_batch(4)
    references = random_references(6, 4, 8)
    criterion = NeCoLoss(queue_size=None)
    whole = gradients(criterion(student, teacher, boxes, references=references), student)
    for part in (slice(0, 2), slice(2, 4)):
        loss = criterion(
            [tokens[part] for tokens in student],
            [tokens[part] for tokens in teacher],
            tuple(box[part] for box in boxes),
            references=references[:, part],
        )
        (loss / 2).backward()
    for tokens, grad in zip(student, whole, strict=True):
        torch.testing.assert_close(tokens.grad, grad)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("queue_size", [None, 128])
def test_compiles_as_one_graph(queue_size, masked):
    torch._dynamo.reset()
    student, teacher, boxes = random_batch(dtype=torch.float32)
    mask = torch.ones(2, 2, 16, 16) if masked else None
    references = random_references(6, 2, 8).float()
    eager = NeCoLoss(queue_size=queue_size, dim=8)
    compiled = torch.compile(copy.deepcopy(eager), fullgraph=True, backend="aot_eager")
    arguments = (student, teacher, boxes, mask)
    expected = eager(*arguments, references=references)
    loss = compiled(*arguments, references=references)
    torch.testing.assert_close(loss, expected)
    for a, b in zip(gradients(loss, student), gradients(expected, student), strict=True):
        torch.testing.assert_close(a, b)
    compiled(*arguments)
    if queue_size:
        assert compiled.queue.written.tolist() == [40, 40]


@pytest.mark.parametrize("queue_size", [None, 64])
def test_inductor_gives_the_same(queue_size):
    """One pair of small crops, because all the time is the compiler's, which unrolls the pairs."""
    torch._dynamo.reset()
    student, teacher, boxes = random_batch(2, 8, ((6, 6), (4, 4)), 1, torch.float32)
    mask = None
    if queue_size:
        mask = torch.zeros(2, 1, 6, 6)
        mask[:, :, 1:5, 1:5] = 1
    eager = NeCoLoss(3, queue_size, dim=8, num_globals=1)
    options = {"fallback_random": True}  # eager PyTorch's random numbers, for the same references
    compiled = torch.compile(copy.deepcopy(eager), fullgraph=True, options=options)
    for seed in range(2):  # with an empty queue, and a filled one
        losses = []
        for criterion in (compiled, eager):
            torch.manual_seed(seed)
            losses.append(criterion(student, teacher, boxes, mask))
        torch.testing.assert_close(*losses)
        for a, b in zip(*(gradients(loss, student) for loss in losses), strict=True):
            torch.testing.assert_close(a, b)
    if queue_size:
        assert torch.equal(compiled.queue.patches, eager.queue.patches)
        assert compiled.queue.written.tolist() == [40]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_maps_are_computed_in_float32(dtype):
    student, teacher, boxes = random_batch(dtype=torch.float32)
    references = random_references(6, 2, 8)
    criterion = NeCoLoss(queue_size=None)
    student = [tokens.detach().to(dtype).requires_grad_() for tokens in student]
    teacher = [tokens.to(dtype) for tokens in teacher]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = criterion(student, teacher, boxes, references=references.float())
    wide = [tokens.detach().float().requires_grad_() for tokens in student]
    expected = criterion(
        wide, [tokens.float() for tokens in teacher], boxes, references=references.float()
    )
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    for a, b in zip(gradients(loss, student), gradients(expected, wide), strict=True):
        assert a.dtype == dtype
        assert torch.equal(a, b.to(dtype))
