"""State, negatives, and refusals of the extractor."""

import copy
import io

import pytest
import torch
from fungi_models import LAST, small_vit

import fmkernels
from fmkernels.api import DINO, KL, CustomViews, FungiExtractor, ImageViews, Objective, SimCLR

VIEWS = ImageViews(size=16, local_crops=2, stride_scale=1)


def extractor_of(*objectives, model=None, **settings):
    objectives = objectives or (KL(32), DINO(16), SimCLR(20, negatives=3))
    return FungiExtractor(model or small_vit(), LAST, objectives, **{"views": VIEWS, **settings})


class Pictures:
    """A dataset of (image, label), which counts what is asked for."""

    def __init__(self, number):
        self.number, self.asked = number, []

    def __len__(self):
        return self.number

    def __getitem__(self, index):
        if index >= self.number:
            raise IndexError(index)
        self.asked.append(index)
        draw = torch.Generator().manual_seed(index)
        return torch.rand(3, 18 + index % 3, 20, generator=draw), index


def test_two_extractors_agree():
    batch = torch.rand(2, 3, 16, 16)
    one, other = (extractor_of().fit_negatives(Pictures(9)) for _ in range(2))
    assert torch.equal(one(batch), other(batch))
    third = extractor_of(seed=43).fit_negatives(Pictures(9))(batch)
    blocks = (one(batch) * third).unflatten(1, (4, 24)).sum(dim=2)
    torch.testing.assert_close(blocks[:, 0], torch.ones(2))
    assert (blocks[:, 1:] < 0.9).all()


@pytest.mark.parametrize("projection", ["count", "rademacher", "given"])
def test_the_state_makes_another_one_compatible(projection):
    if projection == "given":
        matrix = torch.randint(2, (7, 24 * 25)).float() * 2 - 1
        projection = fmkernels.Rademacher.from_matrix(matrix, 24, 24)
    batch = torch.rand(2, 3, 16, 16)
    one = extractor_of(projection=projection).fit_negatives(Pictures(9))
    expected = one(batch)
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    other = extractor_of(seed=42)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(batch), expected)
    assert other.state.projection == one.state.projection


def test_the_state_of_another_extractor_is_refused():
    state = extractor_of().fit_negatives(Pictures(9)).state_dict()
    with pytest.raises(ValueError, match="state: expected heads with these outputs"):
        extractor_of(KL(32)).load_state_dict(state)
    with pytest.raises(ValueError, match="state: expected heads with these outputs"):
        extractor_of(KL(33), DINO(16), SimCLR(20)).load_state_dict(state)
    with pytest.raises(ValueError, match="state: expected the state_dict of an extractor"):
        extractor_of().load_state_dict({"heads": {}})
    with pytest.raises(ValueError, match="taken after the first features or negatives"):
        extractor_of().load_state_dict(extractor_of().state_dict())
    with pytest.raises(ValueError, match=r"with heads, .*, got cls, position, .* …$"):
        extractor_of().load_state_dict({**small_vit().state_dict()})
    wide = small_vit(dim=32)
    with pytest.raises(ValueError, match="projection: expected one for gradients of 32 x 33"):
        extractor_of(model=wide).load_state_dict(state)


def test_a_state_is_copied():
    batch, made = torch.rand(2, 3, 16, 16), extractor_of().fit_negatives(Pictures(9))
    expected, state = made(batch), copy.deepcopy(made.state_dict())
    extractor = extractor_of()
    extractor.load_state_dict(state)
    state["heads"]["KL"]["head"]["weight"].zero_()
    state["negatives"]["SimCLR"].zero_()
    assert torch.equal(extractor(batch), expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": 43}, "seed: 42, not 43"),
        ({"views": ImageViews(size=16, local_crops=2, stride_scale=1, std=1)}, "views: ImageViews"),
        ({"pooling": "cls"}, "pooling: None, not cls"),
        ({"target_layer": "blocks.0.attn.proj"}, "target_layer: .*, not blocks.0.attn.proj"),
        ({"objectives": [KL(32, temperature=3.0), DINO(16), SimCLR(20)]}, "KL: .* not .*=3.0"),
    ],
)
def test_a_state_of_other_settings_is_refused(settings, message):
    state = extractor_of().fit_negatives(Pictures(9)).state_dict()
    settings = {"target_layer": LAST, "views": VIEWS, **settings}
    settings.setdefault("objectives", [KL(32), DINO(16), SimCLR(20, negatives=3)])
    other = FungiExtractor(small_vit(), **settings)
    with pytest.raises(ValueError, match=f"state: expected one of an extractor .* with {message}"):
        other.load_state_dict(state)


