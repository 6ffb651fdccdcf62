"""What follows the layer is computed for the tokens that are read, and to the same effect."""

import pytest
import torch
from fungi_models import LAST, Block, SmallViT, small_vit
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fmkernels.api import DINO, KL, FungiExtractor, ImageViews
from fmkernels.api.fungi_passes import _WHOLE
from fmkernels.api.fungi_rows import Deferred, NotDeferrableError, deferred

VIEWS = ImageViews(size=16, local_crops=2, stride_scale=2)


def extractor_of(model, **settings):
    return FungiExtractor(model, LAST, [KL(32), DINO(16)], views=VIEWS, **settings)


class Scaled(Block):
    """timm's, with scales, dropout that is off, and sums in both orders."""

    def __init__(self, dim, heads):
        super().__init__(dim, heads)
        self.scale, self.drop = nn.Parameter(torch.rand(dim)), nn.Dropout(0.5)

    def forward(self, x):
        x = self.drop(self.attn(self.norm1(x))) * self.scale + x
        return 1 - (x - self.drop(self.mlp(self.norm2(x))) / 2).to(x.dtype)


class Gated(Block):
    """With an activation of two halves: all tokens of it are computed."""

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        gate, value = self.mlp[0](self.norm2(x)).chunk(2, dim=-1)
        return x + self.mlp[2](torch.cat([F.silu(gate) * value, value], dim=-1))


class Mixing(Block):
    """A second attention after the layer."""

    def forward(self, x):
        x = super().forward(x)
        return x + (x @ x.mT).softmax(dim=-1) @ x


class InPlace(Block):
    """Changes the input of a function that was noted."""

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        y = 2 * x
        x += 1
        return x + self.mlp(self.norm2(y))


class Plain(Block):
    def forward(self, x):
        residual = x.clone()
        x = self.attn(self.norm1(x))
        x += residual
        return x + self.mlp(self.norm2(x))


class Scripted(Block):
    """Compiled code is not asked what it does with its tensors."""

    def __init__(self, dim, heads):
        super().__init__(dim, heads)
        self.double = torch.jit.trace(lambda x: 2 * x, torch.ones(1, 2, dim))

    def forward(self, x):
        return self.double(super().forward(x))


class Off(Block):
    """Autograd is off for a part of the path, and must stay so for all tokens."""

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        with torch.no_grad():
            y = self.mlp(self.norm2(x))
        return x + y


BLOCKS = [Block, Scaled, Gated, Mixing, Off]
WHOLE = [InPlace, Plain, Scripted]


def model_of(block, pool, dtype=torch.float64):
    model = SmallViT(pool=pool)
    model.blocks[1] = block(24, 2)
    return model.to(dtype)


POOLS = {
    "cls": "cls",
    "mean": "mean",
    "last": lambda tokens, views: tokens[:, -1, :],
    "registers": lambda tokens, views: tokens[:, 0] + tokens[:, 1:4][:, 1:].sum(dim=1),
    "every other": lambda tokens, views: tokens[:, 1::2].mean(dim=1) + tokens[:, 2:3].squeeze(1),
    "by index": lambda tokens, views: tokens[:, torch.tensor([0, 3])].sum(dim=1),
    "all": lambda tokens, views: tokens.square().sum(dim=1),
}


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("block", BLOCKS + WHOLE)
def test_the_gradients_are_those_of_the_whole_pass(block, pool):
    model = model_of(block, None)
    extractor = extractor_of(model, pooling=POOLS[pool])
    batch = torch.rand(3, 3, 16, 16)
    found, features = extractor.gradients(batch), extractor(batch)
    _WHOLE.add(model)
    expected = extractor.gradients(batch)
    for name, (delta, activation) in found.items():
        ours = torch.einsum("bso,bsi->boi", delta, activation)
        theirs = torch.einsum("bso,bsi->boi", *expected[name])
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-15)
        torch.testing.assert_close(delta.sum(dim=1), expected[name][0].sum(dim=1))
    torch.testing.assert_close(extractor(batch), features)


@pytest.mark.parametrize(
    ("block", "whole"),
    [(block, False) for block in BLOCKS] + [(block, True) for block in WHOLE],
)
def test_which_models_are_computed_as_a_whole_from_then_on(block, whole):
    model = model_of(block, "cls")
    extractor_of(model)(torch.rand(1, 3, 16, 16))
    assert (model in _WHOLE) is whole


