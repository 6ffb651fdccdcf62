"""Where VeRA adapters go: the modules that PEFT chooses, trained and frozen as PEFT has them."""

import dataclasses
import gc
import json
import weakref

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from vera_models import (
    PEFT_WARNINGS,
    Experts,
    assert_unchanged,
    logits,
    randomize_vectors,
    snapshot,
    tiny_gpt2,
    tiny_llama,
    tiny_roberta,
    tiny_vit,
)

from fmkernels.api import VeraConfig, VeraModel, get_vera_model
from fmkernels.api.vera_layer import VeraLayer
from fmkernels.api.vera_trained import TrainedModule

TIED = "ignore:Model has `tie_word_embeddings=True` and a tied layer is part of:UserWarning"
pytestmark = [pytest.mark.filterwarnings(warning) for warning in (*PEFT_WARNINGS, TIED)]

MODELS = {
    "roberta": tiny_roberta,
    "deep roberta": lambda: tiny_roberta(layers=4),
    "deep llama-classifier": lambda: tiny_llama(classifier=True, layers=3),
    "gpt2": tiny_gpt2,
    "llama": tiny_llama,
    "llama-classifier": lambda: tiny_llama(classifier=True),
    "vit": tiny_vit,
    "experts": Experts,
}
CASES = [
    ("roberta", {"target_modules": ["query", "value"]}, 4),
    ("roberta", {"target_modules": ["attention.self.query"]}, 2),
    ("roberta", {"target_modules": ["roberta.encoder.layer.0.attention.self.key"]}, 1),
    ("roberta", {"target_modules": ["dense"]}, 7),
    ("roberta", {"target_modules": ["dense"], "task_type": "SEQ_CLS"}, 6),
    ("roberta", {"target_modules": ["dense"], "modules_to_save": ["classifier"]}, 6),
    ("roberta", {"target_modules": ["dense"], "modules_to_save": ["output"]}, 3),
    ("roberta", {"target_modules": ["query"], "modules_to_save": ["LayerNorm"]}, 2),
    ("roberta", {"target_modules": r".*\.layer\.1\..*(query|key)"}, 2),
    ("roberta", {"target_modules": r".*\.(query|value)", "layers_to_transform": [1]}, 4),
    ("roberta", {"target_modules": "all-linear"}, 14),
    ("roberta", {"target_modules": "ALL-Linear"}, 14),
    ("roberta", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}, 12),
    ("roberta", {"target_modules": ["query", "dense"], "task_type": "SEQ_CLS"}, 8),
    ("roberta", {"target_modules": ["query"], "task_type": "TOKEN_CLS"}, 2),
    ("roberta", {"target_modules": "all-linear", "task_type": "FEATURE_EXTRACTION"}, 14),
    ("roberta", {"target_modules": "all-linear", "layers_to_transform": [1]}, 14),
    ("deep roberta", {"target_modules": "all-linear", "layers_to_transform": [1]}, 6),
    ("deep llama-classifier", {"target_modules": "all-linear", "layers_to_transform": 2}, 8),
    (
        "roberta",
        {
            "target_modules": ["roberta.encoder.layer.0.attention.self.key", "query"],
            "layers_to_transform": [1],
        },
        2,
    ),
    ("roberta", {"target_modules": "all-linear", "modules_to_save": ["classifier"]}, 12),
    ("roberta", {"target_modules": ["query"], "layers_to_transform": 1}, 1),
    ("roberta", {"target_modules": ["query"], "layers_to_transform": [0, 1]}, 2),
    ("roberta", {"target_modules": ["query"], "layers_to_transform": []}, 2),
    ("roberta", {"target_modules": ["query", "out_proj"], "layers_to_transform": [0]}, 1),
    (
        "roberta",
        {"target_modules": ["key"], "layers_to_transform": [1], "layers_pattern": "layer"},
        1,
    ),
    (
        "roberta",
        {"target_modules": ["key"], "layers_to_transform": [1], "layers_pattern": ["h", "layer"]},
        1,
    ),
    ("gpt2", {"target_modules": ["c_attn"]}, 2),
    ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}, 6),
    ("gpt2", {"target_modules": ["mlp.c_proj"]}, 2),
    ("gpt2", {"target_modules": "all-linear"}, 8),
    ("gpt2", {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}, 8),
    (
        "gpt2",
        {"target_modules": ["c_fc"], "layers_to_transform": [0], "layers_pattern": "h"},
        1,
    ),
    ("gpt2", {"target_modules": ["lm_head"]}, 1),
    ("gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["ln_f"]}, 2),
    ("llama", {"target_modules": ["q_proj", "v_proj"]}, 4),
    ("llama", {"target_modules": "all-linear"}, 14),
    ("llama", {"target_modules": r".*self_attn\.[qkvo]_proj"}, 8),
    ("llama", {"target_modules": "all-linear", "layers_to_transform": 0}, 14),
    ("llama-classifier", {"target_modules": "all-linear"}, 15),
    ("llama-classifier", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}, 14),
    ("llama-classifier", {"target_modules": ["q_proj", "score"]}, 3),
    ("llama-classifier", {"target_modules": ["q_proj"], "task_type": "SEQ_CLS"}, 2),
    ("vit", {"target_modules": ["q_proj", "v_proj"]}, 4),
    ("vit", {"target_modules": "all-linear"}, 13),
    ("vit", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}, 12),
    ("vit", {"target_modules": "all-linear", "modules_to_save": ["classifier"]}, 12),
    ("experts", {"target_modules": ["up"]}, 9),
    ("experts", {"target_modules": ["up", "proj"], "layers_to_transform": [1]}, 4),
    (
        "experts",
        {"target_modules": ["up"], "layers_to_transform": [0, 2], "layers_pattern": "experts"},
        6,
    ),
    (
        "experts",
        {"target_modules": ["up"], "layers_to_transform": [2], "layers_pattern": "layers"},
        3,
    ),
    (
        "experts",
        {"target_modules": ["up"], "layers_to_transform": 1, "layers_pattern": r"layers\.\d+\.e.*"},
        3,
    ),
    ("experts", {"target_modules": r"model\.layers\.\d+\.experts\.[02]\.up"}, 6),
    ("experts", {"target_modules": "all-linear"}, 13),
    ("experts", {"target_modules": ["up"], "modules_to_save": ["head", "proj"]}, 9),
]


