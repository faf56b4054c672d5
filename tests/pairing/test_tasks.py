from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from transformers.utils import ModelOutput

from hf_blockkd.losses.rows import IGNORED
from hf_blockkd.pairing.tasks import Task

from ..helpers import tiny_models as tiny

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
TASKS = {
    "image": (tiny.tiny_vit, ("labels",), False, None, tiny.LABELS),
    "image of one problem type": (lambda: tiny.tiny_vit(problem_type=SINGLE), ("labels",), False, SINGLE, tiny.LABELS),
    "sequence": (tiny.tiny_bert, ("labels",), False, None, tiny.LABELS),
    "multi label": (lambda: tiny.tiny_bert(problem_type=MULTI), ("labels",), False, MULTI, tiny.LABELS),
    "regression": (lambda: tiny.tiny_bert(num_labels=1), ("labels",), False, REGRESSION, 1),
    "tokens": (lambda: tiny.tiny_bert("TokenClassification"), ("labels",), False, SINGLE, tiny.LABELS),
    "masked": (lambda: tiny.tiny_bert("MaskedLM"), ("labels",), False, SINGLE, tiny.VOCABULARY),
    "causal": (tiny.tiny_llama, ("labels",), True, SINGLE, tiny.VOCABULARY),
    "causal gpt2": (tiny.tiny_gpt2, ("labels",), True, SINGLE, tiny.VOCABULARY),
    "causal gemma": (tiny.tiny_gemma3, ("labels",), True, SINGLE, tiny.VOCABULARY),
    "sequence by a causal body": (
        lambda: tiny.tiny_llama("SequenceClassification", num_labels=3),
        ("labels",),
        False,
        None,
        3,
    ),
    "seq2seq": (tiny.tiny_bart, ("labels",), False, SINGLE, tiny.VOCABULARY),
    "seq2seq t5": (tiny.tiny_t5, ("labels",), False, SINGLE, tiny.VOCABULARY),
    "choice": (lambda: tiny.tiny_bert("MultipleChoice"), ("labels",), False, SINGLE, None),
    "questions": (
        lambda: tiny.tiny_bert("QuestionAnswering"),
        ("start_positions", "end_positions"),
        False,
        SINGLE,
        None,
    ),
}


@pytest.mark.parametrize("name", TASKS)
def test_the_task_is_read_from_the_model(name):
    build, label_names, shifted, problem_type, num_classes = TASKS[name]
    model = build()
    task = Task.of(model)
    assert task.name == type(model).__name__
    assert (task.label_names, task.shifted, task.problem_type) == (label_names, shifted, problem_type)
    assert task.num_classes == num_classes
    assert task.over_vocabulary is (num_classes == tiny.VOCABULARY)


@pytest.mark.parametrize("name", [name for name in TASKS if "by a causal body" not in name])
def test_a_subclass_under_a_name_of_its_own_has_the_task_of_its_parent(name):
    model = TASKS[name][0]()
    expected = Task.of(model)
    model.__class__ = type("Mine", (type(model),), {})
    assert dataclasses.replace(Task.of(model), name=expected.name) == expected


@pytest.mark.parametrize(
    ("labels", "problem"),
    [
        (torch.tensor([0, 1]), SINGLE),
        (torch.tensor([0, 1], dtype=torch.int32), SINGLE),
        (torch.zeros(2, tiny.LABELS), MULTI),
    ],
)
def test_an_open_problem_type_follows_from_the_labels_as_in_transformers(labels, problem):
    model = tiny.tiny_bert()
    assert Task.of(model).problem({"labels": labels}) == problem
    ids = torch.full((2, 4), 5)
    if labels.dtype != torch.int32:
        copy.deepcopy(model)(input_ids=ids, labels=labels)  # transformers accepts the same labels
        model(input_ids=ids, labels=labels)
        assert model.config.problem_type == problem


def test_causal_logits_meet_the_label_of_the_next_token():
    task = Task.of(tiny.tiny_llama())
    logits = torch.arange(2 * 4 * 3.0).view(2, 4, 3)
    labels = torch.tensor([[7, 8, 9, 10], [1, IGNORED, 3, IGNORED]])
    assert task.logits(ModelOutput(logits=logits)).tolist() == [row[:3] for row in logits.tolist()]
    assert task.labels({"labels": labels}).tolist() == [[8, 9, 10], [IGNORED, 3, IGNORED]]
    assert task.count({"labels": labels}).item() == 4