def test_what_a_state_may_be_loaded_into():
    """What does not make features incompatible, and functions of the same name."""
    state = extractor_of(pooling=lambda output, views: output).fit_negatives(Pictures(9))
    state = state.state_dict()
    other = extractor_of(
        pooling=lambda output, views: output,
        dtype=torch.bfloat16,
        embedding=False,
        batch_size=3,
        projection="rademacher",
    )
    other.load_state_dict(state)
    assert isinstance(other.state.projection, fmkernels.CountSketch)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"negatives": {"SimCLR": torch.rand(5, 19)}}, r"negatives of these widths: .*\(5, 19\)"),
        ({"negatives": {"KL": torch.rand(5, 32)}}, r"widths: \{'SimCLR': 20\}, got .* for 'KL'"),
        ({"negatives": {"foo": 3}}, "got int for 'foo'"),
        ({"heads": {"KL": {"head": {"weight": 3}}}}, r"heads with weight \(L, E\) and bias"),
        ({"heads": 3}, r"heads with weight \(L, E\) and bias \(L,\), got others"),
    ],
)
def test_a_state_that_is_broken_is_refused(change, message):
    state = extractor_of().fit_negatives(Pictures(9)).state_dict()
    with pytest.raises(ValueError, match=f"load_state_dict: state: expected .*{message}"):
        extractor_of().load_state_dict({**state, **change})


def test_heads_of_another_width_are_refused():
    state = extractor_of(KL(32), DINO(16))
    state(torch.rand(1, 3, 16, 16))
    state = copy.deepcopy(state.state_dict())
    state["heads"]["KL"]["head"]["weight"] = torch.rand(32, 23)
    with pytest.raises(ValueError, match=r"embeddings of one width, got \[23, 24\]"):
        extractor_of(KL(32), DINO(16)).load_state_dict(state)
    for head in state["heads"]["DINO"].values():
        head["weight"] = torch.rand(16, 23)
    extractor = extractor_of(KL(32), DINO(16))
    extractor.load_state_dict(state)
    with pytest.raises(ValueError, match="heads: expected embeddings of 23 numbers, got 24; load"):
        extractor(torch.rand(1, 3, 16, 16))


def test_negatives_are_latents_of_drawn_images():
    extractor = extractor_of(SimCLR(20, negatives=3))
    pictures = Pictures(50)
    extractor.fit_negatives(pictures)
    assert len(set(pictures.asked)) == 3
    negatives = extractor.state_dict()["negatives"]["SimCLR"]
    head = extractor.state_dict()["heads"]["SimCLR"]["head"]
    expected = []
    for index in list(pictures.asked):
        views = extractor._views("patches", [pictures[index][0]], [index])
        expected.append(small_vit()(views).detach() @ head["weight"].T + head["bias"])
    torch.testing.assert_close(negatives, torch.cat(expected))
    few = extractor_of(SimCLR(20, negatives=300)).fit_negatives(Pictures(2))
    assert few.state_dict()["negatives"]["SimCLR"].shape == (2 * VIEWS.counts["patches"], 20)


def test_presets_fill_in_what_is_none():
    paper, library = (extractor_of(KL(), SimCLR(), preset=p) for p in ("paper", "library"))
    assert paper.objectives["KL"].temperature == 15
    assert library.objectives["KL"].temperature == 1
    assert paper.objectives["SimCLR"] == SimCLR(negatives=256, scaled_normalizer=True)
    assert library.objectives["SimCLR"] == SimCLR(negatives=64, scaled_normalizer=False)
    assert (paper.views.resize, library.views.resize) == ("shorter", "square")
    own = extractor_of(KL(temperature=3.0), preset="library")
    assert own.objectives["KL"].temperature == 3


def test_two_objectives_of_a_class_have_heads_of_their_own():
    extractor = extractor_of(KL(32), KL(32, temperature=2.0))
    extractor(torch.rand(1, 3, 16, 16))
    heads = extractor.state_dict()["heads"]
    assert list(heads) == ["KL", "KL_2"]
    assert not torch.equal(heads["KL"]["head"]["weight"], heads["KL_2"]["head"]["weight"])


def test_heads_are_initialised_as_linear_layers_are():
    extractor = extractor_of(KL(4000), model=small_vit())
    extractor(torch.rand(1, 3, 16, 16))
    weight = extractor.state_dict()["heads"]["KL"]["head"]["weight"]
    bound = 24**-0.5
    assert float(weight.abs().max()) <= bound
    deviation = bound / 3**0.5
    assert abs(float(weight.std()) / deviation - 1) < 0.01  # 96,000 numbers
    assert abs(float(weight.mean())) < 4 * deviation / 96000**0.5


