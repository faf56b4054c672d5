"""Launches that would quietly become something else are refused."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from ..helpers.tiny_models import tiny_vit
from ..helpers.training import image_rows, make_trainer

ROOT = Path(__file__).parents[2]
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
SCRIPT = """
from tests.helpers.tiny_models import tiny_vit
from tests.helpers.training import image_rows, make_trainer
trainer = make_trainer("{folder}", tiny_vit(), tiny_vit(), image_rows(4), use_cpu={use_cpu})
print("processes:", trainer.accelerator.num_processes)
"""


def launch(folder, *flags, use_cpu=True, **environment):
    """What a script that makes a trainer writes when `accelerate launch` starts it."""
    script = folder / "script.py"
    script.write_text(SCRIPT.format(folder=folder / "run", use_cpu=use_cpu), encoding="utf-8")
    command = [sys.executable, "-m", "accelerate.commands.launch", *flags, "--main_process_port", "0", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=200
    )
    return done.stdout + done.stderr


@pytest.mark.slow
def test_several_processes_of_which_one_would_run(tmp_path):
    assert "was given several processes, but runs one of them" in launch(tmp_path, "--cpu", "--num_processes", "2")
    assert "processes: 1" in launch(tmp_path, "--cpu", "--num_processes", "1")
    flags = "--multi_gpu", "--num_processes", "2"
    assert launch(tmp_path, *flags, ACCELERATE_USE_CPU="true").count("processes: 2") == 2


@pytest.mark.slow
def test_fsdp_that_would_be_distributed_data_parallel(tmp_path):
    flags = "--use_fsdp", "--fsdp_version", "2", "--num_processes", "2"
    written = launch(tmp_path, *flags, use_cpu=False, ACCELERATE_USE_CPU="true")
    assert "asks for it, but for 2 process(es) on a cpu Accelerate would run DistributedDataParallel" in written


def test_fsdp_in_one_process(tmp_path):
    with pytest.raises(
        ValueError, match=r"`fsdp` is True, but for 1 process.* on a cpu Accelerate would run one process"
    ):
        make_trainer(tmp_path / "run", tiny_vit(), tiny_vit(), image_rows(4), fsdp=True)
    assert not (tmp_path / "run").exists()


@needs_deepspeed
def test_deepspeed_without_a_launcher(tmp_path, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(ValueError, match="`deepspeed` is set, but it runs only in processes that a launcher has"):
        make_trainer(tmp_path, tiny_vit(), tiny_vit(), image_rows(4), deepspeed={"zero_optimization": {"stage": 2}})


@needs_deepspeed
@pytest.mark.slow
def test_deepspeed_that_would_be_something_else(tmp_path):
    flags = "--use_deepspeed", "--zero_stage", "2", "--num_processes", "2"
    written = launch(tmp_path, *flags, ACCELERATE_USE_CPU="true", DS_ACCELERATOR="cpu")
    assert "on a cpu Accelerate would run DistributedDataParallel, without a word" in written
    written = launch(tmp_path, *flags, use_cpu=False, DS_ACCELERATOR="cpu")
    assert "on a cpu Accelerate would run 2 processes that know nothing of each other" in written
    assert launch(tmp_path, *flags, DS_ACCELERATOR="cpu").count("processes: 2") == 2
    flags = "--use_deepspeed", "--zero_stage", "3", "--zero3_save_16bit_model", "true", "--num_processes", "2"
    assert launch(tmp_path, *flags, DS_ACCELERATOR="cpu").count("processes: 2") == 2
