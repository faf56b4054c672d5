"""Evaluation sees the student alone, as the stock Trainer would, and the stones where they are asked for."""

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig
from torch.nn import functional as F
from transformers import Trainer

from ..helpers.tiny_models import tiny_bart, tiny_bert, tiny_llama, tiny_t5, tiny_vit
from ..helpers.training import (
    assert_same_state,
    batch_of,
    image_rows,
    make_trainer,
    state_of,
    step_logs,
    text_rows,
    token_rows,
)

TIMES = ("_runtime", "_per_second", "_preparation_time")


def without_times(metrics):
    return {name: value for name, value in metrics.items() if not name.endswith(TIMES)}


def accuracy(prediction):
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    kept = prediction.label_ids != -100
    return {
        "accuracy": (logits.argmax(-1) == prediction.label_ids)[kept].mean(),
        "largest": logits.max(),
        "shape": float(np.prod(logits.shape)),
    }


def multi_label_rows(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return [{**row, "labels": torch.randint(2, (5,), generator=generator).float()} for row in image_rows(count, seed)]


CASES = {
    "vit": (tiny_vit, image_rows),
    "bert": (tiny_bert, text_rows),
    "llama": (tiny_llama, token_rows),
    "t5": (tiny_t5, token_rows),
    "bart": (tiny_bart, token_rows),
}
DEPTHS = {tiny_t5: "num_decoder_layers", tiny_bart: "decoder_layers"}


def pair(build, **config):
    return build(**{DEPTHS.get(build, "num_hidden_layers"): 2}, **config), build(**config)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_evaluation_gives_the_metrics_of_the_stock_trainer(tmp_path, case, label_smoothing):
    build, make_rows = case
    student, teacher = pair(build)
    evaluated = make_rows(7, seed=1)
    if label_smoothing and build in DEPTHS:
        # Without them the stock Trainer, which takes the labels away, cannot run an encoder-decoder.
        shifted = student.prepare_decoder_input_ids_from_labels(batch_of(evaluated)["labels"])
        evaluated = [{**row, "decoder_input_ids": ids} for row, ids in zip(evaluated, shifted, strict=True)]
    other = copy.deepcopy(student)
    trainer = make_trainer(
        tmp_path,
        student,
        teacher,
        make_rows(4),
        eval_dataset=evaluated,
        compute_metrics=accuracy,
        label_smoothing_factor=label_smoothing,
    )
    stock = Trainer(model=other, args=trainer.args, eval_dataset=evaluated, compute_metrics=accuracy)
    # The first encoder-decoder output is the logits; the caches and encoder states beside them are not compared.
    ignored = ["past_key_values", "cache", "encoder_last_hidden_state"]
    ours, theirs = (without_times(t.evaluate(ignore_keys=ignored)) for t in (trainer, stock))
    assert ours == theirs
    assert ours["eval_loss"] > 0


def test_multi_label_evaluation_gives_the_loss_of_the_stock_trainer(tmp_path):
    student, teacher = pair(tiny_vit, problem_type="multi_label_classification")
    rows = multi_label_rows(7, seed=1)
    trainer = make_trainer(tmp_path, student, teacher, rows, eval_dataset=rows)
    stock = Trainer(model=tiny_like(student), args=trainer.args, eval_dataset=rows)
    assert without_times(trainer.evaluate()) == without_times(stock.evaluate())


def tiny_like(student):
    """A plain copy of a student that already carries connectors."""
    plain = type(student)(student.config)
    plain.load_state_dict(student.state_dict(), strict=False)
    return plain


def test_prediction_returns_the_logits_of_the_student_alone(tmp_path):
    student, teacher = pair(tiny_vit)
    rows = image_rows(6)
    trainer = make_trainer(tmp_path, student, teacher, rows)
    predicted = trainer.predict(rows)
    batches = [batch_of(rows[:4])["pixel_values"], batch_of(rows[4:])["pixel_values"]]
    with torch.no_grad():
        expected = torch.cat([tiny_like(student).eval()(pixel_values=batch).logits for batch in batches])
    assert np.array_equal(predicted.predictions, expected.numpy())
    unlabelled = [{"pixel_values": row["pixel_values"]} for row in rows]
    assert np.array_equal(trainer.predict(unlabelled).predictions, expected.numpy())


def test_a_batch_without_a_label_that_counts_is_left_out_of_the_loss_as_by_the_stock_trainer(tmp_path):
    student, teacher = pair(tiny_llama)
    rows = [{**row, "labels": torch.full((6,), -100)} for row in token_rows(4, seed=1)] + token_rows(4, seed=2)
    other = copy.deepcopy(student)
    trainer = make_trainer(tmp_path, student, teacher, eval_dataset=rows, eval_stepping_stones=True)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == Trainer(model=other, args=trainer.args, eval_dataset=rows).evaluate()["eval_loss"]
    second = trainer.evaluate(rows[4:], metric_key_prefix="second")
    for name in ("loss", "teacher_loss", "stone_1_loss", "stone_2_loss"):
        assert metrics[f"eval_{name}"] == second[f"second_{name}"]


# ---- Stones ----


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("stones", ["all", "none", [2]])
def test_teacher_and_stones_get_metrics_that_equal_those_by_hand(tmp_path, stones, lora):
    student, teacher = pair(tiny_bert)
    rows = text_rows(7, seed=1)
    trainer = make_trainer(
        tmp_path,
        student,
        teacher,
        text_rows(4),
        eval_dataset=rows,
        compute_metrics=accuracy,
        eval_stepping_stones=True,
        stepping_stones=stones,
        max_steps=2,
        learning_rate=1e-2,
        peft_config=LoraConfig(r=2, target_modules=["query"]) if lora else None,
    )
    trainer.train()
    metrics = without_times(trainer.evaluate())

    logits = {"teacher": [], "stone_1": [], "stone_2": []}
    parts = [batch_of(rows[:4]), batch_of(rows[4:])]
    with torch.no_grad():
        for batch in parts:
            labels = batch.pop("labels")
            logits["teacher"].append(teacher(**batch).logits)
            for i, stone in trainer.stepping_stone_logits(batch).items():
                logits[f"stone_{i}"].append(stone)
            batch["labels"] = labels
    if stones == [2]:  # the connector of the other one does not train
        del logits["stone_1"]
        assert not any("stone_1" in name for name in metrics)
    for name, outputs in logits.items():
        # The stock loop weighs the loss of a batch by its rows.
        losses = [F.cross_entropy(y, batch["labels"]) * len(y) for y, batch in zip(outputs, parts, strict=True)]
        assert metrics[f"eval_{name}_loss"] == pytest.approx(sum(losses).item() / 7, rel=1e-5)
        together, labels = torch.cat(outputs), torch.cat([batch["labels"] for batch in parts])
        assert metrics[f"eval_{name}_accuracy"] == (together.argmax(-1) == labels).double().mean().item()
        assert metrics[f"eval_{name}_largest"] == together.max().item()
    assert metrics["eval_teacher_largest"] != metrics["eval_stone_2_largest"]
    entry = next(entry for entry in trainer.state.log_history if "eval_stone_2_loss" in entry)
    assert entry["eval_stone_2_loss"] == metrics["eval_stone_2_loss"]


def test_only_the_student_is_evaluated_by_default(tmp_path):
    student, teacher = pair(tiny_vit)
    metrics = make_trainer(tmp_path, student, teacher, eval_dataset=image_rows(4)).evaluate()
    assert not [name for name in metrics if "stone" in name or "teacher" in name]


def test_stones_of_causal_models_have_the_loss_of_the_teachers_own_head(tmp_path):
    student, teacher = pair(tiny_llama)
    rows = token_rows(4, seed=1)
    trainer = make_trainer(tmp_path, student, teacher, eval_dataset=rows, eval_stepping_stones=True)
    metrics = trainer.evaluate()
    batch = batch_of(rows)
    with torch.no_grad():
        logits = trainer.stepping_stone_logits(batch)[1]
        expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        clean = teacher(**batch).loss
    assert metrics["eval_stone_1_loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert metrics["eval_teacher_loss"] == pytest.approx(clean.item(), rel=1e-5)


@pytest.mark.parametrize("build", [tiny_t5, tiny_bart], ids=["t5", "bart"])
def test_stones_of_encoder_decoders_are_evaluated(tmp_path, build):
    student, teacher = pair(build)
    rows = token_rows(4, seed=1)
    metrics = make_trainer(tmp_path, student, teacher, eval_dataset=rows, eval_stepping_stones=True).evaluate()
    with torch.no_grad():
        clean = teacher(**batch_of(rows)).loss.item()
    assert metrics["eval_teacher_loss"] == pytest.approx(clean, rel=1e-5)
    assert metrics["eval_stone_1_loss"] > 0


def test_each_of_several_data_sets_gets_its_own_metrics(tmp_path):
    student, teacher = pair(tiny_vit)
    sets = {"near": image_rows(4, seed=1), "far": image_rows(6, seed=2)}
    trainer = make_trainer(tmp_path, student, teacher, eval_dataset=sets, eval_stepping_stones=True)
    metrics = without_times(trainer.evaluate())
    assert {name for name in metrics if name.endswith("_loss")} == {
        f"eval_{part}_{who}loss" for part in sets for who in ("", "teacher_", "stone_1_", "stone_2_")
    }
    for part, rows in sets.items():
        alone = without_times(trainer.evaluate(rows, metric_key_prefix="alone"))
        for name, value in alone.items():
            assert metrics[name.replace("alone", f"eval_{part}", 1)] == value


def test_evaluation_in_the_midst_of_training_changes_nothing(tmp_path):
    student, teacher = pair(tiny_vit)
    copies = copy.deepcopy(student)
    losses = []
    for model, settings in ((student, {}), (copies, {"eval_strategy": "steps", "eval_steps": 1})):
        trainer = make_trainer(
            tmp_path,
            model,
            teacher,
            image_rows(8),
            eval_dataset=image_rows(4, seed=1),
            eval_stepping_stones=True,
            max_steps=4,
            **settings,
        )
        trainer.train()
        losses.append([(entry["loss"], entry["stone_1/task"]) for entry in step_logs(trainer)])
    assert len([entry for entry in trainer.state.log_history if "eval_stone_1_loss" in entry]) == 4
    assert losses[0] == losses[1]


def test_the_stones_of_several_data_sets_get_metrics_of_their_own(tmp_path):
    sets = {"near": image_rows(4, seed=1), "far": image_rows(6, seed=2)}
    trainer = make_trainer(tmp_path, tiny_vit(), tiny_vit(), eval_dataset=sets)
    metrics = trainer.evaluate_stepping_stones()
    for name, rows in sets.items():
        alone = trainer.evaluate_stepping_stones(rows)
        for stone in ("teacher", "stone_1", "stone_2"):
            assert metrics[f"eval_{name}_{stone}_loss"] == alone[f"eval_{stone}_loss"]


@pytest.mark.parametrize("objective", ["alone", "kd", "block_kd", "hint", "fcfd", "theseus", "simkd"])
def test_rows_without_labels_are_predicted_as_those_with_labels(tmp_path, objective):
    rows = text_rows(8)
    trainer = make_trainer(
        tmp_path, tiny_bert(num_hidden_layers=2), tiny_bert(), rows, objective=objective, max_steps=1
    )
    trainer.train()
    bare = [{name: value for name, value in row.items() if name != "labels"} for row in rows]
    with_labels, without = (trainer.predict(data).predictions for data in (rows, bare))
    assert np.array_equal(with_labels, without)


def test_a_model_that_lacks_an_input_of_the_other_predicts_rows_without_labels(tmp_path):
    class Strict(type(tiny_bert())):
        def forward(self, input_ids=None, attention_mask=None, labels=None):
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels)

    student = tiny_bert(num_hidden_layers=2)
    student.__class__ = Strict
    rows = [{**row, "token_type_ids": torch.zeros_like(row["input_ids"])} for row in text_rows(8)]
    trainer = make_trainer(tmp_path, student, tiny_bert(), rows, max_steps=1)
    bare = [{name: value for name, value in row.items() if name != "labels"} for row in rows]
    assert np.array_equal(trainer.predict(rows).predictions, trainer.predict(bare).predictions)


def test_evaluating_stones_draws_nothing_from_the_random_states_of_the_training(tmp_path):
    def weights(**settings):
        torch.manual_seed(0)
        student = tiny_bert(num_hidden_layers=2, hidden_dropout_prob=0.3)
        trainer = make_trainer(
            tmp_path, student, tiny_bert(), text_rows(), eval_dataset=text_rows(), max_steps=4, **settings
        )
        trainer.train()
        return state_of(student)

    often = {"eval_strategy": "steps", "eval_steps": 1}
    assert_same_state(weights(**often, eval_stepping_stones=True), weights(**often))


def test_connectors_keep_their_dtype_in_an_evaluation_in_bfloat16(tmp_path):
    trainer = make_trainer(
        tmp_path,
        tiny_bert(num_hidden_layers=2),
        tiny_bert(),
        text_rows(),
        eval_dataset=text_rows(),
        bf16_full_eval=True,
        eval_stepping_stones=True,
        max_steps=1,
    )
    trainer.train()
    trainer.evaluate()
    assert {parameter.dtype for parameter in trainer.connectors.parameters()} == {torch.float32}
