"""The benchmark of texts that the student writes itself, with a tiny model."""

import json
import math
import runpy
import sys
from pathlib import Path

import pytest

from ..helpers.tiny_models import VOCABULARY, tiny_llama, word_tokenizer

BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"


@pytest.mark.slow
def test_every_share_goes_on_from_one_cut_and_is_judged_by_the_teacher(tmp_path, monkeypatch):
    for part in (tiny_llama(num_hidden_layers=4), word_tokenizer(VOCABULARY)):
        part.save_pretrained(tmp_path / "teacher")
    lines = [" ".join(f"w{(line * word) % VOCABULARY}" for word in range(1, 20)) for line in range(60)]
    (tmp_path / "text.txt").write_text("\n".join(lines), encoding="utf-8")
    flags = ["--text", "text.txt", "--eval_lines", "50", "60", "--num_layers", "2", "--block_size", "16"]
    flags += ["--eval_blocks", "4", "--max_steps", "3", "--batch_size", "2", "--learning_rate", "1e-2"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "argv", ["on_policy.py", "teacher", *flags])
    runpy.run_path(str(BENCHMARKS / "on_policy.py"), run_name="__main__")
    teacher, cut, *students = map(json.loads, Path("outputs/on_policy/results.jsonl").read_text().splitlines())
    assert teacher["kl_from_teacher"] == 0.0
    assert (cut["student"], cut["lmbda"]) == ("2 layers", None)
    assert [student["lmbda"] for student in students] == [0.0, 0.5, 1.0]
    figures = [tuple(one[name] for name in ("perplexity", "kl_from_teacher")) for one in (cut, *students)]
    assert len(set(figures)) == 4
    assert all(math.isfinite(value) and value > 0 for figure in figures for value in figure)
