"""Rows without labels train on the teacher alone."""

import copy
import math

import datasets
import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import TrainerCallback

from ..helpers.tiny_models import tiny_bert, tiny_llama, tiny_t5, tiny_vit, tiny_yolos
from ..helpers.training import (
    PLAIN_SGD,
    Gradients,
    Lazy,
    batch_of,
    image_rows,
    make_trainer,
    max_difference,
    state_of,
    step_logs,
    text_rows,
    token_rows,
)


def one_step(folder, student, teacher, rows, **settings):
    gradients = Gradients()
    settings = {
        "objective": "kd",
        "per_device_train_batch_size": 8,
        "train_sampling_strategy": "sequential",
        **PLAIN_SGD,
        **settings,
    }
    trainer = make_trainer(
        folder, copy.deepcopy(student), teacher, rows, callbacks=[gradients], max_steps=1, **settings
    )
    trainer.train()
    return trainer, gradients.steps[0]


def kd_by_hand(student, teacher, rows, labels, is_distilled, temperature=2.0):
    """Task loss over the labelled rows, and the divergence over those that are distilled, each a mean of its own."""
    ours, theirs = (model(**rows).logits for model in (student, teacher))
    if labels.ndim > 1:
        ours, theirs, labels, is_distilled = ours[:, :-1], theirs[:, :-1], labels[:, 1:], is_distilled[:, 1:]
    task = F.cross_entropy(ours.flatten(0, -2), labels.flatten())
    target = (theirs / temperature).log_softmax(-1)
    kl = (target.exp() * (target - (ours / temperature).log_softmax(-1))).sum(-1) * temperature**2
    return task + kl[is_distilled].mean()