class Products(TorchDispatchMode):
    """Counts multiplications of matrices."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.count += found.numel() * args[-1].shape[0]
        return found


def products(model, pooling, batch):
    extractor = FungiExtractor(model, LAST, [KL(32)], views=VIEWS, pooling=pooling)
    extractor(batch)
    with Products() as products:
        extractor(batch)
    return products.count


@pytest.mark.parametrize("block", [Block, Scaled])
def test_the_layer_and_what_follows_run_for_the_token_that_is_read(block):
    batch = torch.rand(5, 3, 16, 16)
    model = model_of(block, None)
    saved = products(model, "mean", batch) - products(model, "cls", batch)
    forward = 24 * (24 + 48 + 48)  # the layer and the MLP, of a token
    backward = 24 * (48 + 48)  # the MLP's
    assert saved == 5 * (17 * forward + 16 * backward)  # all, after the first was tried


def test_nothing_is_computed_for_another_reader():
    model, sizes = small_vit(), []
    model.blocks[1].mlp[1].register_forward_hook(lambda m, a, out: sizes.append(out.shape))
    model.blocks[1].mlp[1].register_forward_hook(lambda m, a, out: sizes.append(type(out)))
    extractor_of(model)(torch.rand(2, 3, 16, 16))
    assert sizes[-2:] == [(8, 17, 48), Deferred]


def test_what_is_known_of_a_tensor_that_is_not_computed():
    tokens = deferred(torch.rand(2, 5, 3))
    assert isinstance(tokens, Deferred)
    assert tokens.shape == (2, 5, 3)
    assert (tokens.ndim, tokens.dim(), tokens.size(1), len(tokens)) == (3, 3, 5, 2)
    assert tokens.dtype == torch.float32
    assert tokens.device == torch.device("cpu")
    assert tokens.is_floating_point()
    assert not tokens.is_sparse
    assert not tokens.requires_grad
    assert (tokens * torch.ones(3, requires_grad=True)).requires_grad


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x[:, 0],
        lambda x: x[:, -2:],
        lambda x: x[:, 1:4][:, ::2] + 1,
        lambda x: x[:, 1:2] + x,
        lambda x: x + torch.arange(5.0).view(5, 1),
        lambda x: x * torch.arange(10.0).view(2, 5, 1),
        lambda x: (x + torch.arange(2.0).view(2, 1, 1))[:, 3],
        lambda x: F.layer_norm(x, (3,)).neg()[:, 2],
        lambda x: F.layer_norm(x, (5, 3))[:, 2],
        lambda x: F.dropout(x, 0.5, training=False)[:, 2],
        lambda x: F.linear(x, x[0]),
        lambda x: x[0],
        lambda x: x[:, 7:],
        lambda x: x[..., 1],
        lambda x: x.mean(dim=1),
        lambda x: torch.stack([x, x]),
        lambda x: x.transpose(0, 1),
        lambda x: x.half().float().contiguous(),
        lambda x: F.gelu(F.linear(x, torch.ones(7, 3), torch.ones(7)))[:, 1:3],
    ],
)
def test_functions_of_a_tensor_that_is_not_computed(function):
    tokens = torch.rand(2, 5, 3)
    found, expected = function(deferred(tokens)), function(tokens)
    assert found.shape == expected.shape
    torch.testing.assert_close(found + 0 * expected.sum(), expected)


def test_a_change_in_place_is_noticed():
    tokens = deferred(torch.rand(2, 5, 3))
    with pytest.raises(NotDeferrableError, match="changed a tensor in place"):
        tokens.add_(1)
    with pytest.raises(NotDeferrableError, match="changed a tensor in place"):
        F.relu(tokens - 0.5, inplace=True)
    other = torch.rand(2, 5, 3)
    later = tokens + other
    other.zero_()
    with pytest.raises(NotDeferrableError, match="a tensor was changed in place"):
        later[:, 1]
    with torch.inference_mode(), pytest.raises(NotDeferrableError, match="does not count"):
        deferred(torch.rand(2, 5, 3))


def test_dropout_that_is_on_is_drawn_once():
    dropped = F.dropout(deferred(torch.rand(2, 50, 3)), 0.5)
    assert type(dropped) is torch.Tensor
    assert 0 < int((dropped == 0).sum()) < 300


def test_a_model_s_own_error_is_what_is_raised():
    calls = []

    class Fails(Block):
        def forward(self, x):
            calls.append(x)
            super().forward(x)
            raise KeyError("of the model")

    model = model_of(Fails, "cls")
    with pytest.raises(KeyError, match="of the model") as caught:
        extractor_of(model)(torch.rand(1, 3, 16, 16))
    assert len(calls) == 1
    assert model not in _WHOLE
    if hasattr(caught.value, "__notes__"):  # from Python 3.11 on
        assert "views of shape (1, 3, 16, 16)" in caught.value.__notes__[0]


def test_an_error_that_does_not_come_again_is_not_swallowed():
    class Once(Block):
        failed = False

        def forward(self, x):
            found = super().forward(x)
            if not self.failed:
                self.failed = True
                raise RuntimeError("out of memory")
            return found

    model = model_of(Once, "cls")
    extractor = extractor_of(model)
    with pytest.raises(RuntimeError, match="out of memory"):
        extractor(torch.rand(1, 3, 16, 16))
    assert extractor(torch.rand(1, 3, 16, 16)).shape == (1, 72)
    assert model not in _WHOLE


def test_hooks_that_pytorch_cannot_set_on_what_is_not_computed():
    model, batch = model_of(Block, "cls"), torch.rand(2, 3, 16, 16)
    expected = extractor_of(model)(batch)
    model.blocks[1].mlp[0].register_full_backward_hook(lambda *_: None)
    torch.testing.assert_close(extractor_of(model)(batch), expected)
    assert model in _WHOLE