def test_an_objective_of_ones_own():
    class Energy(Objective):
        def loss(self, embeddings, heads, negatives=None):
            return heads["head"](embeddings).square().sum(dim=(1, 2))

    batch = torch.rand(2, 3, 16, 16)
    extractor = extractor_of(Energy(8))
    delta, _ = extractor.gradients(batch)["Energy"]
    model = small_vit()
    head = extractor.state_dict()["heads"]["Energy"]["head"]
    loss = model(extractor._views("plain", batch, [0, 1])) @ head["weight"].T + head["bias"]
    loss.square().sum().backward()
    torch.testing.assert_close(delta.sum(dim=(0, 1)), model.blocks[1].attn.proj.bias.grad)

    class Wrong(Objective):
        def loss(self, embeddings, heads, negatives=None):
            return embeddings.sum()

    with pytest.raises(ValueError, match=r"Wrong.loss to return one loss per image, \(2,\)"):
        extractor_of(Wrong(8))(batch)


def test_a_bar_counts(capfd):
    extractor = extractor_of(KL(32), SimCLR(16, negatives=2))
    extractor.fit_negatives(Pictures(3), progress=True)
    assert "2.00/2.00" in capfd.readouterr().err
    extractor.extract(Pictures(3), progress=True)
    assert "3.00/3.00" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("work", "error", "message"),
    [
        (lambda: extractor_of(preset="nips"), ValueError, "preset: expected one of paper, library"),
        (lambda: extractor_of(KL), TypeError, r"objectives\[0\]: expected an Objective such as"),
        (lambda: extractor_of(projection="dense"), ValueError, "projection: expected one of count"),
        (lambda: extractor_of(projection=3), TypeError, "projection: expected one of .* got int"),
        (
            lambda: extractor_of(projection=fmkernels.CountSketch(24, 24, 8, bias=False)),
            ValueError,
            "projection: expected one for gradients of 24 x 25",
        ),
        (
            lambda: extractor_of(projection=fmkernels.CountSketch(24, 24, 8), dim=9),
            ValueError,
            "dim: expected None or 8, as projection has, got 9",
        ),
        (lambda: extractor_of(pooling="max"), ValueError, "pooling: expected one of cls, mean"),
        (lambda: extractor_of(dtype=torch.int8), ValueError, "dtype: expected torch.bfloat16"),
        (lambda: extractor_of(views=3), TypeError, "views: expected ImageViews"),
        (
            lambda: extractor_of(DINO(), views=CustomViews()),
            ValueError,
            r"objectives\[0\]: expected one with views of plain for CustomViews, got DINO",
        ),
        (
            lambda: extractor_of(DINO(global_crops=3)),
            ValueError,
            r"objectives\[0\]: expected global_crops=2, as the views have, got 3",
        ),
        (
            lambda: FungiExtractor(small_vit(), LAST, [], embedding=False),
            ValueError,
            "objectives: expected one or embedding=True, got neither",
        ),
        (
            lambda: extractor_of()(torch.rand(1, 3, 16, 16)),
            ValueError,
            r"objectives: expected negatives for SimCLR, got none; call fit_negatives",
        ),
        (lambda: extractor_of()(torch.rand(0, 3, 16, 16)), ValueError, "inputs: expected at least"),
        (
            lambda: extractor_of(KL())(torch.rand(2, 3, 16, 16), [3]),
            ValueError,
            "numbers: expected 2, one for each input, got 1",
        ),
        (
            lambda: extractor_of(KL(), pooling="cls")(torch.rand(1, 3, 16, 16)),
            ValueError,
            r"pooling: expected tokens \(N, T, E\) with pooling='cls', got .* \(1, 24\)",
        ),
        (
            lambda: extractor_of(KL(), model=small_vit(pool=None))(torch.rand(1, 3, 16, 16)),
            ValueError,
            r"pooling: expected embeddings \(N, E\) with pooling=None, got .* \(1, 17, 24\)",
        ),
        (
            lambda: extractor_of(
                DINO(), views=CustomViews(kinds={"crops": (3, lambda x, seeds: x)})
            )(torch.rand(2, 3, 16, 16)),
            ValueError,
            "views: expected 3 for each of 2 inputs, got 2 embeddings",
        ),
        (lambda: extractor_of().fit_negatives(iter([])), TypeError, "dataset: expected a folder"),
        (lambda: extractor_of().fit_negatives([]), ValueError, "dataset: expected at least one"),
        (lambda: extractor_of(KL()).extract([]), ValueError, "dataset: expected at least one"),
        (
            lambda: extractor_of(KL()).extract(Pictures(1), "features.pt"),
            ValueError,
            "path: expected a name that ends in .npy",
        ),
        (lambda: KL(latent_dim=0), ValueError, "KL: latent_dim: expected an integer >= 1"),
        (lambda: KL(temperature=0.0), ValueError, "KL: temperature: expected a number > 0"),
        (lambda: SimCLR(negatives=0), ValueError, "SimCLR: negatives: expected an integer >= 1"),
    ],
)
def test_refusals(work, error, message):
    with pytest.raises(error, match=message):
        work()
