"""Two processes at half the batch each train the student that one process trains."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .distributed_training import CASES, train
from .training import assert_same_state, max_difference

ROOT = Path(__file__).parents[1]
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2")
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0")


def launch(launcher, folder, cases):
    command = [sys.executable, "-m", *launcher, "-m", "tests.distributed_training", "2", str(folder), *cases]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return [torch.load(folder / f"rank-{rank}.pt") for rank in (0, 1)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return launch(TORCHRUN, tmp_path_factory.mktemp("ranks"), CASES)


@pytest.fixture(params=CASES)
def case(request, ranks, tmp_path):
    """What the two ranks found, and what one process finds."""
    return [rank[request.param] for rank in ranks], train(request.param, tmp_path, world_size=1)


def test_two_processes_end_where_one_ends(case, request):
    (first, second), alone = case
    assert_same_state(first["weights"], second["weights"])
    assert max_difference(first["weights"], alone["weights"]) < 2e-6
    assert any(name.startswith("blockwise_connectors.") for name in first["weights"])
    assert len(first["logs"]) == len(alone["logs"])
    for ours, theirs in zip(first["logs"], alone["logs"], strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-6), name
    for i, stone in alone["stones"].items():
        assert torch.allclose(first["stones"][i], stone, atol=1e-5)
    if "llama" not in request.node.name:  # there, a loss is a mean over labels, whose number differs between ranks
        for name, value in alone["metrics"].items():
            if name.endswith("_loss"):
                assert first["metrics"][name] == pytest.approx(value, rel=1e-5), name
    assert {"checkpoint-4/model.safetensors", "checkpoint-4/connectors.safetensors"} <= set(first["files"])


@pytest.mark.slow
def test_accelerate_launch_starts_two_processes_as_well(tmp_path):
    first, second = launch(ACCELERATE, tmp_path, ["vit-sample"])
    assert_same_state(first["vit-sample"]["weights"], second["vit-sample"]["weights"])
