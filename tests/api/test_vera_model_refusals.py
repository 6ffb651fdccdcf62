"""Bad input to a VeRA model: what is said, and that nothing is half applied."""

import json
import re

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from vera_models import (
    PEFT_WARNINGS,
    assert_unchanged,
    logits,
    randomize_vectors,
    snapshot,
    tiny_gpt2,
    tiny_roberta,
)

from fmkernels.api import VeraConfig, VeraModel, get_vera_model

pytestmark = [pytest.mark.filterwarnings(warning) for warning in PEFT_WARNINGS]

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
QUERY = VeraConfig(r=4, target_modules=["query"])


@pytest.fixture
def model():
    return randomize_vectors(get_vera_model(tiny_roberta(), QUERY))


@pytest.fixture
def refuses(model):
    """Calls, and sees that the model, its adapters and their settings stay as they are."""

    def call(error, words, function, *arguments, **settings):
        before, adapters, y = snapshot(model), model.adapters, logits(model)
        with pytest.raises(error, match=words) as caught:
            function(*arguments, **settings)
        assert_unchanged(model, before)
        assert model.adapters == adapters
        assert model.active_adapter == "default"
        assert torch.equal(logits(model), y)
        return str(caught.value)

    return call


# names of adapters

NAMES = ["", "a.b", ".", "__base__", None, 3, "keys", "values", "training", "_modules", "pop"]


@pytest.mark.parametrize("name", NAMES)
def test_names_that_an_adapter_cannot_have(model, refuses, tmp_path, name):
    model.save_pretrained(tmp_path)
    words = "expected a name"
    refuses(ValueError, words, model.add_adapter, name, QUERY)
    refuses(ValueError, words, model.load_adapter, tmp_path, name)
    refuses(ValueError, words, model.rename_adapter, "default", name)
    base = tiny_roberta()
    before = snapshot(base)
    with pytest.raises(ValueError, match=r"VeraModel\.add_adapter: adapter_name: expected a name"):
        get_vera_model(
            base, VeraConfig(r=4, target_modules=["query"], modules_to_save=["classifier"]), name
        )
    with pytest.raises(ValueError, match="adapter_name: expected a name"):
        VeraModel.from_pretrained(base, tmp_path, name)
    assert_unchanged(base, before)


@pytest.mark.parametrize("name", ["a", "A b", "0", "späß", "query", "default2", "base_layer", "d"])
def test_names_that_an_adapter_can_have(tmp_path, name):
    settings = {"r": 4, "target_modules": ["query"], "modules_to_save": ["classifier"]}
    model = randomize_vectors(get_vera_model(tiny_roberta(), VeraConfig(**settings), name))
    model.save_pretrained(tmp_path)
    again = VeraModel.from_pretrained(tiny_roberta(), tmp_path, name)
    assert torch.equal(logits(again), logits(model))


def test_a_name_that_is_taken(model, refuses, tmp_path):
    model.save_pretrained(tmp_path)
    words = "adapter_name: expected a new name, got 'default', which is taken"
    refuses(ValueError, words, model.add_adapter, "default", QUERY)
    refuses(ValueError, words, model.load_adapter, tmp_path, "default")
    model.add_adapter("b", VeraConfig(r=2, target_modules=["value"]))
    refuses(
        ValueError, "new_name: expected a new name, got 'b'", model.rename_adapter, "default", "b"
    )


@pytest.mark.parametrize("name", ["absent", "", 3, "__base__"])
def test_a_name_that_no_adapter_has(model, refuses, tmp_path, name):
    words = re.escape(f"adapter_name: expected one of ['default'], got {name!r}")
    for function, arguments in (
        (model.set_adapter, (name,)),
        (model.delete_adapter, (name,)),
        (model.rename_adapter, (name, "new")),
        (model.adapter_parameters, (name,)),
        (model.save_pretrained, (tmp_path / "new", name)),
        (model.to_lora, (tmp_path / "new", name)),
        (model.merge, (name,)),
        (model.merge_and_unload, (name,)),
    ):
        refuses(ValueError, words, function, *arguments)
    assert not (tmp_path / "new").exists()