def adapted(model):
    return {name for name, m in model.named_modules() if isinstance(m, VeraLayer)}


def adapted_by_peft(model):
    layers = {
        n for n, m in model.named_modules() if isinstance(m, peft.tuners.vera.layer.VeraLayer)
    }
    return {name.removeprefix("base_model.model.") for name in layers}


def trained_elements(model):
    """By the shape of the parameters: the names differ."""
    return sorted(tuple(p.shape) for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("name", "settings", "count", "bias"),
    [(*case, "none") for case in CASES]
    + [(*case, bias) for bias in ("all", "vera_only") for case in CASES[::3]],
    ids=str,
)
def test_adapts_and_trains_what_peft_does(name, settings, count, bias):
    ours = get_vera_model(MODELS[name](), VeraConfig(r=5, bias=bias, **settings))
    theirs = peft.get_peft_model(MODELS[name](), peft.VeraConfig(r=5, bias=bias, **settings))
    assert adapted(ours.model) == adapted_by_peft(theirs)
    assert len(adapted(ours.model)) == count
    matrices = [(m.A, m.B) for m in ours._adapters.pairs()]
    assert len(matrices) == 1
    assert torch.equal(matrices[0][0], theirs.base_model.vera_A["default"])
    assert torch.equal(matrices[0][1], theirs.base_model.vera_B["default"])
    expected = trained_elements(theirs)
    if bias == "all":
        # PEFT trains the biases of the modules that stand aside too; they have no effect
        aside = [
            tuple(p.shape)
            for name, p in theirs.named_parameters()
            if ".original_module." in name and p.requires_grad
        ]
        for shape in aside:
            expected.remove(shape)
    assert trained_elements(ours) == expected


def test_peft_configurations_are_taken_as_they_are():
    for settings in (
        {"target_modules": ["query", "value"], "task_type": peft.TaskType.SEQ_CLS},
        {"target_modules": "all-linear", "layers_to_transform": [0], "bias": "all"},
        {"target_modules": r".*\.query", "vera_dropout": 0.1, "projection_prng_key": 7},
    ):
        theirs = peft.VeraConfig(r=4, **settings)
        ours = get_vera_model(tiny_roberta(), theirs)
        again = get_vera_model(tiny_roberta(), VeraConfig(r=4, **settings))
        assert adapted(ours.model) == adapted(again.model)
        assert sorted(ours.adapters["default"].target_modules) == sorted(
            again.adapters["default"].target_modules
        )
        assert ours.adapters["default"].projection_prng_key == theirs.projection_prng_key


def test_our_configuration_is_copied():
    config = VeraConfig(r=4, target_modules=["query"])
    model = get_vera_model(tiny_roberta(), config)
    config.vera_dropout, config.r = 0.9, 1
    assert model.adapters["default"].vera_dropout == 0
    assert model.adapters["default"].r == 4


