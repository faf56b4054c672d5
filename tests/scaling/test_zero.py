"""DeepSpeed: student and connectors in its engine train on two processes as one process does."""

import os
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from hf_blockkd import BlockwiseDistillConfig
from hf_blockkd.connectors.attached import CONNECTORS_NAME, MODULE_NAME
from hf_blockkd.objectives import make_objective
from hf_blockkd.pairing.shared_prefix import _are_equal
from hf_blockkd.scaling.zero import check_zero

from ..helpers.tiny_models import tiny_vit
from ..helpers.training import assert_same_state, image_rows, make_trainer, max_difference, state_of
from ..helpers.zero_training import STAGES, train

ROOT = Path(__file__).parents[2]
needs_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="DeepSpeed is not installed, so NOTHING that runs it is tested"
)
CASES = [(stage, case) for stage, cases in STAGES.items() for case in cases]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("zero")


@pytest.fixture(scope="module")
def ranks(folder):
    """From a stage to what its two ranks wrote; each stage is run once."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}

    @cache
    def run(stage):
        (folder / str(stage)).mkdir()
        command = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            "2",
            "-m",
            "tests.helpers.zero_training",
        ]
        done = subprocess.run(
            [sys.executable, *command, str(folder / str(stage)), str(stage), *STAGES[stage]],
            cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=250,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return [torch.load(folder / str(stage) / f"rank-{rank}.pt") for rank in (0, 1)]

    return run


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize(("stage", "case"), CASES)
def test_two_processes_end_where_one_ends(stage, case, ranks, tmp_path):
    first, second = (rank[case] for rank in ranks(stage))
    alone = train(case, tmp_path)
    assert_same_state(first["weights"], second["weights"])
    assert any(MODULE_NAME in name for name in first["weights"])
    # DeepSpeed keeps a student in bfloat16 where autocast casts its weights at every use.
    exact = "bf16" not in case
    assert max_difference(first["weights"], alone["weights"]) < (2e-6 if exact else 2e-2)
    for ours, theirs in zip(first["logs"], alone["logs"], strict=True):
        # The gradients of single blocks are gone before they could be measured.
        assert ours.keys() == {name for name in theirs if not name.startswith("grad_norm_block")}
        for name in ours:
            assert ours[name] == pytest.approx(
                theirs[name], rel=1e-5 if exact else 5e-2, abs=1e-5 if exact else 1e-2
            ), name
    for i, stone in alone["stones"].items():
        assert torch.allclose(first["stones"][i].float(), stone.float(), atol=1e-5 if exact else 1e-1)
    if exact:
        for name, value in alone["metrics"].items():
            if name.endswith("_loss"):
                assert first["metrics"][name] == pytest.approx(value, rel=1e-5), name


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_a_student_is_saved_whole_beside_its_connectors(stage, ranks, folder):
    weights = ranks(stage)[0]["vit-all"]["weights"]
    saved = folder / str(stage) / "vit-all" / "checkpoint-4"
    student, info = AutoModelForImageClassification.from_pretrained(saved, output_loading_info=True)
    assert {key: value for key, value in info.items() if value} == {}
    assert_same_state(state_of(student), {n: t for n, t in weights.items() if not n.startswith(MODULE_NAME)})
    connectors = {f"{MODULE_NAME}.{name}": tensor for name, tensor in load_file(saved / CONNECTORS_NAME).items()}
    assert_same_state(connectors, {n: t for n, t in weights.items() if n.startswith(MODULE_NAME)})


# ---- What DeepSpeed does not go with ----


def check(folder, stage, shares_weights=False, fp16=False, gathers=True, **settings):
    zero = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": gathers}
    config = HfDeepSpeedConfig({"fp16": {"enabled": fp16}, "zero_optimization": zero})
    args = BlockwiseDistillConfig(str(folder), use_cpu=True, **settings)
    plugin = SimpleNamespace(hf_ds_config=config, zero_stage=stage)
    check_zero(args, plugin, shares_weights, make_objective(args).needs_paths)


@pytest.mark.parametrize(
    ("stage", "settings", "match"),
    [
        (2, {"stepping_stones": "share"}, "`stepping_stones` is 'share', which ZeRO-2 does not go with"),
        (2, {"stone_fraction": 0.5}, r"`stone_fraction` is 0\.5"),
        (2, {"loss_chunk_size": 8}, "`loss_chunk_size` is 8"),
        (3, {"stepping_stones": "sample"}, "`stepping_stones` is 'sample', which ZeRO-3 does not go with"),
        (3, {"stones_every": 2}, "`stones_every` is 2"),
        (3, {"teacher_cache": "cache"}, "`teacher_cache` is 'cache'"),
        (3, {"objective": "theseus"}, "`objective` is 'theseus', which runs random parts of the models"),
        (3, {"objective": "block_kd+fcfd"}, r"`objective` is 'block_kd\+fcfd'"),
        (3, {"shares_weights": True}, "`teacher_model` is None, but under ZeRO-3"),
        (3, {"gathers": False}, "`stage3_gather_16bit_weights_on_model_save` is not set"),
    ],
)
def test_what_would_err_without_a_word_is_refused(tmp_path, stage, settings, match):
    with pytest.raises(ValueError, match=match):
        check(tmp_path, stage, **settings)
    check(tmp_path, stage - 1, **settings)


def test_what_deepspeed_goes_with_is_not(tmp_path):
    for stage in (1, 2, 3):
        check(tmp_path, stage, loss_chunk_size=0, objective="hint")
        with pytest.raises(ValueError, match="`fp16` is True, with which DeepSpeed skips updates"):
            check(tmp_path, stage, fp16=True)


def test_weights_in_shards_are_not_taken_for_equal():
    sharded = torch.nn.Parameter(torch.empty(0))
    assert _are_equal(sharded, torch.empty(0))
    sharded.ds_id = 0
    assert not _are_equal(sharded, torch.empty(0))


def test_a_model_that_was_loaded_in_shards_is_refused(tmp_path):
    teacher = tiny_vit()
    next(teacher.parameters()).ds_id = 0  # as ZeRO-3 marks it
    with pytest.raises(ValueError, match="`teacher_model` was loaded when ZeRO-3 had been configured"):
        make_trainer(tmp_path, tiny_vit(), teacher, image_rows(4))
