"""The soak of `examples/benchmarks/kill_and_resume.py`, shortened: processes killed at random moments lose nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_runs_that_are_killed_and_resumed_end_with_the_bits_of_unbroken_ones(tmp_path):
    script, output = ROOT / "examples" / "benchmarks" / "kill_and_resume.py", tmp_path / "results.json"
    command = [sys.executable, str(script), "--rounds", "4", "--steps", "40", "--output", str(output)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(output.read_text())
    assert sum(result["kills"] for result in results) == 4
    assert all(result["different"] == [] for result in results)