@pytest.mark.parametrize(
    ("task", "name", "head"),
    [
        ("SEQ_CLS", "roberta", "classifier"),
        ("SEQ_CLS", "llama-classifier", "score"),
        ("TOKEN_CLS", "vit", "classifier"),
    ],
)
def test_the_head_of_the_task_is_trained_whole(task, name, head):
    model = get_vera_model(
        MODELS[name](), VeraConfig(r=4, target_modules="all-linear", task_type=task)
    )
    assert model.adapters["default"].modules_to_save == [head]
    assert isinstance(getattr(model.model, head), TrainedModule)
    copies = getattr(model.model, head).copies["default"]
    assert all(parameter.requires_grad for parameter in copies.parameters())
    given = VeraConfig(r=4, target_modules="all-linear", task_type=task, modules_to_save=[head])
    assert get_vera_model(MODELS[name](), given).adapters["default"].modules_to_save == [head]


def test_the_head_of_question_answering_is_trained_whole():
    net = nn.Module()
    net.encoder, net.qa_outputs = nn.Linear(4, 4), nn.Linear(4, 2)
    config = VeraConfig(r=2, target_modules="all-linear", task_type="QUESTION_ANS")
    model = get_vera_model(net, config)
    assert adapted(model.model) == {"encoder"}
    assert isinstance(model.model.qa_outputs, TrainedModule)


def test_a_language_model_has_no_head_to_train():
    config = VeraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS")
    assert get_vera_model(tiny_gpt2(), config).adapters["default"].modules_to_save is None


def test_dropout_is_in_training_only_and_only_of_the_adapter():
    model = get_vera_model(
        tiny_roberta(), VeraConfig(r=4, target_modules=["query"], vera_dropout=0.5)
    )
    randomize_vectors(model)
    calm = logits(model)
    assert torch.equal(logits(model), calm)
    # the model's own dropout stays away
    for module in model.modules():
        if isinstance(module, VeraLayer):
            module.train()
            module.base_layer.eval()
    first, second = logits(model), logits(model)
    assert not torch.equal(first, second)
    assert not torch.equal(first, calm)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny_roberta()))


def test_all_of_the_dropout_is_the_base_model():
    model = get_vera_model(tiny_vit(), VeraConfig(r=4, target_modules=["q_proj"], vera_dropout=1.0))
    randomize_vectors(model)
    assert not torch.equal(logits(model), logits(tiny_vit()))
    # this model has no dropout of its own that is on
    model.train()
    assert torch.equal(logits(model), logits(tiny_vit()))


def test_conv1d_is_adapted_as_the_linear_layer_that_it_is():
    conv, linear = Conv1D(7, 5), nn.Linear(5, 7)
    with torch.no_grad():
        linear.weight.copy_(conv.weight.mT)
        linear.bias.copy_(conv.bias)
    config = VeraConfig(r=3, target_modules=["0"])
    ours, same = (get_vera_model(nn.Sequential(layer), config) for layer in (conv, linear))
    for model in (ours, same):
        randomize_vectors(model)
    x = torch.randn(4, 5)
    torch.testing.assert_close(ours(x), same(x))
    assert not torch.allclose(ours(x), linear(x))


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_new_adapter_changes_nothing_yet(base):
    plain = logits(tiny_roberta(dtype=base))
    config = VeraConfig(r=4, target_modules="all-linear", use_dora=False)
    model = get_vera_model(tiny_roberta(dtype=base), config)
    assert torch.equal(logits(model), plain)
    wide = torch.promote_types(base, torch.float32)
    for layer in model._adapters.layers().values():
        assert layer.lambda_d["default"].dtype == layer.lambda_b["default"].dtype == wide
        assert torch.equal(layer.lambda_d["default"], torch.full((4,), 0.1).to(wide))
        assert not layer.lambda_b["default"].any()


def test_starting_values():
    config = VeraConfig(r=4, target_modules=["query"], d_initial=0.25)
    for layer in get_vera_model(tiny_roberta(), config)._adapters.layers().values():
        assert torch.equal(layer.lambda_d["default"], torch.full((4,), 0.25))
    config = VeraConfig(r=4, target_modules=["query"], init_weights=False)
    theirs = peft.get_peft_model(
        tiny_roberta(), peft.VeraConfig(r=4, target_modules=["query"], init_weights=False)
    )
    for (path, layer), own in zip(
        get_vera_model(tiny_roberta(), config)._adapters.layers().items(),
        [m for m in theirs.modules() if isinstance(m, peft.tuners.vera.layer.VeraLayer)],
        strict=True,
    ):
        assert layer.lambda_d["default"].std() > 0, path
        assert torch.equal(layer.lambda_b["default"], torch.ones(16)), path
        assert own.vera_lambda_d["default"].shape == layer.lambda_d["default"].shape


