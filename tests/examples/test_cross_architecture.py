"""Real digits, distilled between architectures, by the example that does so."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "cross_architecture.py"
FEW = ["--train_images", "600", "--eval_images", "200", "--teacher_epochs", "4", "--epochs", "3"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_students_learn_from_teachers_of_other_architectures(tmp_path):
    pytest.importorskip("mlxtend")
    command = [sys.executable, str(EXAMPLE), *FEW, "--output_dir", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    runs = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    distilled = {run["pair"]: run for run in runs if run["model"] == "block_kd"}
    assert set(distilled) == {"resnet-vit", "vit-convnext", "swin-vit", "vit-swin"}
    for run in distilled.values():
        assert run["steps"] == 57
        assert run["last_loss"] < run["first_loss"]
        assert len(run["bridges"]) == 3
