"""VeRA models in transformers' Trainer: labels, evaluation, checkpoints, and training on."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset
from vera_models import VOCABULARY, randomize_vectors, tiny_gpt2, tiny_llama, tiny_roberta

from fmkernels.api import VeraConfig, get_vera_model

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
CHECKPOINTING = next(
    field.name
    for field in dataclasses.fields(transformers.TrainingArguments)
    if field.name in ("activation_checkpointing", "gradient_checkpointing")
)
"""What the installed version calls it, without a warning."""


class Sentences(Dataset):
    """What the first token says is the label; with a column that no model knows."""

    def __init__(self, rows, language_model=False, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(3, VOCABULARY, (rows, 6), generator=generator)
        self.labels = self.tokens if language_model else self.tokens[:, 0] % 3

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, i):
        label = self.labels[i]
        return {
            "input_ids": self.tokens[i],
            "labels": label if label.ndim else int(label),
        }


def classifier(dora=False):
    model = tiny_roberta()
    config = VeraConfig(
        r=4, target_modules=["query", "value"], modules_to_save=["classifier"], use_dora=dora
    )
    return randomize_vectors(get_vera_model(model, config))


def language_model(tiny=tiny_llama, **changes):
    targets = ["c_attn"] if tiny is tiny_gpt2 else ["q_proj", "k_proj", "v_proj"]
    return randomize_vectors(
        get_vera_model(tiny(), VeraConfig(r=4, target_modules=targets, **changes))
    )


def trainer(model, folder, steps=6, rows=32, is_language_model=False, **settings):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=8,
        per_device_eval_batch_size=8,
        max_steps=steps,
        learning_rate=settings.pop("learning_rate", 0.02),
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **{"save_strategy": "no", **settings},
    )
    return transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=Sentences(rows, is_language_model),
        eval_dataset=Sentences(16, is_language_model, seed=1),
        compute_metrics=accuracy,
    )


def accuracy(prediction):
    answers = prediction.predictions
    answers = answers[0] if isinstance(answers, tuple) else answers
    return {"accuracy": float(np.mean(answers.argmax(-1) == prediction.label_ids))}


def trained(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def losses(found):
    return [entry["loss"] for entry in found.state.log_history if "loss" in entry]


@pytest.mark.parametrize("dora", [False, True])
def test_training_and_evaluation(tmp_path, dora):
    """Labels are found, and the loss is that of the model called by hand."""
    model = classifier(dora)
    before, frozen = trained(model), copy.deepcopy(dict(model.model.named_parameters()))
    run = trainer(model, tmp_path, steps=24, learning_rate=0.01)
    assert run.label_names == ["labels"]
    start = run.evaluate()
    batch = Sentences(16, seed=1)
    with torch.no_grad():
        expected = model(input_ids=batch.tokens, labels=batch.labels)
    assert start["eval_loss"] == pytest.approx(float(expected.loss), rel=1e-4)
    hits = (expected.logits.argmax(-1) == batch.labels).double().mean()
    assert start["eval_accuracy"] == pytest.approx(float(hits))
    run.train()
    assert np.mean(losses(run)[-8:]) < np.mean(losses(run)[:8])
    for name, value in trained(model).items():
        assert not torch.equal(value, before[name]), name
    for name, value in model.model.named_parameters():
        if not value.requires_grad:
            assert torch.equal(value, frozen[name]), name


def test_unused_columns_are_those_that_the_model_does_not_take(tmp_path):
    """Trainer reads the signature of forward: it is the model's, not that of *args and **kwargs."""
    model = classifier()
    run = trainer(model, tmp_path)
    run._set_signature_columns_if_needed()
    wrapped, plain = set(run._signature_columns), trainer(tiny_roberta(), tmp_path)
    plain._set_signature_columns_if_needed()
    assert wrapped == set(plain._signature_columns) | {"adapter_names"}


def tied():
    """The output layer has the weight of the embeddings."""
    return language_model(tiny_gpt2)


@pytest.mark.parametrize("make", [classifier, language_model, tied])
def test_training_goes_on_from_a_checkpoint(tmp_path, make):
    """As if it had not been interrupted."""
    is_language_model = make is not classifier
    settings = {"is_language_model": is_language_model, "learning_rate": 0.005}
    model = make()
    run = trainer(model, tmp_path / "a", steps=6, save_strategy="steps", save_steps=3, **settings)
    run.train()
    again = make()
    with torch.no_grad():
        for parameter in again.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    resumed = trainer(again, tmp_path / "a", steps=6, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert losses(resumed) == losses(run)
    for name, value in trained(again).items():
        torch.testing.assert_close(value, trained(model)[name], rtol=0, atol=0)


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    model = classifier(dora=True)
    run = trainer(
        model,
        tmp_path,
        steps=6,
        learning_rate=0.5,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
    )
    run.train()
    found = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    assert min(found) < found[-1]
    assert run.evaluate()["eval_loss"] == pytest.approx(min(found), rel=1e-6)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpoints(tmp_path, use_reentrant):
    """The same steps as without them."""
    plain, checkpointed = language_model(use_dora=True), language_model(use_dora=True)
    settings = {"steps": 3, "is_language_model": True, "learning_rate": 0.005}
    run = trainer(plain, tmp_path, **settings)
    run.train()
    other = trainer(
        checkpointed,
        tmp_path,
        **{CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": use_reentrant}},
        **settings,
    )
    other.train()
    assert losses(other) == pytest.approx(losses(run), rel=1e-5)
    torch.testing.assert_close(trained(checkpointed), trained(plain))
    assert any(getattr(m, "gradient_checkpointing", False) for m in checkpointed.modules())


def test_answers_to_questions_have_labels(tmp_path):
    """Their labels are called otherwise, and Trainer knows it from the name of the class."""
    model = transformers.RobertaForQuestionAnswering(tiny_roberta().config)
    adapted = get_vera_model(model, VeraConfig(r=4, target_modules=["query"]))
    run = trainer(adapted, tmp_path)
    assert run.label_names == ["start_positions", "end_positions"]


def test_labels_are_smoothed_as_without_adapters(tmp_path):
    """Those of a language model are shifted, which Trainer knows from the name of the class."""
    model = language_model()
    settings = {"is_language_model": True, "label_smoothing_factor": 0.1}
    with model.disable_adapter():
        found = trainer(model, tmp_path, **settings).evaluate()["eval_loss"]
    expected = trainer(tiny_llama(), tmp_path, **settings).evaluate()["eval_loss"]
    assert found == pytest.approx(expected, rel=1e-6)
    assert repr(model).startswith("VeraModel(")


def test_tied_weights_are_in_a_state_once():
    model = tied()
    state = model.state_dict()
    assert len({value.data_ptr() for value in state.values()}) == len(state)
    other = tied()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    assert str(other.load_state_dict(state)) == "<All keys matched successfully>"
    nested, outer = torch.nn.Sequential(model), torch.nn.Sequential(tied())
    outer.load_state_dict(nested.state_dict())
    for each in (other, outer[0]):
        assert each.model.lm_head.weight is each.model.transformer.wte.weight
        for name, value in each.state_dict().items():
            assert torch.equal(value, state[name]), name