REFUSED = [
    ({"target_modules": None}, ValueError, "target_modules: expected names.*got None"),
    ({"target_modules": ["quary"]}, ValueError, r"got \['quary'\]; linear layers here end in"),
    ({"target_modules": ["query", "absent"]}, ValueError, r"got \['absent'\]"),
    ({"target_modules": []}, ValueError, r"at least one linear layer, got \[\]"),
    ({"target_modules": "query"}, ValueError, "at least one linear layer, got 'query'"),
    ({"target_modules": "(query"}, ValueError, "target_modules: expected a regular expression"),
    ({"target_modules": ["LayerNorm"]}, ValueError, r"linear layers, got .*\(LayerNorm\)"),
    ({"target_modules": ["word_embeddings"]}, ValueError, r"\(Embedding\)"),
    ({"target_modules": ["self"]}, ValueError, "linear layers, got"),
    ({"target_modules": ".*attention.*"}, ValueError, r"linear layers, got .*\(RobertaAttention\)"),
    (
        {"target_modules": ["query"], "layers_to_transform": [9]},
        ValueError,
        "layers_to_transform: expected numbers of layers that have query",
    ),
    (
        {"target_modules": ["query"], "layers_to_transform": [0], "layers_pattern": "blocks"},
        ValueError,
        "layers_to_transform: expected numbers",
    ),
    (
        {"target_modules": ["query"], "layers_to_transform": [0], "layers_pattern": "(layer"},
        ValueError,
        "layers_pattern: expected a regular expression",
    ),
    (
        {"target_modules": ["query"], "modules_to_save": ["absent"]},
        ValueError,
        r"modules_to_save: expected .* got \['absent'\]",
    ),
    (
        {"target_modules": ["out_proj"], "modules_to_save": ["classifier"]},
        ValueError,
        r"got \['out_proj'\]",
    ),
]


@pytest.mark.parametrize(("settings", "error", "words"), REFUSED, ids=str)
def test_what_fits_no_layer_is_refused_and_the_model_is_as_it_was(settings, error, words):
    model = tiny_roberta()
    model.classifier.requires_grad_(False)
    before = snapshot(model)
    with pytest.raises(error, match=words) as caught:
        get_vera_model(model, VeraConfig(r=4, **settings))
    assert str(caught.value).startswith("VeraModel.add_adapter: ")
    assert_unchanged(model, before)
    model = get_vera_model(model, VeraConfig(r=3, target_modules=["key"]))
    before = snapshot(model)
    with pytest.raises(error, match=words):
        model.add_adapter("second", VeraConfig(r=4, **settings))
    assert_unchanged(model, before)
    assert list(model.adapters) == ["default"]


def test_numbers_of_a_list_that_is_the_outermost_are_not_counted_by_peft():
    """Without ``layers_pattern``; with it they are."""
    net = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(3, 3) for _ in range(2))})
    for layer in net["layers"]:
        layer.inner = nn.Linear(3, 3)
    config = {"r": 2, "target_modules": ["inner"], "layers_to_transform": [1]}
    with pytest.raises(ValueError, match="No layers types compatible"):
        peft.get_peft_model(net, peft.VeraConfig(**config))
    with pytest.raises(ValueError, match="layers_to_transform: expected numbers"):
        get_vera_model(net, VeraConfig(**config))
    model = get_vera_model(net, VeraConfig(**config, layers_pattern="layers"))
    assert adapted(model.model) == {"layers.1.inner"}


# the configuration by itself


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"target_modules": ["b", "a"]},
        {"target_modules": "all-linear", "modules_to_save": ["head"], "bias": "vera_only"},
        {"layers_to_transform": 3, "layers_pattern": ["h"], "target_modules": ["a"]},
        {"layers_to_transform": [1, 2], "task_type": "SEQ_CLS", "target_modules": "a|b"},
        {"vera_dropout": 0.25, "d_initial": -1.5, "projection_prng_key": 2**40, "r": 1},
        {"init_weights": False, "fan_in_fan_out": True, "save_projection": False},
    ],
    ids=str,
)
def test_configurations_go_to_peft_and_back(settings):
    ours = VeraConfig(**settings)
    fields = ours.to_dict()
    assert fields["peft_type"] == "VERA"
    theirs = peft.VeraConfig(**{k: v for k, v in fields.items() if k != "peft_type"})
    back = VeraConfig.from_dict(theirs.to_dict())
    # a set in PEFT
    if isinstance(ours.target_modules, list):
        ours = dataclasses.replace(ours, target_modules=sorted(ours.target_modules))
    assert back == ours
    assert VeraConfig.from_dict(json.loads(json.dumps(fields))) == VeraConfig(**settings)
    known = set(theirs.to_dict())
    assert set(fields) <= known
    assert known - set(fields) == {
        "auto_mapping", "inference_mode", "peft_version", "revision",
    }  # fmt: skip
    for name in set(fields) - {"peft_type", "target_modules"}:
        assert getattr(theirs, name) == fields[name], name


