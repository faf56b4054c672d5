"""What classifiers are judged by, against counts by hand, and what they say of rows without labels."""

import csv

import numpy as np
import pytest
import torch
from arguments import ComparisonArguments
from comparison import compare
from datasets import Dataset
from distill_vit import load_task
from PIL import Image
from predictions import write_predictions
from results import Metric, class_table, table
from scores import Scores
from text_data import TextDataArguments, load_test_texts
from transformers import AutoModelForImageClassification, EvalPrediction, Trainer, TrainingArguments

from ..helpers.images import TINY, draw, short_run


def test_figures_of_classes_are_those_of_a_count():
    scores = Scores({0: "cat", 1: "dog", 2: "eel"})
    found, labels = np.array([0, 0, 1, 1, 1, 0]), np.array([0, 1, 1, 1, 0, 0])
    metrics = scores(EvalPrediction(np.eye(3)[found], labels))
    # Of three cats two are found, one in vain; of three dogs two, one in vain; no eel is there.
    assert scores.classes["cat"] == pytest.approx({"precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "rows": 3})
    assert scores.classes["eel"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "rows": 0}
    assert metrics == pytest.approx({"accuracy": 4 / 6, "f1": 2 / 3})
    one_sided = scores(EvalPrediction(np.eye(3)[[0] * 4], np.array([0, 0, 0, 1])))
    assert one_sided == pytest.approx({"accuracy": 3 / 4, "f1": (6 / 7 + 0) / 2})


def test_tables_show_them_in_the_mean_over_seeds():
    runs = [
        {"model": "kd", "seed": seed, "accuracy": 0.5, "f1": f1, "parameters": 7, "seconds": 1.0}
        | {"classes": {"cat": {"f1": f1}, "dog": {"f1": 1.0}}}
        for seed, f1 in enumerate((0.25, 0.75))
    ]
    heads, line = table(runs, Metric("accuracy", None)).splitlines()
    assert heads.split() == ["model", "seeds", "accuracy", "F1", "parameters", "training"]
    assert "50.00% ± 35.36%" in line
    assert [line.split() for line in class_table(runs).split("\n")[2:4]] == [["cat", "50.00%"], ["dog", "100.00%"]]
    without = [{name: value for name, value in run.items() if name not in ("f1", "classes")} for run in runs]
    assert "F1" not in table(without, Metric("accuracy", None))
    assert class_table(without) == ""


def test_a_table_of_predictions_says_which_row_what_and_how_surely(tmp_path):
    rows = Dataset.from_dict({"text": ["one, two", "three"]})
    path = write_predictions(tmp_path, rows, torch.tensor([[0.0, 0.0], [0.0, 3.0]]).log_softmax(-1), {0: "a", 1: "b"})
    with path.open(newline="") as file:
        assert list(csv.reader(file)) == [
            ["row", "text", "prediction", "score"],
            ["0", "one, two", "a", "0.5000"],
            ["1", "three", "b", "0.9526"],
        ]


def test_students_predict_rows_without_labels_also_when_they_are_finished(tmp_path):
    data = draw(tmp_path / "images", [(8, 8)] * 20, "L")
    (tmp_path / "test").mkdir()
    files = [tmp_path / "test" / f"{index}.png" for index in range(3)]
    for index, file in enumerate(files):
        pixels = np.random.default_rng(index).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(file)
    script = ComparisonArguments(
        train_teacher=True, teacher_config=TINY, teacher_epochs=1, student_layers=1, methods=["kd"]
    )
    args = short_run(tmp_path / "run", seed=0)
    args.do_predict = True
    with pytest.raises(ValueError, match="no rows to predict are named; classifiers take `--test_file`"):
        compare(script, data, args, load_task(script, data))
    args.do_predict = False
    compare(script, data, args, load_task(script, data))
    table = tmp_path / "run" / "kd" / "predictions.csv"
    assert not table.exists()

    data.test_file = str(tmp_path / "test")
    task = load_task(script, data)
    compare(script, data, args, task)
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == [str(file) for file in files]
    assert not (table.parent / "teacher").exists()
    student = AutoModelForImageClassification.from_pretrained(tmp_path / "run" / "kd" / "as_trained")
    assert student.config.num_channels == 1
    trainer = Trainer(student, TrainingArguments(str(tmp_path), use_cpu=True, remove_unused_columns=False))
    logits = torch.as_tensor(trainer.predict(task.as_eval(task.test_set)).predictions)
    named = [student.config.id2label[index] for index in logits.argmax(-1).tolist()]
    assert [row["prediction"] for row in rows] == named
    assert [float(row["score"]) for row in rows] == pytest.approx(logits.softmax(-1).max(-1).values.tolist(), abs=1e-4)


def test_texts_to_predict_come_from_a_file_or_a_split_and_need_no_labels(tmp_path):
    for name, header in (("train", "review,label"), ("test", "review")):
        rows = [f"{name} {index}" + f",{index % 2}" * (name == "train") for index in range(4)]
        (tmp_path / f"{name}.csv").write_text("\n".join([header, *rows]))
    of_split = TextDataArguments(dataset=str(tmp_path), test_split="test")
    of_file = TextDataArguments(dataset=str(tmp_path), test_file=str(tmp_path / "test.csv"))
    for args in (of_split, of_file):
        assert load_test_texts(args)["text"][:] == [f"test {index}" for index in range(4)]
    assert load_test_texts(TextDataArguments(dataset=str(tmp_path))) is None
    with pytest.raises(ValueError, match="`test_split` is 'tset', but the data set has"):
        load_test_texts(TextDataArguments(dataset=str(tmp_path), test_split="tset"))
    with pytest.raises(ValueError, match="`text_column` is 'body', but the rows of `test_split` have review"):
        load_test_texts(TextDataArguments(dataset=str(tmp_path), test_split="test", text_column="body"))
