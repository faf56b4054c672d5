"""The benchmark of spoken digits, without a speaker: texts are judged by edits, and students of every start train."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"


@pytest.fixture
def sound(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import sound

    return sound


@pytest.mark.parametrize(
    ("text", "edits"), [([1, 2, 3, 11], 0), ([1, 3, 11, 12], 1), ([4, 1, 2, 3], 1), ([3, 2, 1], 2), ([11, 12], 3)]
)
def test_digit_errors_are_edits_for_each_digit_that_was_said(sound, text, edits):
    texts, labels = np.array([text, [5, 11] + [12] * (len(text) - 2)]), np.array([[1, 2, 3, 11], [5, 11, -100, -100]])
    prediction = SimpleNamespace(predictions=texts, label_ids=labels)
    assert sound.KINDS["text"].score(prediction)["digit_error_rate"] == pytest.approx(100 * edits / 4)


@pytest.mark.slow
def test_a_whisper_is_cut_and_its_students_are_judged_by_what_they_write(tmp_path, monkeypatch, sound):
    def noise(count, voices, length, seed):
        draw, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
        frames = [int(draw.integers(40, sound.TEXT_FRAMES + 9)) for _ in range(count)]
        digits = [draw.integers(10, size=length(draw)).tolist() for _ in frames]
        shapes = [(many, sound.MELS) for many in frames]
        return [
            {"features": torch.randn(shape, generator=generator), "digits": own}
            for shape, own in zip(shapes, digits, strict=True)
        ]

    flags = ["--task", "text", "--train_sounds", "64", "--test_sounds", "6", "--teacher_steps", "2"]
    flags += ["--student_steps", "1", "--starts", "fresh", "cut", "--seeds", "0"]
    monkeypatch.setattr(sound, "sounds", noise)
    monkeypatch.setattr(sys, "argv", ["sound.py", *flags])
    monkeypatch.chdir(tmp_path)
    sound.main()
    runs = list(map(json.loads, Path("outputs/sound/text/runs.jsonl").read_text().splitlines()))
    methods = [*sound.COMPARED, "the default, in the encoder"]
    named = [("teacher", "fresh"), *((name, "fresh") for name in methods)]
    named += [("cut, before training", "cut"), *((name, "cut") for name in methods)]
    assert [(run["method"], run["start"]) for run in runs] == named
    assert all(run["eval_digit_error_rate"] >= 0 for run in runs)
