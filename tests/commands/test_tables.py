"""Which class a row of a table has, in the order of a model."""

import pytest
from datasets import ClassLabel, Dataset
from transformers import PreTrainedConfig

from hf_blockkd.commands.tables import class_indices


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        (["cat", "dog"], ["bird", "dog", "cat"], [2, 1]),  # in the teacher's order
        (["Cat", "DOG"], ["bird", "dog", "cat"], [2, 1]),  # in any case
        (["cat", "hound"], ["bird", "dog", "cat"], None),  # not class 0 and 1, bird and dog
        (["cat", "hound"], ["LABEL_0", "LABEL_1"], [0, 1]),
        (["0", "1"], ["no", "yes"], [0, 1]),
        (["one", "two"], ["0", "1"], [0, 1]),
    ],
)
def test_classes_are_brought_together_by_name_or_where_there_are_none_by_number(ours, theirs, expected):
    config = PreTrainedConfig(id2label=dict(enumerate(theirs)), label2id={name: i for i, name in enumerate(theirs)})
    table = Dataset.from_dict({"label": [0, 1, -1]}).cast_column("label", ClassLabel(names=ours))
    assert class_indices(table, config) == (None if expected is None else [*expected, -100])


def test_names_in_a_column_of_strings_are_those_of_the_teacher():
    config = PreTrainedConfig(id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1})
    assert class_indices(Dataset.from_dict({"label": ["Good", "bad", None]}), config) == [1, 0, -100]
    assert class_indices(Dataset.from_dict({"label": ["good", "fine"]}), config) is None


def test_a_column_of_any_name_holds_the_classes_if_all_its_strings_are_names_of_them():
    config = PreTrainedConfig(id2label={0: "negative", 1: "positive"}, label2id={"negative": 0, "positive": 1})
    table = {"review": ["good", "bad", "so so", "positive"], "sentiment": ["Positive", "negative", None, ""]}
    assert class_indices(Dataset.from_dict(table), config) == [1, 0, -100, -100]
    assert class_indices(Dataset.from_dict({"review": table["review"]}), config) is None
    assert class_indices(Dataset.from_dict({"review": [None, ""]}), config) is None
    numbers = PreTrainedConfig(num_labels=2)
    assert class_indices(Dataset.from_dict({"stars": ["0", "1"]}), numbers) is None
