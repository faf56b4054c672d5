"""Data set and teacher agree on what each class is called, or are refused, before anything trains."""

import distill_text_classification
import pytest
from arguments import ComparisonArguments
from classes import of_teacher, with_classes
from datasets import ClassLabel, Dataset, Features, Value
from task import load_teacher
from text_data import TextDataArguments
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BertTokenizerFast,
)


def rows(labels: list, names: list[str] | None = None) -> Dataset:
    label = Value("string" if isinstance(labels[0], str) else "int64") if names is None else ClassLabel(names=names)
    features = Features(text=Value("string"), label=label)
    return Dataset.from_dict({"text": ["some words"] * len(labels), "label": labels}, features=features)


def config(names: list[str] | None = None, **fields) -> BertConfig:
    shape = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    labels = (
        {} if names is None else {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
    )
    return BertConfig(vocab_size=12, **shape, **labels, **fields)


def teacher_of(names: list[str] | None = None, **fields) -> BertForSequenceClassification:
    return BertForSequenceClassification(config(names, **fields))


def test_labels_follow_the_teacher_by_name_whatever_their_order_and_case():
    data = rows([0, 1, 2, 0], ["cat", "dog", "eel"])
    teacher = teacher_of(["Dog", "eel", "cat"])
    (train,) = of_teacher(teacher, "t", data)
    assert train["label"][:] == [2, 0, 1, 2]
    assert teacher.config.id2label == {0: "Dog", 1: "eel", 2: "cat"}


def test_other_classes_of_the_same_number_are_refused_by_the_first_name_that_differs():
    data = rows([0, 1, 2], ["cat", "cow", "eel"])
    with pytest.raises(ValueError, match="'cow' is one of the data set, but not of the teacher 'some/teacher'"):
        of_teacher(teacher_of(["cat", "dog", "eel"]), "some/teacher", data)


def test_another_number_of_classes_is_refused():
    with pytest.raises(ValueError, match="has 2 classes and the data set 3"):
        of_teacher(teacher_of(["cat", "dog"]), "t", rows([0], ["cat", "dog", "eel"]))


def test_a_teacher_without_names_gets_those_of_the_data(capsys):
    teacher = teacher_of(num_labels=2)
    assert of_teacher(teacher, "t", rows([1, 0], ["bad", "good"]))[0]["label"][:] == [1, 0]
    assert teacher.config.id2label == {0: "bad", 1: "good"}
    assert teacher.config.label2id == {"bad": 0, "good": 1}
    assert "taken to be bad, good" in capsys.readouterr().out


def test_numbers_stand_for_the_teachers_classes_in_their_order(capsys):
    teacher = teacher_of(["bad", "good"])
    (train,) = of_teacher(teacher, "t", *with_classes(rows([1, 0])))
    assert train["label"][:] == [1, 0]
    assert teacher.config.id2label == {0: "bad", 1: "good"}
    assert "taken to be bad, good" in capsys.readouterr().out


def test_numbers_are_sorted_as_numbers():
    (train,) = with_classes(rows([10, 2, *range(12)]))
    assert train.features["label"].names == [str(number) for number in range(12)]
    assert train["label"][:2] == [10, 2]


def test_rows_to_evaluate_on_count_like_those_to_train_on():
    train, held_out = with_classes(rows(["a", "b", "c"]), rows(["c", "b"]))
    assert (train["label"][:], held_out["label"][:]) == ([0, 1, 2], [2, 1])
    assert with_classes(rows([0], ["a", "b"]), rows([0, 1], ["b", "a"]))[1]["label"][:] == [1, 0]
    with pytest.raises(ValueError, match="'d', which no row to train on has"):
        with_classes(rows(["a", "b"]), rows(["d"]))


@pytest.fixture
def folder(tmp_path):
    """Reviews whose classes stand in another order than the teacher's, and a tokenizer."""
    for split in ("train", "test"):
        lines = [f"some words\t{label}" for label in ("good", "bad", "good", "bad")]
        (tmp_path / f"{split}.tsv").write_text("\n".join(["text\tlabel", *lines]))
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "some", "words"]
    BertTokenizerFast(vocab={word: index for index, word in enumerate(words)}).save_pretrained(tmp_path / "teacher")
    return tmp_path


def script_and_data(folder, **fields) -> tuple[ComparisonArguments, TextDataArguments]:
    data = TextDataArguments(dataset=str(folder), eval_split="test", max_length=8)
    return ComparisonArguments(teacher=str(folder / "teacher"), **fields), data


def test_the_script_feeds_a_teacher_its_own_classes(folder):
    teacher_of(["good", "bad"]).save_pretrained(folder / "teacher")
    task = distill_text_classification.load_task(*script_and_data(folder))
    assert task.as_train(task.train_set)[:]["labels"] == [0, 1, 0, 1]  # of the data set alone: bad 0, good 1
    assert task.as_eval(task.eval_set)[:]["labels"] == [0, 1, 0, 1]
    assert task.teacher.config.id2label == {0: "good", 1: "bad"}


def test_a_teacher_whose_head_would_stay_new_is_refused_unless_it_is_trained(folder):
    BertModel(config(["good", "bad"])).save_pretrained(folder / "teacher")
    with pytest.raises(ValueError, match=r"no weights for 'classifier.bias'.* `--train_teacher true`"):
        distill_text_classification.load_task(*script_and_data(folder))
    script, _ = script_and_data(folder, train_teacher=True)
    assert load_teacher(script, AutoModelForSequenceClassification, num_labels=3).num_labels == 3