def test_a_mixed_batch_has_a_mean_over_its_labels_and_a_mean_over_all(tmp_path):
    teacher, student = tiny_vit(), tiny_vit(num_hidden_layers=2)
    rows = image_rows(8)
    for row in rows[2:7]:
        row["labels"] = torch.tensor(-100)
    trainer, step = one_step(tmp_path, student, teacher, rows)
    batch = batch_of(rows)
    labels = batch.pop("labels")
    loss = kd_by_hand(student, teacher, batch, labels, torch.ones(8, dtype=torch.bool))
    loss.backward()
    expected = {name: p.grad for name, p in student.named_parameters()}
    assert step_logs(trainer)[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert max_difference({name: step[name] for name in expected}, expected) < 1e-6


@pytest.mark.parametrize("everywhere", [False, True])
def test_texts_without_labels_are_distilled_at_all_tokens_and_prompts_if_asked_for(tmp_path, everywhere):
    teacher, student = tiny_llama(), tiny_llama(num_hidden_layers=2)
    rows = token_rows(6)
    for row in rows:
        row["labels"] = torch.where(row["attention_mask"] == 0, -100, row["labels"])
    for row in rows[1:3]:
        row["labels"] = torch.full_like(row["labels"], -100)
    settings = {"distill_on": "all"} if everywhere else {}
    trainer, step = one_step(tmp_path, student, teacher, rows, **settings)
    batch = batch_of(rows)
    labels, mask = batch.pop("labels"), batch["attention_mask"].bool()
    counted = mask if everywhere else mask & ((labels != -100) | (labels == -100).all(1, keepdim=True))
    loss = kd_by_hand(student, teacher, batch, labels, counted)
    loss.backward()
    assert step_logs(trainer)[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    expected = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    assert max_difference({name: step[name] for name in expected}, expected) < 1e-6


def table(rows, **columns):
    return datasets.Dataset.from_dict({"pixel_values": [row["pixel_values"].tolist() for row in rows], **columns})


@pytest.mark.parametrize("settings", [{}, {"stepping_stones": "all", "objective": "block_kd"}, {"objective": "simkd"}])
def test_no_label_at_all_is_the_same_as_labels_of_minus_100(tmp_path, settings):
    teacher, student = tiny_vit(), tiny_vit(num_hidden_layers=2)
    rows = image_rows(8)
    settings = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "connector_start": "random",
    } | settings
    data = [
        table(rows, label=[-100] * 8),
        table(rows, label=[None] * 8),
        table(rows),
        table(rows).with_format("torch"),
        [{"pixel_values": row["pixel_values"]} for row in rows],
        datasets.Dataset.from_list(list(table(rows))).to_iterable_dataset(),
    ]
    results = [state_of(one_step(tmp_path, student, teacher, own, **settings)[0].model) for own in data]
    for result in results[1:]:
        assert max_difference(result, results[0]) == 0.0
    assert max_difference(results[0], state_of(student)) > 1e-4


def test_gaps_in_a_column_are_rows_without_a_label(tmp_path):
    teacher, student = tiny_vit(), tiny_vit(num_hidden_layers=2)
    rows, labels = image_rows(8), [1, None, 2, None, None, 0, 3, 4]
    filled = table(rows, label=[-100 if label is None else label for label in labels])
    gaps = table(rows, label=labels)
    results = [
        state_of(one_step(tmp_path, student, teacher, own)[0].model)
        for own in (filled, gaps, gaps.with_format("torch"), gaps.with_format("numpy"))
    ]
    for result in results[1:]:
        assert max_difference(result, results[0]) == 0.0


def test_the_teacher_cache_knows_rows_without_labels(tmp_path):
    teacher, student = tiny_vit(), tiny_vit(num_hidden_layers=2)
    data = table(image_rows(8), label=[1, None, 2, None, None, 0, 3, 4])
    cached = {"teacher_cache": str(tmp_path / "cache")}
    (plain, _), (kept, _) = (one_step(tmp_path, student, teacher, data, **settings) for settings in ({}, cached))
    assert max_difference(state_of(plain.model), state_of(kept.model)) == 0.0


@pytest.mark.parametrize("settings", [{"objective": "alone"}, {"objective": "kd", "distill_weight": 0.0}])
def test_a_stream_without_labels_is_refused_on_the_first_batch_where_they_are_needed(tmp_path, settings):
    rows = table(image_rows(8)).to_iterable_dataset()
    trainer = make_trainer(tmp_path, tiny_vit(num_hidden_layers=2), tiny_vit(), rows, max_steps=1, **settings)
    with pytest.raises(ValueError, match="labels missing from the batch"):
        trainer.train()


LABELS_ALONE = {
    "alone": "`objective` is 'alone'",
    "theseus": "`objective` is 'theseus'",
    "kd": "`distill_weight` is 0",
    "block_kd": "`distill_weight` and `state_weight` and `cross_weight` are 0",
    "kd+hint": "`distill_weight` and `hint_weight` are 0",
}


@pytest.mark.parametrize("none", [None, -100])
@pytest.mark.parametrize("objective", LABELS_ALONE)
def test_a_run_in_which_nothing_would_train_is_refused_before_the_first_step(tmp_path, objective, none):
    weights = {"distill_weight": 0.0, "hint_weight": 0.0}
    trainer = make_trainer(
        tmp_path,
        tiny_vit(num_hidden_layers=2),
        tiny_vit(),
        table(image_rows(8), label=[none] * 8),
        objective=objective,
        max_steps=1,
        **weights,
    )
    with pytest.raises(ValueError, match=f"{LABELS_ALONE[objective]}, so that labels .* no row of `train_dataset` has"):
        trainer.train()
    assert trainer.state.global_step == 0


def watched_run(folder, monkeypatch, labels, make_data=Lazy, **settings):
    said = []
    monkeypatch.setattr("hf_blockkd.training.label_watch.logger.warning", said.append)
    rows = [{**row, "labels": one} for row, one in zip(image_rows(len(labels)), labels, strict=True)]
    settings = {"per_device_train_batch_size": 1, "train_sampling_strategy": "sequential", "max_steps": 12, **settings}
    models = tiny_vit(num_hidden_layers=2), tiny_vit()
    make_trainer(folder, *models, make_data(rows), eval_dataset=image_rows(4), **settings).train()
    return said


def stream(rows):
    columns = [{**row, "pixel_values": row["pixel_values"].tolist()} for row in rows]
    return datasets.Dataset.from_list(columns).to_iterable_dataset()


@pytest.mark.parametrize("none", [None, -100])
@pytest.mark.parametrize("make_data", [Lazy, stream])
@pytest.mark.parametrize("steps", [3, 12])
def test_a_run_that_trained_nothing_says_so_once_where_it_could_not_be_known(
    tmp_path, monkeypatch, make_data, none, steps
):
    evaluated = {"eval_strategy": "steps", "eval_steps": 1}  # whose rows have labels
    settings = {"objective": "alone", "max_steps": steps, **evaluated}
    said = watched_run(tmp_path, monkeypatch, [none] * 12, make_data, **settings)
    assert said == [
        "Nothing has been trained so far: `objective` is 'alone', so that labels alone train, but no row that this "
        f"process has read in its first steps ({min(steps, 10)}) has one; label some, or choose 'block_kd' or 'kd'."
    ]


def test_it_names_the_weight_that_is_zero(tmp_path, monkeypatch):
    (said,) = watched_run(tmp_path, monkeypatch, [-100] * 12, objective="kd", distill_weight=0.0)
    assert "`distill_weight` is 0, so that labels alone train" in said


@pytest.mark.parametrize(
    ("labels", "settings"),
    [
        ([-100] * 9 + [1] + [-100] * 2, {"objective": "alone"}),
        ([-100] * 11 + [1], {"objective": "alone", "gradient_accumulation_steps": 2, "max_steps": 6}),
        ([-100] * 12, {"objective": "kd"}),
    ],
)
def test_it_says_nothing_where_a_label_comes_late_or_the_teacher_is_asked(tmp_path, monkeypatch, labels, settings):
    assert watched_run(tmp_path, monkeypatch, labels, **settings) == []


def test_it_says_nothing_of_a_finished_run_that_is_resumed(tmp_path, monkeypatch):
    settings = {"objective": "alone", "max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    models = tiny_vit(num_hidden_layers=2), tiny_vit()
    make_trainer(tmp_path, *models, Lazy(image_rows(8)), **settings).train()
    said = []
    monkeypatch.setattr("hf_blockkd.training.label_watch.logger.warning", said.append)
    trainer = make_trainer(tmp_path, *models, Lazy(image_rows(8)), **settings)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 1
    assert said == []


@pytest.mark.parametrize("settings", [{"state_weight": 1.0}, {"objective": "hint"}, {"objective": "simkd"}])
def test_states_are_enough_where_nothing_else_is_compared(tmp_path, settings):
    settings = {"distill_weight": 0.0, "max_steps": 1, **settings}
    data, student = table(image_rows(8), label=[None] * 8), tiny_vit(num_hidden_layers=2)
    before = state_of(student)
    make_trainer(tmp_path, student, tiny_vit(), data, **settings).train()
    assert max_difference(state_of(student), before) > 0


def test_labels_of_some_rows_are_enough_for_an_objective_of_labels_alone(tmp_path):
    data = table(image_rows(8), label=[None] * 7 + [1])
    trainer = make_trainer(tmp_path, tiny_vit(num_hidden_layers=2), tiny_vit(), data, objective="alone", max_steps=8)
    trainer.train()
    assert trainer.state.global_step == 8


def test_labels_that_a_collator_makes_of_texts_are_labels(tmp_path):
    rows = [{"input_ids": row["input_ids"], "attention_mask": torch.ones(6).long()} for row in token_rows(8)]
    trainer = make_trainer(
        tmp_path, tiny_llama(num_hidden_layers=2), tiny_llama(), rows, objective="alone", max_steps=1
    )
    trainer.data_collator = lambda rows: (batch := batch_of(rows)) | {"labels": batch["input_ids"]}
    trainer.train()
    assert step_logs(trainer)[0]["loss"] > 0


def test_what_the_student_writes_needs_something_to_learn_from(tmp_path):
    student, settings = tiny_llama(num_hidden_layers=2), {"lmbda": 0.5, "distill_weight": 0.0, "objective": "kd"}
    trainer = make_trainer(tmp_path, student, tiny_llama(), token_rows(8), max_steps=1, **settings)
    with pytest.raises(ValueError, match=r"`distill_weight` is 0, .*`lmbda` is 0\.5, and what the student writes has"):
        trainer.train()


def test_a_decoder_without_labels_is_refused_before_the_first_step(tmp_path):
    rows = [{"input_ids": row["input_ids"]} for row in token_rows(8)]
    trainer = make_trainer(tmp_path, tiny_t5(num_decoder_layers=2), tiny_t5(), rows, max_steps=1)
    with pytest.raises(ValueError, match="`labels` missing from the batch"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_an_evaluation_without_labels_is_skipped_with_one_line(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("hf_blockkd.training.evaluating_trainer.logger.warning", said.append)
    teacher, student = tiny_vit(), tiny_vit(num_hidden_layers=2)
    sets = {"none": table(image_rows(8)), "all": table(image_rows(8), label=[1] * 8)}
    trainer = make_trainer(tmp_path, student, teacher, table(image_rows(8)), eval_dataset=sets, max_steps=1)
    metrics = trainer.evaluate()
    assert "eval_all_loss" in metrics
    assert not any(name.startswith("eval_none") for name in metrics)
    assert said == ["The rows of `eval_none_dataset` have no labels: there is nothing to evaluate."]
    assert trainer.evaluate(sets["none"]) == {}


def test_a_batch_without_labels_leaves_the_loss_of_an_evaluation_finite_at_any_time_of_a_run(tmp_path):
    class Evaluates(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            found.append(trainer.evaluate()["eval_loss"])

    found = []
    data = table(image_rows(4), label=[1, None, 2, None])
    settings = {"per_device_eval_batch_size": 1, "max_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    models = tiny_vit(num_hidden_layers=2), tiny_vit()
    trainer = make_trainer(tmp_path, *models, data, eval_dataset=data, eval_on_start=True, **settings)
    trainer.add_callback(Evaluates())
    trainer.train()
    found += [one["eval_loss"] for one in trainer.state.log_history if "eval_loss" in one]
    assert len(found) == 2 + 3  # what a callback evaluates at a step is not evaluated again
    assert all(map(math.isfinite, found))


def test_predictions_without_labels_are_those_of_the_student(tmp_path):
    student, data = tiny_vit(num_hidden_layers=2), table(image_rows(5), label=[None] * 5)
    trainer = make_trainer(tmp_path, student, tiny_vit())
    found = trainer.predict(data.remove_columns("label")).predictions
    with torch.no_grad():
        expected = student.eval()(pixel_values=torch.tensor(data["pixel_values"])).logits
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-6)


SEVERAL = {"problem_type": "multi_label_classification"}
MIXED = {
    "one class": ({}, lambda row, i: i % 5),
    "several classes": (SEVERAL, lambda row, i: [1.0, 0.0, float(i % 2), 0.0, 0.0]),
    "a value": ({"num_labels": 1}, lambda row, i: 0.5 * i),
    "two values": ({"num_labels": 2, "problem_type": "regression"}, lambda row, i: [0.5 * i, 1.0]),
    "tokens": ({"head": "TokenClassification"}, lambda row, i: [i % 5] * len(row["input_ids"])),
}


def texts(label, has=lambda i: i % 2 == 0, none=None):
    rows = [{"input_ids": row["input_ids"].tolist()} for row in text_rows(8)]
    return [{**row, "labels": label(row, i) if has(i) else none} for i, row in enumerate(rows)]


@pytest.mark.parametrize("case", MIXED)
@pytest.mark.parametrize("form", ["lists", "numpy", "torch", "one by one"])
def test_rows_without_labels_mix_with_others_in_any_form_and_batch(tmp_path, case, form):
    config, label = MIXED[case]
    student, teacher = tiny_bert(num_hidden_layers=2, **config), tiny_bert(**config)
    rows = datasets.Dataset.from_list(texts(label))
    size = 1 if form == "one by one" else 4
    rows = rows.with_format(form) if form in ("numpy", "torch") else rows
    trainer = make_trainer(tmp_path, student, teacher, rows, per_device_train_batch_size=size, max_steps=8 // size)
    trainer.train()
    assert all(np.isfinite(entry["loss"]) for entry in step_logs(trainer))


@pytest.mark.parametrize("form", [None, "numpy", "torch"])
@pytest.mark.parametrize("problem_type", ["regression", "multi_label_classification"])
def test_gaps_among_the_values_of_a_row_take_no_part_in_its_task_loss(tmp_path, problem_type, form):
    config = {
        "num_labels": 2,
        "problem_type": problem_type,
        "hidden_dropout_prob": 0,
        "attention_probs_dropout_prob": 0,
    }
    student, teacher = tiny_bert(num_hidden_layers=2, **config), tiny_bert(**config)
    rows = texts(lambda row, i: [1.0, None if i % 3 else 0.0], has=lambda i: i != 5)
    settings = {**PLAIN_SGD, "objective": "kd", "per_device_train_batch_size": 8, "max_steps": 1}
    data = datasets.Dataset.from_list(rows).with_format(form)
    trainer = make_trainer(tmp_path, copy.deepcopy(student), teacher, data, **settings)
    trainer.train()
    labels = torch.tensor([[math.nan if one is None else one for one in row["labels"] or [None] * 2] for row in rows])
    batch = trainer.data_collator([{"input_ids": row["input_ids"]} for row in rows])
    logits = student.train()(**batch).logits
    loss = F.mse_loss if problem_type == "regression" else F.binary_cross_entropy_with_logits
    expected = loss(logits[~labels.isnan()], labels[~labels.isnan()])
    assert step_logs(trainer)[0]["loss_task"] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("none", [None, -100])
def test_an_evaluation_of_labels_that_are_all_left_out_is_skipped(tmp_path, none):
    student, teacher = tiny_bert(num_hidden_layers=2), tiny_bert()
    rows = datasets.Dataset.from_list(texts(MIXED["one class"][1], has=lambda i: False, none=none))
    trainer = make_trainer(tmp_path, student, teacher, rows, eval_dataset=rows, max_steps=1)
    assert trainer.evaluate() == {}


@pytest.mark.parametrize("none", [None, -100.0])
def test_an_evaluation_of_values_counts_those_that_are_there(tmp_path, none):
    student, teacher = tiny_bert(num_hidden_layers=2, num_labels=1), tiny_bert(num_labels=1)
    whole, some = (texts(MIXED["a value"][1], has=has, none=none) for has in (lambda i: True, lambda i: i < 2))
    trainer = make_trainer(tmp_path, student, teacher, whole, per_device_eval_batch_size=8)
    labelled = trainer.evaluate(datasets.Dataset.from_list(whole[:2]))["eval_loss"]
    assert trainer.evaluate(datasets.Dataset.from_list(some))["eval_loss"] == pytest.approx(labelled, rel=1e-5)


def test_a_decoder_of_rows_that_lack_some_labels_is_told_so(tmp_path):
    rows = datasets.Dataset.from_list(texts(lambda row, i: [7, 8]))
    trainer = make_trainer(tmp_path, tiny_t5(num_decoder_layers=2), tiny_t5(), rows, max_steps=1)
    with pytest.raises(ValueError, match="of which T5ForConditionalGeneration makes the inputs of its decoder"):
        trainer.train()


def test_images_with_and_without_objects_train_together(tmp_path):
    objects = {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}
    rows = [{"pixel_values": torch.randn(1, 16, 16)} | ({"labels": objects} if i % 2 else {}) for i in range(8)]

    def collate(rows):
        pixels = torch.stack([row["pixel_values"] for row in rows])
        return {"pixel_values": pixels, "labels": [row["labels"] for row in rows]}

    trainer = make_trainer(tmp_path, tiny_yolos(num_hidden_layers=2), tiny_yolos(), rows, max_steps=2)
    trainer.data_collator = collate
    trainer.train()
    assert all(np.isfinite(entry["loss"]) and entry["loss_task"] > 0 for entry in step_logs(trainer))
