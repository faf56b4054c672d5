"""What a student is trained on is what it is evaluated on: a model's own loss, a person's, and smoothed labels."""

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import BertForPreTraining, BertForSequenceClassification, LlamaForCausalLM, Trainer

from ..helpers import tiny_models as tiny
from ..helpers.tiny_models import tiny_llama, tiny_mixtral, tiny_vit
from ..helpers.training import (
    PLAIN_SGD,
    Gradients,
    batch_of,
    image_rows,
    make_trainer,
    state_of,
    step_logs,
    text_rows,
    token_rows,
)


def tiny_bert(**config):
    """Without dropout, so that training and evaluation give the same logits."""
    return tiny.tiny_bert(**{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, **config})


FROZEN = {**PLAIN_SGD, "learning_rate": 0.0, "train_sampling_strategy": "sequential"}


class Weighted(BertForSequenceClassification):
    """Classes of different weight."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        outputs = super().forward(input_ids, attention_mask, **kwargs)
        if labels is not None:
            weight = torch.arange(1.0, outputs.logits.shape[-1] + 1)
            outputs["loss"] = F.cross_entropy(outputs.logits, labels, weight=weight)
        return outputs


class Squared(LlamaForCausalLM):
    """A penalty on large logits besides the cross-entropy."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        outputs = super().forward(input_ids, attention_mask, labels=labels, **kwargs)
        if labels is not None:
            outputs["loss"] = outputs["loss"] + outputs.logits.square().mean()
        return outputs


def of_class(model, own):
    model.__class__ = own
    return model


CASES = {
    "classes": (lambda **config: of_class(tiny_bert(**config), Weighted), tiny_bert, text_rows),
    "tokens": (lambda **config: of_class(tiny_llama(**config), Squared), tiny_llama, token_rows),
}


@pytest.mark.parametrize("objective", ["alone", "kd", "block_kd"])
@pytest.mark.parametrize(("own", "plain", "make_rows"), CASES.values(), ids=CASES)
def test_a_loss_of_its_own_is_what_the_student_trains_on(tmp_path, own, plain, make_rows, objective):
    student, rows = own(num_hidden_layers=2), make_rows(4)
    settings = {"objective": objective, "max_steps": 1, "stone_weight": 0.0 if objective == "block_kd" else None}
    # Chunks are asked for: this loss cannot be had in chunks.
    trainer = make_trainer(tmp_path, student, plain(), rows, eval_dataset=rows, loss_chunk_size=2, **settings, **FROZEN)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(step_logs(trainer)[0]["loss_task"], rel=1e-5)
    loss = student.eval()(**batch_of(rows)).loss
    assert step_logs(trainer)[0]["loss_task"] == pytest.approx(loss.item(), rel=1e-5)


def test_a_student_alone_with_a_loss_of_its_own_is_trained_as_by_the_stock_trainer(tmp_path):
    student = of_class(tiny_bert(num_hidden_layers=2), Weighted)
    other = copy.deepcopy(student)
    settings = {"max_steps": 3, **PLAIN_SGD}
    trainer = make_trainer(tmp_path, student, tiny_bert(), text_rows(), objective="alone", **settings)
    trainer.train()
    Trainer(model=other, args=trainer.args, train_dataset=text_rows()).train()
    moved, expected = state_of(student), state_of(other)
    assert max((moved[name] - expected[name]).abs().max() for name in expected) < 1e-6


def test_stones_that_end_in_a_loss_of_its_own_train_on_that(tmp_path):
    teacher, rows = of_class(tiny_bert(), Weighted), text_rows(4)
    trainer = make_trainer(
        tmp_path, tiny_bert(num_hidden_layers=2), teacher, rows, eval_dataset=rows, max_steps=1, **FROZEN
    )
    trainer.train()
    evaluated = trainer.evaluate_stepping_stones()
    for stone in (1, 2):
        logged = step_logs(trainer)[0][f"stone_{stone}/task"]
        assert evaluated[f"eval_stone_{stone}_loss"] == pytest.approx(logged, rel=1e-5)