def test_defaults_are_those_of_peft():
    theirs = peft.VeraConfig()
    for name, value in VeraConfig().to_dict().items():
        assert getattr(theirs, name) == value, name


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({}, "VERA"),
        ({"save_projection": False}, "VERA"),
        ({"init": "position"}, "VERA"),
        ({"init": "kaiming_normal"}, "VERA"),
        ({"init": "position", "save_projection": False}, "VERA_SEED"),
        ({"init": "kaiming_normal", "save_projection": False}, "VERA_SEED"),
        ({"use_dora": True}, "DVORA"),
        ({"use_dora": True, "init": "position", "save_projection": False}, "DVORA"),
    ],
    ids=str,
)
def test_the_type_says_whether_peft_computes_the_same(settings, kind):
    config = VeraConfig(r=4, target_modules=["a"], **settings)
    assert config.to_dict()["peft_type"] == kind
    if kind == "VERA":
        assert not {"init", "use_dora"} & set(config.to_dict())
    else:
        assert VeraConfig.from_dict(config.to_dict()) == config
        with pytest.raises(ValueError, match=kind):
            peft.PeftType(kind)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"lora_alpha": 8}, "others too: lora_alpha=8"),
        ({"lora_alpha": 0}, "others too: lora_alpha=0"),
        ({"exclude_modules": ["a"], "zeta": ""}, r"others too: exclude_modules=\['a'\], zeta=''"),
        ({"peft_type": "LORA"}, "peft_type: expected VERA, DVORA or VERA_SEED, got 'LORA'"),
        ({"peft_type": None}, "peft_type: expected VERA"),
        ({"peft_type": ["VERA"]}, "peft_type: expected VERA"),
        ({"use_dora": True}, "use_dora: expected False in a file of type VERA, got True"),
        ({"peft_type": "DVORA"}, "use_dora: expected True in a file of type DVORA, got False"),
        ({"r": "8"}, "r: expected an integer >= 1, got '8'"),
    ],
    ids=str,
)
def test_unknown_and_contradicting_fields_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        VeraConfig.from_dict({**VeraConfig().to_dict(), **fields})


