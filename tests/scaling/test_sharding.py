"""FSDP2: student, connectors and teacher sharded over two processes train as one process does."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from hf_blockkd import BlockwiseDistillConfig
from hf_blockkd.connectors.attached import CONNECTORS_NAME, MODULE_NAME
from hf_blockkd.scaling.sharding import check_sharded

from ..helpers.sharded_training import CASES, train
from ..helpers.training import assert_same_state, max_difference, state_of

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def ranks(folder):
    command = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "tests.helpers.sharded_training",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [sys.executable, *command, str(folder), *CASES],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return [torch.load(folder / f"rank-{rank}.pt") for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_sharded_processes_end_where_one_ends(case, ranks, tmp_path):
    first, second = (rank[case] for rank in ranks)
    alone = train(case, tmp_path, world_size=1)
    assert_same_state(first["weights"], second["weights"])
    exact = "bf16" not in case
    # Under mixed precision, FSDP keeps the weights of a step in bfloat16 where autocast casts them at every use.
    assert max_difference(first["weights"], alone["weights"]) < (2e-6 if exact else 2e-2)
    for ours, theirs in zip(first["logs"], alone["logs"], strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5 if exact else 5e-2, abs=1e-5), name
    for i, stone in alone["stones"].items():
        assert torch.allclose(first["stones"][i].float(), stone.float(), atol=1e-5 if exact else 1e-1)
    if "llama" not in case:  # there, a loss is a mean over labels, whose number differs between ranks
        for name, value in alone["metrics"].items():
            if name.endswith("_loss"):
                assert first["metrics"][name] == pytest.approx(value, rel=1e-5), name


@pytest.mark.slow
def test_a_sharded_student_is_saved_whole_beside_its_connectors(ranks, folder):
    weights = ranks[0]["vit-all"]["weights"]
    saved = folder / "vit-all" / "checkpoint-4"
    student, info = AutoModelForImageClassification.from_pretrained(saved, output_loading_info=True)
    assert {key: value for key, value in info.items() if value} == {}
    assert_same_state(state_of(student), {n: t for n, t in weights.items() if not n.startswith(MODULE_NAME)})
    connectors = {f"{MODULE_NAME}.{name}": tensor for name, tensor in load_file(saved / CONNECTORS_NAME).items()}
    assert_same_state(connectors, {n: t for n, t in weights.items() if n.startswith(MODULE_NAME)})


# ---- What sharding does not go with ----

PLUGIN = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"stepping_stones": "share"}, "`stepping_stones` is 'share', which FSDP does not go with"),
        ({"stone_fraction": 0.5}, r"`stone_fraction` is 0\.5"),
        ({"teacher_cache": "cache"}, "`teacher_cache` is 'cache'"),
        ({"loss_chunk_size": 8}, "`loss_chunk_size` is 8"),
    ],
)
def test_what_would_run_the_teacher_unevenly_is_refused(tmp_path, settings, match):
    with pytest.raises(ValueError, match=match):
        check_sharded(BlockwiseDistillConfig(str(tmp_path), **settings), PLUGIN, shares_weights=False)


def test_what_a_sharded_teacher_cannot_be_is_refused(tmp_path):
    args = BlockwiseDistillConfig(str(tmp_path), loss_chunk_size=0)
    assert check_sharded(args, PLUGIN, shares_weights=False) is None
    with pytest.raises(ValueError, match="`teacher_model` is None, but a sharded student does not share"):
        check_sharded(args, PLUGIN, shares_weights=True)
    with pytest.raises(ValueError, match="`fsdp_version` is 1, but teachers are sharded by version 2"):
        check_sharded(args, FullyShardedDataParallelPlugin(fsdp_version=1), shares_weights=False)
    with pytest.raises(ValueError, match="`cpu_ram_efficient_loading` is True, with which only the first process"):
        check_sharded(args, replace(PLUGIN, cpu_ram_efficient_loading=True), shares_weights=False)
