"""Two processes at half the batch each train the student that one process trains."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ..helpers.distributed_training import CASES, SLOW, train
from ..helpers.training import assert_same_state, max_difference

ROOT = Path(__file__).parents[2]
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2")
FAST = [case for case in CASES if case not in SLOW]
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0")


def launch(launcher, folder, cases):
    command = [sys.executable, "-m", *launcher, "-m", "tests.helpers.distributed_training", "2", str(folder), *cases]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return [torch.load(folder / f"rank-{rank}.pt") for rank in (0, 1)]


def assert_equal_runs(ranks, alone):
    first, second = ranks
    assert_same_state(first["weights"], second["weights"])
    assert max_difference(first["weights"], alone["weights"]) < 2e-6
    for ours, others, theirs in zip(first["gradients"], second["gradients"], alone["gradients"], strict=True):
        assert_same_state(ours, others)
        # What takes no part in the forward has no gradient in one process, and zeros where others wait for it.
        unused = ours.keys() - theirs.keys()
        assert not any(ours[name].any() for name in unused)
        assert max_difference({name: ours[name] for name in theirs}, theirs) < 2e-6
    assert any(name.startswith("blockwise_connectors.") for name in first["weights"])
    assert len(first["logs"]) == len(alone["logs"])
    for ours, theirs in zip(first["logs"], alone["logs"], strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-6), name
    for i, stone in alone["stones"].items():
        assert torch.allclose(first["stones"][i], stone, atol=1e-5)
    names = [name for name in alone["metrics"] if name.endswith(("_loss", "_cka"))]
    assert {"eval_loss", "eval_teacher_loss", "eval_stone_2_loss", "eval_block_1_cka"} <= set(names)
    for name in names:
        assert first["metrics"][name] == second["metrics"][name], name
        assert first["metrics"][name] == pytest.approx(alone["metrics"][name], rel=1e-5), name
    assert {"connectors.safetensors", "rng_state_0.pth", "rng_state_1.pth"} <= set(first["files"])


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return launch(TORCHRUN, tmp_path_factory.mktemp("ranks"), [*FAST, "stop"])


@pytest.fixture(scope="module")
def slow_ranks(tmp_path_factory):
    return launch(TORCHRUN, tmp_path_factory.mktemp("ranks"), SLOW)


@pytest.mark.parametrize("case", FAST)
def test_two_processes_end_where_one_ends(ranks, tmp_path, case):
    assert_equal_runs([rank[case] for rank in ranks], train(case, tmp_path, world_size=1))


@pytest.mark.parametrize("case", ["vit-unlabelled", "llama-unlabelled", "llama-on-policy"])
def test_rows_without_labels_lie_unequally_on_both_processes(ranks, case):
    first, second = (rank[case]["counts"] for rank in ranks)
    counted = 1 if case == "llama-on-policy" else 0  # rows that are distilled, or that have labels
    assert (first[:, counted] != second[:, counted]).any()


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW)
def test_so_they_do_in_other_cases(slow_ranks, tmp_path, case):
    assert_equal_runs([rank[case] for rank in slow_ranks], train(case, tmp_path, world_size=1))


def test_all_processes_stop_after_the_same_step_where_one_gets_a_sigterm(ranks):
    assert [rank["stop"] for rank in ranks] == [3, 3]


@pytest.mark.slow
def test_accelerate_launch_starts_two_processes_as_well(tmp_path):
    first, second = launch(ACCELERATE, tmp_path, ["vit-sample"])
    assert_same_state(first["vit-sample"]["weights"], second["vit-sample"]["weights"])