def test_unknown_fields_that_are_off_are_passed_over():
    fields = {**VeraConfig(r=3).to_dict(), "future_switch": False, "future_list": None}
    assert VeraConfig.from_dict(fields) == VeraConfig(r=3)
    assert VeraConfig.from_dict({**fields, "layers_pattern": ""}) == VeraConfig(r=3)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"r": 0}, ValueError, "r: expected an integer >= 1, got 0"),
        ({"r": 2.0}, ValueError, "r: expected an integer"),
        ({"r": True}, ValueError, "r: expected an integer"),
        ({"projection_prng_key": -1}, ValueError, "projection_prng_key: expected an integer from"),
        ({"projection_prng_key": 2**63}, ValueError, "projection_prng_key: expected an integer"),
        ({"bias": "lora_only"}, ValueError, "bias: expected one of none, all, vera_only"),
        ({"bias": None}, ValueError, "bias: expected one of"),
        ({"init": "normal"}, ValueError, "init: expected one of kaiming_uniform"),
        ({"vera_dropout": 1.5}, ValueError, "vera_dropout: expected a share from 0 to 1, got 1.5"),
        ({"vera_dropout": -0.1}, ValueError, "vera_dropout: expected"),
        ({"vera_dropout": True}, ValueError, "vera_dropout: expected a share"),
        ({"vera_dropout": "0.1"}, TypeError, "vera_dropout: expected a number, got str"),
        ({"d_initial": float("nan")}, ValueError, "d_initial: expected a finite number, got nan"),
        ({"d_initial": None}, TypeError, "d_initial: expected a number, got None"),
        ({"d_initial": True}, TypeError, "d_initial: expected a number, got True"),
        ({"save_projection": 1}, TypeError, "save_projection: expected True or False, got 1"),
        ({"use_dora": "yes"}, TypeError, "use_dora: expected True or False"),
        ({"init_weights": "gaussian"}, TypeError, "init_weights: expected True or False"),
        ({"fan_in_fan_out": None}, TypeError, "fan_in_fan_out: expected True or False"),
        ({"target_modules": [1]}, TypeError, r"target_modules: expected non-empty names, got \[1"),
        ({"target_modules": {1}}, TypeError, "target_modules: expected non-empty names"),
        ({"target_modules": ""}, TypeError, "target_modules: expected a non-empty string or"),
        ({"target_modules": 3}, TypeError, "target_modules: expected a non-empty string or"),
        ({"modules_to_save": "head"}, TypeError, "modules_to_save: expected a list of names"),
        ({"modules_to_save": [""]}, TypeError, "modules_to_save: expected non-empty names"),
        ({"layers_to_transform": "1"}, TypeError, "layers_to_transform: expected the number"),
        ({"layers_to_transform": [True]}, TypeError, "layers_to_transform: expected the number"),
        ({"layers_to_transform": -1}, TypeError, "layers_to_transform: expected the number"),
        ({"layers_pattern": "h"}, ValueError, "layers_to_transform: expected the numbers"),
        ({"task_type": 3}, ValueError, "task_type: expected one of CAUSAL_LM, .*got 3"),
        ({"task_type": "SEQ"}, ValueError, "task_type: expected one of CAUSAL_LM, .*got 'SEQ'"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(settings, error, words):
    with pytest.raises(error, match=f"^VeraConfig: {words}"):
        VeraConfig(**settings)


def test_sets_and_numbers_of_numpy_become_what_json_has():
    np = pytest.importorskip("numpy")
    config = VeraConfig(
        r=np.int64(4),
        target_modules={"b", "a"},
        d_initial=np.float32(0.5),
        vera_dropout=0,
        task_type=peft.TaskType.CAUSAL_LM,
    )
    assert json.loads(json.dumps(config.to_dict()))["target_modules"] == ["a", "b"]
    assert config == VeraConfig(
        r=4, target_modules=["a", "b"], d_initial=0.5, task_type="CAUSAL_LM"
    )


@pytest.mark.parametrize("config", [None, {"r": 4}, 3, peft.LoraConfig(target_modules=["query"])])
def test_other_configurations_are_refused(config):
    model = tiny_roberta()
    before = snapshot(model)
    with pytest.raises((TypeError, ValueError), match="expected"):
        get_vera_model(model, config)
    assert_unchanged(model, before)


def test_pytorchs_own_transformer_layer_calls_its_adapters():
    """In evaluation it would read the weights: the adapters would be trained and then not used."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    config = VeraConfig(r=4, target_modules="all-linear", init_weights=False)
    model = get_vera_model(encoder, config).eval()
    assert sorted(model.adapters) == ["default"]
    x = torch.randn(2, 5, 16)
    adapted = model(x)
    with torch.no_grad():
        torch.testing.assert_close(model(x), adapted)
        model.set_adapter(None)
        assert not torch.allclose(model(x), adapted, atol=1e-2)


def test_a_layer_whose_weight_is_read_is_refused():
    attention = nn.ModuleDict(
        {"attention": nn.MultiheadAttention(16, 2), "next": nn.Linear(16, 16)}
    )
    with pytest.raises(ValueError, match=r"expected linear layers, got attention\.out_proj"):
        get_vera_model(attention, VeraConfig(r=4, target_modules=["out_proj", "next"]))
    config = VeraConfig(r=4, target_modules=["next"], modules_to_save=["out_proj"])
    before = snapshot(attention)
    with pytest.raises(ValueError, match=r"modules that are called, got attention\.out_proj"):
        get_vera_model(attention, config)
    assert_unchanged(attention, before)
    model = get_vera_model(attention, VeraConfig(r=4, target_modules="all-linear"))
    assert type(model.model["attention"].out_proj) is not type(model.model["next"])


class Within(nn.Module):
    """``classifier`` is the end of ``aux_classifier`` too, and of a list."""

    def __init__(self):
        super().__init__()
        self.dense, self.classifier = nn.Linear(8, 8), nn.Linear(8, 3)
        self.aux_classifier = nn.Sequential()
        self.aux_classifier.add_module("dense", nn.Linear(8, 8))
        self.lists = nn.ModuleDict(
            {
                "some": nn.ModuleList([nn.Linear(8, 8)]),
                "vectors": nn.ParameterList([torch.zeros(2)]),
                "named": nn.ParameterDict({"a": torch.zeros(2)}),
            }
        )

    def forward(self, x):
        return self.classifier(self.aux_classifier(self.dense(x)))


def test_a_target_within_what_is_trained_whole_is_refused(tmp_path):
    """PEFT adapts it, and the copy of it."""
    net = Within()
    before = snapshot(net)
    config = VeraConfig(r=4, target_modules=["dense"], modules_to_save=["classifier"])
    with pytest.raises(ValueError, match=r"outside of .* got aux_classifier\.dense; name these"):
        get_vera_model(net, config)
    assert_unchanged(net, before)
    config = VeraConfig(
        r=4, target_modules=["dense"], modules_to_save=["classifier", "aux_classifier"]
    )
    model = get_vera_model(net, config)
    assert adapted(model.model) == {"dense"}
    model.save_pretrained(tmp_path)
    again = VeraModel.from_pretrained(Within(), tmp_path)
    assert sorted(again._adapters.trained()) == ["aux_classifier", "classifier"]


def test_modules_trained_whole_within_others_are_refused():
    names = ("aux_classifier", "aux_classifier.dense")
    for first, second in (names, names[::-1]):
        model = get_vera_model(
            Within(), VeraConfig(r=4, target_modules=r"dense", modules_to_save=[first])
        )
        before = snapshot(model)
        config = VeraConfig(r=4, target_modules=r"dense", modules_to_save=[second])
        with pytest.raises(
            ValueError, match="modules_to_save: expected modules of which none lies"
        ):
            model.add_adapter("second", config)
        assert_unchanged(model, before)


@pytest.mark.parametrize("name", ["lists", "some", "vectors", "named"])
def test_what_is_never_called_cannot_be_trained_whole(name):
    net = Within()
    before = snapshot(net)
    config = {"r": 4, "target_modules": ["classifier"], "modules_to_save": [name]}
    with pytest.raises(TypeError, match="cannot be applied to modules of type"):
        peft.get_peft_model(Within(), peft.VeraConfig(**config))
    with pytest.raises(ValueError, match=rf"modules that are called, got .*{name} \("):
        get_vera_model(net, VeraConfig(**config))
    assert_unchanged(net, before)


class Remembers(nn.Linear):
    """It holds what it gave last, which cannot be copied with its graph."""

    def forward(self, x):
        self.last = super().forward(x)
        return self.last


def test_what_cannot_be_copied_leaves_the_model_as_it_was():
    net = nn.Sequential(nn.Linear(8, 8), Remembers(8, 8))
    net(torch.randn(1, 8))
    config = VeraConfig(r=4, target_modules=["0"], modules_to_save=["1"])
    before = snapshot(net)
    with pytest.raises(ValueError, match=r"that can be copied and trained, got 1 \(Remembers\)"):
        get_vera_model(net, config)
    assert_unchanged(net, before)
    assert all(p.requires_grad for p in net.parameters())
    model = get_vera_model(net, VeraConfig(r=4, target_modules=["0"]))
    before = snapshot(model)
    with pytest.raises(ValueError, match="can be copied"):
        model.add_adapter("second", config)
    assert_unchanged(model, before)
    assert list(model.adapters) == ["default"]
    net[1].last = None
    model.add_adapter("second", config)


def test_what_was_trained_whole_is_itself_again_after_the_last_adapter():
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).train()
    head = net[1]
    config = VeraConfig(r=4, target_modules=["0"], modules_to_save=["1"])
    model = get_vera_model(net, config)
    model.add_adapter("second", config)
    model.delete_adapter("default")
    assert isinstance(net[1], TrainedModule)
    model.eval()
    model.delete_adapter("second")
    assert net[1] is head
    assert not head.training
    model.add_adapter("third", VeraConfig(r=4, target_modules=["0", "1"]))
    assert adapted(net) == {"0", "1"}


class Scaled(nn.Module):
    """Linear, and known to be by nothing but its weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 8))

    def forward(self, x):
        return 2 * (x @ self.weight.mT)