@pytest.mark.parametrize(
    ("model", "rows"),
    [(tiny_vit, image_rows), (tiny_bert, text_rows), (tiny_llama, token_rows), (tiny_mixtral, token_rows)],
)
def test_losses_that_labels_and_logits_make_are_rebuilt(tmp_path, model, rows):
    trainer = make_trainer(tmp_path, model(num_hidden_layers=2), model(), rows(4), max_steps=1)
    trainer.train()
    assert trainer.task_losses.are_rebuilt


def test_a_model_of_two_losses_trains_on_both(tmp_path):
    rows = [{**row, "next_sentence_label": torch.tensor(i % 2)} for i, row in enumerate(token_rows(4))]
    student, teacher = (BertForPreTraining(tiny_bert(num_hidden_layers=n).config) for n in (2, 4))
    trainer = make_trainer(tmp_path, student, teacher, rows, objective="alone", max_steps=1, **FROZEN)
    trainer.train()
    assert step_logs(trainer)[0]["loss_task"] == pytest.approx(student.eval()(**batch_of(rows)).loss.item(), rel=1e-5)


@pytest.mark.parametrize("split", [(4, 1), (2, 2), (1, 4)])
def test_a_window_of_answers_that_are_cut_off_has_the_loss_of_the_model_itself(tmp_path, split):
    """One start and three ends lie beyond the text; the micro-batches have different numbers of both."""
    student, teacher = (
        tiny_bert(head="QuestionAnswering", num_hidden_layers=depth, initializer_range=0.5) for depth in (2, 4)
    )
    spans = [(1, 60), (60, 60), (0, 3), (2, 60)]
    rows = [
        {"input_ids": row["input_ids"], "start_positions": torch.tensor(start), "end_positions": torch.tensor(end)}
        for row, (start, end) in zip(text_rows(4), spans, strict=True)
    ]
    size, accumulation = split
    settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, **FROZEN}
    trainer = make_trainer(tmp_path, student, teacher, rows, objective="alone", max_steps=1, **settings)
    trainer.train()
    expected = student.eval()(**batch_of(rows)).loss.item()
    assert step_logs(trainer)[0]["loss_task"] == pytest.approx(expected, rel=1e-5)
    assert trainer.task_losses.are_rebuilt


def twice_the_error(outputs, labels, num_items_in_batch=None):
    total = F.cross_entropy(outputs.logits, labels, reduction="sum") * 2
    return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)


def test_a_loss_function_of_the_person_is_that_of_student_and_stones_in_training_and_evaluation(tmp_path):
    rows = text_rows(8)
    first = make_trainer(tmp_path, tiny_bert(num_hidden_layers=2), tiny_bert(), rows, max_steps=1, **FROZEN)
    trainer = type(first)(
        model=first.model,
        teacher_model=first.teacher,
        args=first.args,
        train_dataset=rows,
        eval_dataset=rows[:4],
        compute_loss_func=twice_the_error,
    )
    trainer.train()
    evaluated = trainer.evaluate() | trainer.evaluate_stepping_stones()
    logged = step_logs(trainer)[0]
    assert evaluated["eval_loss"] == pytest.approx(
        2
        * F.cross_entropy(
            trainer.model.eval()(**{**batch_of(rows[:4]), "labels": None}).logits, batch_of(rows[:4])["labels"]
        ).item(),
        rel=1e-5,
    )
    assert evaluated["eval_stone_1_loss"] == pytest.approx(logged["stone_1/task"], rel=1e-5)


def test_smoothed_labels_count_in_every_evaluation(tmp_path):
    student = tiny_bert()
    student.classifier.weight.data.mul_(30)
    trainer = make_trainer(
        tmp_path,
        student,
        copy.deepcopy(student),
        text_rows(),
        eval_dataset=text_rows(),
        label_smoothing_factor=0.2,
        eval_stepping_stones=True,
    )
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == metrics["eval_teacher_loss"] == metrics["eval_stone_1_loss"]
    plain = make_trainer(tmp_path, student, tiny_bert(), eval_dataset=text_rows()).evaluate()
    assert abs(metrics["eval_loss"] - plain["eval_loss"]) > 1e-3


@pytest.mark.parametrize("kind", ["multi_label_classification", "regression"])
def test_smoothing_is_refused_where_there_is_no_label_to_smooth(tmp_path, kind):
    models = [tiny_bert(num_hidden_layers=n, problem_type=kind) for n in (2, 4)]
    with pytest.raises(ValueError, match=f"`label_smoothing_factor` is 0.1, but in a problem of type '{kind}'"):
        make_trainer(tmp_path, *models, text_rows(), label_smoothing_factor=0.1)