@pytest.mark.parametrize("name", ["masked", "tokens", "seq2seq"])
def test_other_token_logits_meet_the_label_of_the_same_token(name):
    task = Task.of(TASKS[name][0]())
    logits, labels = torch.randn(2, 4, 3), torch.tensor([[1, 2, IGNORED, 0], [IGNORED] * 4])
    assert torch.equal(task.logits(ModelOutput(logits=logits)), logits)
    assert torch.equal(task.labels({"labels": labels}), labels)
    assert task.count({"labels": labels}).item() == 3


def test_questions_have_two_rows_each_and_answers_beyond_the_cut_are_ignored():
    task = Task.of(tiny.tiny_bert("QuestionAnswering"))
    start, end = torch.randn(2, 6), torch.randn(2, 6)
    outputs = ModelOutput(start_logits=start, end_logits=end)
    assert task.logits(outputs).tolist() == [*start.tolist(), *end.tolist()]
    inputs = {
        "input_ids": torch.zeros(2, 6, dtype=torch.long),
        "start_positions": torch.tensor([5, 6]),
        "end_positions": torch.tensor([[0], [99]]),
    }
    assert task.labels(inputs).tolist() == [5, IGNORED, 0, IGNORED]
    assert task.count(inputs).tolist() == [1, 1]
    inputs["end_positions"][1] = 3
    assert task.count(inputs).tolist() == [1, 2]
    task.check_labels(inputs)


def test_multiple_choice_has_one_row_for_each_question():
    task = Task.of(tiny.tiny_bert("MultipleChoice"))
    logits, inputs = torch.randn(3, 4), {"labels": torch.tensor([0, 3, IGNORED])}
    assert torch.equal(task.logits(ModelOutput(logits=logits)), logits)
    assert task.labels(inputs).tolist() == [0, 3, IGNORED]
    assert task.count(inputs).item() == 2
    task.check_labels(inputs)


def test_every_class_of_a_multi_label_example_counts():
    task = Task.of(tiny.tiny_bert(problem_type=MULTI))
    assert task.count({"labels": torch.zeros(3, tiny.LABELS)}).item() == 3 * tiny.LABELS


def test_a_regression_target_of_minus_100_is_none_as_everywhere():
    task = Task.of(tiny.tiny_bert(num_labels=1))
    inputs = {"labels": torch.tensor([-100.0, 1.0, 7.5])}
    assert task.count(inputs).item() == 2
    assert task.labels(inputs).tolist() == [-100.0, 1.0, 7.5]
    task.check_labels(inputs)


@pytest.mark.parametrize(
    ("name", "inputs", "message"),
    [
        ("sequence", {"input_ids": torch.zeros(1, 2)}, r"labels missing from the batch \(keys: input_ids\); BertFor"),
        ("sequence", {"labels": None}, "labels missing from the batch"),
        ("questions", {"input_ids": torch.zeros(1, 2)}, "start_positions and end_positions missing"),
        ("questions", {"start_positions": torch.zeros(1)}, "end_positions missing"),
        ("sequence", {"labels": torch.tensor([0, 5])}, "`labels` holds 5, but BertForSequence.* has 5 classes, 0 to 4"),
        ("sequence", {"labels": torch.tensor([-1])}, "`labels` holds -1"),
        ("causal", {"labels": torch.tensor([[0, 64]])}, "`labels` holds 64, but LlamaForCausalLM has 64 classes"),
        ("tokens", {"labels": torch.tensor([[IGNORED, 9]])}, "`labels` holds 9"),
        ("image", {"labels": [{"boxes": torch.zeros(4)}]}, "`labels` has the type list, but ViTForImageClassification"),
    ],
)
def test_labels_that_cannot_be_learnt_are_refused(name, inputs, message):
    with pytest.raises(ValueError, match=message):
        Task.of(TASKS[name][0]()).check_labels(inputs)


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("sequence", torch.tensor([0, 4, IGNORED])),
        ("causal", torch.tensor([[99, 63]])),  # the first token is predicted by nothing
        ("masked", torch.full((1, 3), IGNORED)),
        ("multi label", torch.full((2, tiny.LABELS), 9.0)),
    ],
)
def test_labels_that_can_be_learnt_pass(name, labels):
    assert Task.of(TASKS[name][0]()).check_labels({"labels": labels}) is None