def test_names_of_a_batch(model, refuses):
    inputs = {"input_ids": torch.ones(3, 5, dtype=torch.long)}
    refuses(
        ValueError, "expected some of .*got 'x' in row 1", model, adapter_names=["default", "x", "x"],
        **inputs,
    )  # fmt: skip
    refuses(ValueError, "adapter_names: expected a name for every row, 3 of them, got 2", model,
            adapter_names=["default"] * 2, **inputs)  # fmt: skip
    for names in ("default", [], [None] * 3, 5):
        refuses(
            TypeError, "adapter_names: expected a name for every row", model, adapter_names=names,
            **inputs,
        )  # fmt: skip


# adapters that do not go together


def test_two_seeds_in_the_form_of_peft(model, refuses, tmp_path):
    other = VeraConfig(r=4, target_modules=["value"], projection_prng_key=1)
    words = (
        "projection_prng_key: expected 0, as of adapter 'default', because PEFT holds one seed "
        "per model; got 1"
    )
    refuses(ValueError, words, model.add_adapter, "second", other)
    get_vera_model(tiny_roberta(), other).save_pretrained(tmp_path)
    refuses(ValueError, words, model.load_adapter, tmp_path, "second")
    theirs = peft.get_peft_model(tiny_roberta(), peft.VeraConfig(r=4, target_modules=["value"]))
    with pytest.raises(ValueError, match="must be the same for all adapters"):  # in PEFT
        theirs.load_adapter(tmp_path, "second")


@pytest.mark.parametrize("init", ["position", "kaiming_normal"])
def test_two_seeds_beyond_peft(model, init):
    """What PEFT could not draw it cannot mistake."""
    settings = {"r": 4, "target_modules": ["value"], "init": init}
    model.add_adapter("second", VeraConfig(projection_prng_key=1, **settings))
    model.add_adapter("third", VeraConfig(projection_prng_key=2, **settings))
    assert len(model._adapters.pairs()) == 3


def test_biases_of_several_adapters(model, refuses):
    for bias in ("all", "vera_only"):
        config = VeraConfig(r=4, target_modules=["value"], bias=bias)
        words = f"bias: expected 'none' .* got '{bias}' beside 'none' of 'default'"
        refuses(ValueError, words, model.add_adapter, "second", config)


def test_a_layer_within_what_another_adapter_trains_whole(model, refuses):
    words = "target_modules: expected layers outside of the modules that an adapter trains whole"
    within = {"r": 4, "modules_to_save": ["attention"]}
    around = VeraConfig(target_modules=["intermediate.dense"], **within)
    refuses(ValueError, words, model.add_adapter, "second", around)
    inner = VeraConfig(target_modules=["value"], **within)
    excluded = r"outside of modules_to_save, got \['value'\]"
    refuses(ValueError, excluded, model.add_adapter, "second", inner)
    model.add_adapter(
        "second", VeraConfig(r=4, target_modules=["query"], modules_to_save=["classifier"])
    )
    refuses(
        ValueError, words, model.add_adapter, "third", VeraConfig(r=4, target_modules=["out_proj"])
    )


def test_models_that_cannot_be_adapted(model):
    for other, error in (
        (None, TypeError),
        ("roberta", TypeError),
        (nn.Linear, TypeError),
        (model, ValueError),
        (model.model, ValueError),
    ):
        with pytest.raises(error, match=r"VeraModel: model: expected"):
            get_vera_model(other, QUERY)
    embedding = nn.Sequential(nn.Embedding(3, 4), nn.ReLU())
    with pytest.raises(ValueError, match="at least one linear layer"):
        get_vera_model(embedding, VeraConfig(r=2, target_modules="all-linear"))
    with pytest.raises(ValueError, match=r"\(there are none\)"):
        get_vera_model(embedding, VeraConfig(r=2, target_modules=["q"]))
    with pytest.raises(ValueError, match="expected linear layers, got 0 "):
        get_vera_model(embedding, VeraConfig(r=2, target_modules=["0"]))


