"""The benchmark of tables of a teacher's likeliest tokens, with a tiny model."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import yaml

from ..helpers.tiny_models import VOCABULARY, tiny_llama, word_tokenizer

BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"


@pytest.mark.slow
@pytest.mark.parametrize("start", ["cut", "fresh"])
def test_a_table_of_all_tokens_trains_as_the_teacher_does(tmp_path, monkeypatch, start):
    for part in (tiny_llama(num_hidden_layers=4), word_tokenizer(VOCABULARY)):
        part.save_pretrained(tmp_path / "teacher")
    lines = [" ".join(f"w{(line * word) % VOCABULARY}" for word in range(1, 20)) for line in range(60)]
    (tmp_path / "text.txt").write_text("\n".join(lines), encoding="utf-8")
    recipe = {"example": "lm", "block_size": 16, "student_rows": 24, "student_layers": 2, "num_blocks": 2}
    recipe |= {"temperature": 1.0, "learning_rate": 1e-2, "per_device_train_batch_size": 4, "report_to": "none"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    flags = ["--train_file", "text.txt", "--teacher", "teacher", "--output_dir", "out", "--num_train_epochs", "1"]
    flags += ["--fresh", str(start == "fresh"), "--k", "2", str(VOCABULARY), "--seeds", "0"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "argv", ["captured.py", "recipe.yaml", *flags])
    runpy.run_path(str(BENCHMARKS / "captured.py"), run_name="__main__")
    lines = map(json.loads, Path("out/captured.jsonl").read_text().splitlines())
    perplexity = {line["method"]: line["test"] for line in lines}
    alone, kd, few, every = list(perplexity.values())[-4:]
    assert every == pytest.approx(kd, rel=1e-4)
    assert len({alone, kd, few}) == 3
    assert abs(few - kd) > abs(every - kd)