def test_a_layer_of_another_kind_is_known_by_what_it_gives():
    net = nn.Sequential(Scaled(), nn.Linear(6, 3))
    model = get_vera_model(net, VeraConfig(r=4, target_modules=["0"], init_weights=False))
    x = torch.randn(5, 8)
    layer, (pair,) = model.model[0], model.shared.values()
    d, b = layer.lambda_d["default"], layer.lambda_b["default"]
    expected = 2 * (x @ layer.base_layer.weight.mT) + b * ((x @ pair.A.mT * d) @ pair.B.mT)
    torch.testing.assert_close(layer(x), expected)


class Odd(nn.Linear):
    """Takes what a linear layer takes, and says what one says."""

    def __init__(self, after, before=lambda x: x):
        super().__init__(64, 32)
        self.after, self.before = after, before
        self.inner = nn.Dropout().eval()

    def forward(self, x):
        return self.after(super().forward(self.before(x)))


def rounded(bits):
    """Inputs as some quantised layers take them."""

    def round_to(x):
        scale = x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-9) / (2 ** (bits - 1) - 1)
        return (x / scale).round() * scale

    return round_to


def with_one_more(x):
    """Not to be tried with one input."""
    raise TypeError("expected another argument")


NONLINEAR = {
    "relu": (lambda x: 3 * x.relu(),),
    "gelu": (nn.functional.gelu,),
    "silu": (nn.functional.silu,),
    "tanh": (torch.tanh,),
    "softmax": (lambda x: x.softmax(-1),),
    "norm": (lambda x: nn.functional.layer_norm(x, (32,)),),
    "relu before": (lambda x: x, torch.relu),
    "a pair": (lambda x: (x, x),),
    "a row": (lambda x: x[0],),
}
LINEAR = {
    "scaled": (lambda x: 3 * x,),
    "8 bits": (lambda x: x, rounded(8)),
    "4 bits": (lambda x: x, rounded(4)),
    "bfloat16": (lambda x: x.bfloat16().float(), lambda x: x.bfloat16().float()),
    "of other arguments": (with_one_more,),
}