class Router(nn.Module):
    """A mixture's, which has a weight of a linear layer and gives something else."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8))

    def forward(self, x):
        return (x @ self.weight.mT).topk(2)


@pytest.mark.parametrize(
    "other",
    [Router(), nn.LayerNorm((4, 8)), nn.Bilinear(8, 8, 8), nn.Embedding(4, 8), nn.PReLU(8),
     nn.Conv1d(8, 8, 1), nn.GRUCell(8, 8), nn.MultiheadAttention(8, 2)],
    ids=lambda other: type(other).__name__,
)  # fmt: skip
def test_what_only_has_a_matrix_is_no_linear_layer(other):
    net = nn.ModuleDict({"a": nn.Linear(8, 8), "b": other})
    before = snapshot(net)
    for targets in (["a", "b"], "a|b"):
        words = rf"expected linear layers, got b \({type(other).__name__}\)"
        with pytest.raises(ValueError, match=words):
            get_vera_model(net, VeraConfig(r=2, target_modules=targets))
    assert_unchanged(net, before)


def test_a_checkpoint_of_another_model(model, refuses, tmp_path):
    gpt2 = get_vera_model(tiny_gpt2(), VeraConfig(r=4, target_modules=["c_attn"]))
    gpt2.save_pretrained(tmp_path)
    words = r"target_modules: expected names of modules of the model, got \['c_attn'\]"
    refuses(ValueError, words, model.load_adapter, tmp_path, "second")
    everywhere = VeraConfig(r=4, target_modules="all-linear")
    get_vera_model(tiny_gpt2(), everywhere).save_pretrained(tmp_path)
    message = refuses(ValueError, "tensors that do not fit", model.load_adapter, tmp_path, "second")
    assert "missing: base_model.model.roberta." in message
    assert "unknown: base_model.model.transformer." in message


# damaged files


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder, the bytes of its files, and a model to load it into, with what that must stay."""
    folder = tmp_path_factory.mktemp("adapter")
    config = VeraConfig(r=3, target_modules=["query"], bias="vera_only")
    randomize_vectors(get_vera_model(tiny_roberta(), config)).save_pretrained(folder)
    contents = {name: (folder / name).read_bytes() for name in (WEIGHTS, CONFIG)}
    base = tiny_roberta()
    return [folder, contents, base, snapshot(base)]


def refused(saved, name, data):
    """Whether a folder with another content of one file is refused, with nothing done; the words."""
    folder, contents, base, before = saved
    for file, held in contents.items():
        (folder / file).write_bytes(data if file == name else held)
    try:
        with pytest.raises((ValueError, TypeError)) as caught:
            VeraModel.from_pretrained(base, folder)
    except pytest.fail.Exception:
        saved[2:] = (base := tiny_roberta()), snapshot(base)  # the next needs one without adapters
        return None
    finally:
        for file, held in contents.items():
            (folder / file).write_bytes(held)
    assert_unchanged(base, before)
    message = str(caught.value)
    assert message.startswith("VeraModel.load_adapter: "), message
    return message


def with_another_bit(content, data, start=0):
    """The content with one bit changed, at ``start`` or after it; and in which byte."""
    changed = bytearray(content)
    bit = data.draw(st.integers(8 * start, 8 * len(changed) - 1))
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed), bit // 8


@given(st.data())
def test_files_that_are_cut_short(saved, data):
    name = data.draw(st.sampled_from([WEIGHTS, CONFIG]))
    content = saved[1][name]
    end = data.draw(st.integers(0, len(content.rstrip()) - 1))
    message = refused(saved, name, content[:end])
    assert message is not None
    assert "is damaged" in message


@given(st.data())
def test_a_bit_of_the_tensors_that_has_changed(saved, data):
    """Noticed, wherever it is; but for one in a name in the head that says nothing here."""
    content, place = with_another_bit(saved[1][WEIGHTS], data)
    message = refused(saved, WEIGHTS, content)
    head = saved[1][WEIGHTS].split(b"}", 1)[0]  # of the metadata, which come first
    if message is None:
        assert place < len(head) or content[place : place + 1].isspace()


