"""Rows without labels get -100 in the form of the others, and data sets without any are told."""

import math

import datasets
import numpy as np
import pytest
import torch
from transformers import default_data_collator

from hf_blockkd.data.unlabelled import LabelFilling, is_unlabelled
from hf_blockkd.pairing.tasks import Task

from ..helpers.tiny_models import tiny_bert, tiny_llama, tiny_t5, tiny_vit


def filling(model, trains=True, label_dims=None):
    task = Task.of(model)
    if label_dims is not None:
        object.__setattr__(task, "label_dims", label_dims)
    return LabelFilling(default_data_collator, task, trains)


@pytest.mark.parametrize("gap", [{"label": None}, {}, {"label": math.nan}, {"label": torch.tensor(math.nan)}])
def test_a_row_without_a_label_gets_minus_100_wherever_it_stands(gap):
    rows = [{"x": 0.1, "label": 3}, {"x": 0.2, **gap}]
    assert filling(tiny_vit())(rows)["labels"].tolist() == [3, -100]
    assert filling(tiny_vit())(rows[::-1])["labels"].tolist() == [-100, 3]


def test_labels_that_are_there_stay_as_they_are():
    rows = [{"x": 0.1, "label": 3}, {"x": 0.2, "label": 0}]
    found, expected = filling(tiny_vit())(rows), default_data_collator(rows)
    assert {name: value.tolist() for name, value in found.items()} == {
        name: value.tolist() for name, value in expected.items()
    }


def test_several_labels_are_filled_one_by_one():
    model = tiny_vit(problem_type="multi_label_classification")
    rows = [{"x": 0.1, "labels": [0.0, 1.0]}, {"x": 0.2, "labels": None}, {"x": 0.3, "labels": np.array([1.0, 1.0])}]
    assert filling(model)(rows)["labels"].tolist() == [[0.0, 1.0], [-100.0, -100.0], [1.0, 1.0]]


@pytest.mark.parametrize("none", [None, math.nan, torch.tensor(math.nan), np.float32(math.nan)])
def test_a_value_that_is_no_number_is_none(none):
    rows = [{"x": 0.1, "label": 0.5}, {"x": 0.2, "label": none}]
    assert filling(tiny_bert(num_labels=1))(rows)["labels"].tolist() == [0.5, -100.0]


@pytest.mark.parametrize("problem_type", ["multi_label_classification", "regression"])
@pytest.mark.parametrize(
    "label",
    [
        [1.0, None],
        [1.0, math.nan],
        (1.0, None),
        np.array([1.0, np.nan], dtype=np.float32),
        torch.tensor([1.0, math.nan]),
    ],
    ids=["list", "list of numbers", "tuple", "numpy", "torch"],
)
def test_each_of_several_values_may_be_none(problem_type, label):
    model = tiny_bert(num_labels=2, problem_type=problem_type)
    whole = {"list": [0.0, 1.0], "ndarray": np.array([0.0, 1.0], dtype=np.float32), "Tensor": torch.tensor([0.0, 1.0])}
    rows = [{"x": 0.1, "label_ids": label}, {"x": 0.2, "label_ids": whole.get(type(label).__name__, [0.0, 1.0])}]
    labels = filling(model)(rows)["labels"]
    assert labels.tolist() == [[1.0, -100.0], [0.0, 1.0]]
    assert labels.dtype == torch.float32


def test_the_labels_of_a_text_are_as_many_as_its_tokens():
    rows = [{"input_ids": [1, 2, 3], "labels": None}, {"input_ids": [4, 5, 6], "labels": [4, 5, 6]}]
    assert filling(tiny_llama(), label_dims=2)(rows)["labels"].tolist() == [[-100] * 3, [4, 5, 6]]


def test_answers_are_filled_at_both_ends():
    rows = [{"x": 0.1, "start_positions": 2, "end_positions": 3}, {"x": 0.2, "start_positions": None}]
    batch = filling(tiny_bert("QuestionAnswering"))(rows)
    assert batch["start_positions"].tolist() == [2, -100]
    assert batch["end_positions"].tolist() == [3, -100]


@pytest.mark.parametrize(
    ("model", "label_dims", "expected"),
    [
        (tiny_vit, 1, [-100, -100]),
        (lambda: tiny_vit(problem_type="multi_label_classification", num_labels=2), 1, [[-100.0] * 2] * 2),
        (lambda: tiny_bert(num_labels=1), 1, [-100.0, -100.0]),
        (tiny_llama, 2, [[-100] * 3] * 2),
    ],
)
def test_a_batch_without_labels_gets_some_where_it_trains(model, label_dims, expected):
    model, rows = model(), [{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5, 6]}]
    labels = filling(model, label_dims=label_dims)(rows)["labels"]
    assert labels.tolist() == expected
    assert labels.is_floating_point() == isinstance(expected[0], float | list) if label_dims == 1 else True
    assert "labels" not in filling(model, trains=False, label_dims=label_dims)(rows)


def test_a_decoder_that_would_read_its_labels_is_told_that_there_are_none():
    with pytest.raises(ValueError, match=r"`labels` missing from the batch .* `decoder_input_ids`"):
        filling(tiny_t5(), label_dims=2)([{"input_ids": [1, 2, 3]}] * 2)


TABLE = {"x": [0.1, 0.2], "label": [None, None]}


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (datasets.Dataset.from_dict({"x": [0.1, 0.2]}), True),
        (datasets.Dataset.from_dict(TABLE), True),
        (datasets.Dataset.from_dict({**TABLE, "label": [None, 1]}), False),
        (
            datasets.Dataset.from_dict(TABLE).with_transform(lambda batch: {**batch, "labels": [1] * len(batch["x"])}),
            False,
        ),
        ([{"x": 0.1}], True),
        ([{"x": 0.1, "label": 0}], False),
        (iter([{"x": 0.1}]), False),
        (datasets.Dataset.from_dict(TABLE).to_iterable_dataset(), False),
        ([], False),
        ([{"label": None}, {"label": math.nan}], True),
        ([{"label": [None, math.nan]}, {"label": [-100, -100]}], True),
        ([{"label": [None, math.nan]}, {"label": [0.0, None]}], False),
    ],
)
def test_data_without_any_label_is_recognised(rows, expected):
    assert is_unlabelled(rows, Task.of(tiny_vit())) is expected