@pytest.mark.parametrize("how", NONLINEAR.values(), ids=NONLINEAR)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_that_is_not_linear_is_refused(how, dtype):
    torch.manual_seed(1)
    net = nn.Sequential(Odd(*how), nn.Linear(32, 3)).to(dtype)
    before = snapshot(net)
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"expected linear layers, got 0 \(Odd\)"):
        get_vera_model(net, VeraConfig(r=4, target_modules=["0", "1"]))
    assert_unchanged(net, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert (net[0].training, net[0].inner.training) == (True, False)
    get_vera_model(net, VeraConfig(r=4, target_modules="all-linear"))
    assert adapted(net) == {"1"}


@pytest.mark.parametrize("how", LINEAR.values(), ids=LINEAR)
@pytest.mark.parametrize("bias", [0, 5])
def test_a_layer_that_is_linear_but_for_rounding_is_adapted(how, bias):
    torch.manual_seed(1)
    net = nn.Sequential(Odd(*how), nn.Linear(32, 3))
    net[0].bias.data.add_(bias)
    get_vera_model(net, VeraConfig(r=4, target_modules="all-linear"))
    assert adapted(net) == {"0", "1"}


def test_a_layer_is_tried_once_and_one_without_weights_never():
    calls = []

    def count(x):
        calls.append(1)
        return x

    with torch.device("meta"):
        absent = nn.Sequential(Odd(count), nn.Linear(32, 3))
    get_vera_model(absent, VeraConfig(r=4, target_modules=["0"], save_projection=False))
    assert not calls
    model = get_vera_model(
        nn.Sequential(Odd(count), nn.Linear(32, 3)), VeraConfig(r=4, target_modules=["0"])
    )
    assert len(calls) == 4
    model.add_adapter("second", VeraConfig(r=4, target_modules=["0"]))
    assert len(calls) == 4


def test_classes_are_let_go_with_the_models_that_they_are_of():
    class Own(nn.Sequential):
        pass

    model = get_vera_model(Own(nn.Linear(8, 8)), VeraConfig(r=4, target_modules=["0"]))
    other = VeraModel(Own(nn.Linear(8, 8)))
    assert type(model) is type(other)
    assert type(model).__name__ == "VeraModelOfOwn"
    kept = weakref.ref(Own)
    del model, Own
    gc.collect()
    assert type(VeraModel(kept()(nn.Linear(8, 8)))) is type(other)
    del other
    # first our class, and then what it was of
    for _ in range(2):
        gc.collect()
    assert kept() is None


def test_positional_matrices_start_with_products_of_pefts_size():
    # not the matrices' own seed: x would not be independent of A
    torch.manual_seed(5)
    x, spread = torch.randn(64, 300), {}
    for init in ("kaiming_uniform", "position"):
        config = VeraConfig(r=64, target_modules=["0"], init=init)
        model = get_vera_model(nn.Sequential(nn.Linear(300, 200)), config)
        layer = model.model[0]
        layer.lambda_b["default"].data.fill_(1)
        spread[init] = (layer(x) - layer.base_layer(x)).std().item()
    assert spread["position"] == pytest.approx(spread["kaiming_uniform"], rel=0.1)