@given(st.data())
def test_a_bit_of_any_vector_that_has_changed(saved, data):
    content = saved[1][WEIGHTS]
    start = 8 + int.from_bytes(content[:8], "little")
    message = refused(saved, WEIGHTS, with_another_bit(content, data, start)[0])
    assert message is not None
    assert "is damaged: its tensors are not what was saved" in message


@given(st.data())
def test_a_bit_of_the_configuration_that_has_changed(saved, data):
    """Refused in words, or another valid configuration of the same tensors."""
    content, _ = with_another_bit(saved[1][CONFIG], data)
    message = refused(saved, CONFIG, content)
    if message is None:
        fields, before = json.loads(content), json.loads(saved[1][CONFIG])
        changed = {n for n in {*fields, *before} if fields.get(n, before) != before.get(n, fields)}
        computed = {"r", "target_modules", "projection_prng_key", "bias", "peft_type"}
        assert not changed & computed


@given(st.sampled_from([WEIGHTS, CONFIG]), st.binary(max_size=200))
def test_any_bytes(saved, name, content):
    message = refused(saved, name, content)
    assert message is not None


DAMAGED = [
    b"",
    b"null",
    b"[]",
    b"3",
    b'"VERA"',
    b"{}",
    b"{" * 100_000,
    b"[" * 100_000,
    b"\xff\xfe{}",
    b'{"peft_type": "VERA", "r": 1e400}',
    b'{"peft_type": "VERA", "r": {"a": 1}}',
    b'{"peft_type": "VERA", "r": -3}',
    b'{"peft_type": "VERA", "r": 3, "target_modules": {"query": 1}}',
    b'{"peft_type": "VERA", "r": 3, "target_modules": [["query"]]}',
    b'{"peft_type": "VERA", "r": 3, "target_modules": "(query"}',
    b'{"peft_type": "VERA", "r": 3, "target_modules": ["query"], "modules_to_save": [[]]}',
    b'{"peft_type": "VERA", "r": 3, "target_modules": ["query"], "modules_to_save": {}}',
    b'{"peft_type": "VERA", "r": 3, "target_modules": ["query"], "d_initial": NaN}',
    b'{"peft_type": "VERA", "r": 3, "target_modules": ["query"], "layers_pattern": {"a": 1}}',
    b'{"peft_type": "VERA", "r": 3, "target_modules": ["query"], "bias": []}',
    b'{"peft_type": {"a": 1}}',
    b'{"peft_type": "VERA", "r": 3, "target_modules": ["query"], "rslora": true}',
]


@pytest.mark.parametrize("content", DAMAGED, ids=lambda content: str(content[:60]))
def test_configurations_that_are_none(saved, content):
    message = refused(saved, CONFIG, content)
    assert message is not None
    assert "adapter_config.json" in message or "target_modules" in message


HEADS = [
    b"\x00" * 8,
    (2**63).to_bytes(8, "little") + b"{}",
    (10**9).to_bytes(8, "little") + b"{}",
    (2).to_bytes(8, "little") + b"{}",
    (4).to_bytes(8, "little") + b"null",
]


@pytest.mark.parametrize("content", HEADS, ids=str)
def test_tensors_that_are_none(saved, content):
    assert refused(saved, WEIGHTS, content) is not None


@pytest.mark.parametrize("kind", ["I32", "F16", "F64", "BOOL", "X9", "F8_E4M3", "U64", "F4"])
def test_another_dtype_in_the_head(saved, kind):
    content = saved[1][WEIGHTS]
    size = int.from_bytes(content[:8], "little")
    head = content[8 : 8 + size].replace(b'"F32"', f'"{kind}"'.encode())
    message = refused(saved, WEIGHTS, len(head).to_bytes(8, "little") + head + content[8 + size :])
    assert message is not None
    assert load_file(saved[0] / WEIGHTS)


def test_after_all_the_file_that_was_saved_is_loaded(saved):
    folder, _, base, before = saved
    model = VeraModel.from_pretrained(base, folder)
    assert list(model.adapters) == ["default"]
    assert snapshot(base)[0] != before[0]