def test_smoothing_of_labels_that_turn_out_to_be_several_is_refused_before_the_first_step(tmp_path):
    rows = [{**row, "labels": torch.ones(5)} for row in text_rows(4)]
    trainer = make_trainer(
        tmp_path, tiny_bert(num_hidden_layers=2), tiny_bert(), rows, label_smoothing_factor=0.1, max_steps=1
    )
    with pytest.raises(ValueError, match="in a problem of type 'multi_label_classification'"):
        trainer.train()
    assert trainer.state.global_step == 0


def mean_of_window(outputs, labels, num_items_in_batch=None):
    total = F.cross_entropy(outputs["logits"], labels, reduction="sum")
    return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)


@pytest.mark.parametrize(
    "settings", [{"stepping_stones": "all"}, {"stepping_stones": "share"}, {"objective": "theseus"}]
)
def test_a_loss_that_is_given_has_the_gradients_of_the_same_loss_rebuilt(tmp_path, settings):
    student, teacher, rows = tiny_bert(num_hidden_layers=2), tiny_bert(), text_rows(16)
    settings = {"gradient_accumulation_steps": 2, "max_steps": 1, **FROZEN, **settings}
    found = []
    for function in (None, mean_of_window):
        watch = Gradients()
        first = make_trainer(tmp_path, copy.deepcopy(student), teacher, rows, **settings)
        trainer = type(first)(
            model=first.model,
            teacher_model=teacher,
            args=first.args,
            train_dataset=rows,
            callbacks=[watch],
            compute_loss_func=function,
        )
        trainer.train()
        found.append(watch.steps[0])
    rebuilt, given = found
    assert rebuilt.keys() == given.keys()
    assert max((rebuilt[name] - given[name]).abs().max() for name in rebuilt) < 1e-6


def test_a_loss_of_its_own_is_found_whatever_classes_the_first_batch_has(tmp_path):
    student = of_class(tiny_bert(num_hidden_layers=2), Weighted)
    student.classifier.weight.data.mul_(30)
    rows = [{**row, "labels": torch.tensor(0)} for row in text_rows(4)]
    trainer = make_trainer(tmp_path, student, tiny_bert(), rows, max_steps=1, stepping_stones="none", **FROZEN)
    trainer.train()
    assert trainer.task_losses.own == {"student"}


def test_experts_with_a_loss_of_their_own_add_that_of_their_router_once(tmp_path):
    class Larger(type(tiny_mixtral())):
        def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
            outputs = super().forward(input_ids, attention_mask, labels=labels, **kwargs)
            if labels is not None:
                outputs["loss"] = outputs["loss"] * 1.1
            return outputs

    experts = {"output_router_logits": True, "router_aux_loss_coef": 1.0}
    student, rows = of_class(tiny_mixtral(num_hidden_layers=2, **experts), Larger), token_rows(4)
    trainer = make_trainer(
        tmp_path, student, tiny_mixtral(), rows, eval_dataset=rows, objective="alone", max_steps=1, **FROZEN
    )
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(step_logs(trainer)[0]["loss"], rel=1e-5)


def test_smoothed_labels_of_a_language_model_under_another_name_are_shifted_in_evaluation(tmp_path):
    class Renamed(LlamaForCausalLM):
        pass

    student, rows = of_class(tiny_llama(num_hidden_layers=2), Renamed), token_rows(4)
    student.lm_head.weight.data.mul_(20)
    settings = {"objective": "alone", "label_smoothing_factor": 0.1, "max_steps": 1, **FROZEN}
    trainer = make_trainer(tmp_path, student, tiny_llama(), rows, eval_dataset=rows, **settings)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(step_logs(trainer)[0]["loss"], rel=1e-5)


def test_smoothing_is_refused_where_evaluation_would_leave_it_out(tmp_path):
    models = [tiny.tiny_bert("QuestionAnswering", num_hidden_layers=n) for n in (2, 4)]
    with pytest.raises(ValueError, match=r"start_positions and end_positions of .* would not be smoothed"):
        make_trainer(tmp_path, *models, label_smoothing_factor=0.1)
