"""The sweep of `examples/benchmarks/sweep.py`: every method is searched alike, and what is finished is not repeated."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "examples" / "benchmarks" / "recipes" / "digits.yaml"


def sweep(output_dir: Path, *arguments: str) -> str:
    script = ROOT / "examples" / "benchmarks" / "sweep.py"
    command = [sys.executable, str(script), str(RECIPE), "--output_dir", str(output_dir), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def results(output_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (output_dir / "results.jsonl").read_text().splitlines()]


def test_first_seed_runs_all_settings_the_second_the_two_best_and_others_the_best_of_both(tmp_path):
    arguments = ["--names", "KD", "--learning_rates", "1e-3", "2e-3", "4e-3", "--seeds", "0", "1", "2"]
    arguments += ["--validation_rows", "200", "--student_rows", "64", "--num_train_epochs", "1", "--warmup_steps", "0"]
    arguments += ["--teacher_rows", "64", "--teacher_epochs", "1"]
    sweep(tmp_path, *arguments)
    runs = [run for run in results(tmp_path) if run["method"] == "KD"]
    of_seed = {
        seed: {run["learning_rate"]: run["validation"] for run in runs if run["seed"] == seed} for seed in range(3)
    }
    assert list(of_seed[0]) == [1e-3, 2e-3, 4e-3]
    assert list(of_seed[1]) == sorted(of_seed[0], key=of_seed[0].__getitem__, reverse=True)[:2]
    assert list(of_seed[2]) == [max(of_seed[1], key=lambda rate: of_seed[0][rate] + of_seed[1][rate])]

    sweep(tmp_path, *arguments)
    assert [run for run in results(tmp_path) if run["method"] == "KD"] == runs


def test_table_is_of_the_settings_that_validation_rows_choose(tmp_path):
    def run(seed: int, rate: float, validation: float, test: float) -> str:
        return json.dumps(
            {"method": "KD", "seed": seed, "learning_rate": rate, "validation": validation, "test": test, "seconds": 1}
        )

    lines = [run(0, 1e-3, 0.60, 0.1), run(0, 2e-3, 0.61, 0.2), run(0, 4e-3, 0.50, 0.9)]
    lines += [run(1, 2e-3, 0.55, 0.3), run(1, 1e-3, 0.57, 0.5), run(1, 4e-3, 0.99, 0.9), run(2, 1e-3, 0.20, 0.6)]
    (tmp_path / "results.jsonl").write_text("\n".join(lines))
    # Of the two best with the first seed, 1e-3 is ahead by the mean of two: (10 + 50 + 60) / 3 on test rows.
    assert "| KD | 3 | 40.00 ± " in sweep(tmp_path, "--table", "true")
