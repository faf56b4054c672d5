"""What only a GPU can show: routing through its kernels, half precisions with their scaler, and errors in time."""

import copy
import warnings

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_blockkd.objectives.block_kd import OURS

from ..helpers.tiny_models import tiny_bert, tiny_llama, tiny_vit
from ..helpers.training import (
    PLAIN_SGD,
    QUIET,
    Lazy,
    assert_same_state,
    batch_of,
    image_rows,
    make_trainer,
    state_of,
    step_logs,
    text_rows,
    token_rows,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
FAMILIES = pytest.mark.parametrize(
    ("build", "config", "rows"),
    [(tiny_vit, {}, image_rows), (tiny_bert, NO_DROPOUT, text_rows), (tiny_llama, {}, token_rows)],
    ids=["vit", "bert", "llama"],
)
ON_GPU = {"use_cpu": False, **PLAIN_SGD}


def new(folder, build, config, rows, **settings):
    """A trainer of four steps of the default, its stones drawn one by one."""
    torch.manual_seed(0)
    student, teacher = build(num_hidden_layers=2, **config), build(**config)
    settings = {"max_steps": 4, "stepping_stones": "sample", **ON_GPU, **OURS, **settings}
    return make_trainer(folder, student, teacher, rows(16), **settings)


def run(*args, **settings):
    trainer = new(*args, **settings)
    trainer.train()
    return trainer


def losses(trainer):
    return [{name: value for name, value in log.items() if "loss" in name} for log in step_logs(trainer)]


@FAMILIES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stones_of_a_copied_teacher_give_its_logits_bit_for_bit(tmp_path, build, config, rows, dtype):
    teacher = build(**config).to("cuda", dtype)
    inputs = {name: tensor.cuda() for name, tensor in batch_of(rows(3)).items() if name != "labels"}
    inputs = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
    with torch.no_grad():
        expected = copy.deepcopy(teacher).eval()(**inputs).logits
    trainer = make_trainer(tmp_path, copy.deepcopy(teacher), teacher, connector="identity", num_blocks=3, **ON_GPU)
    for logits in trainer.stepping_stone_logits(inputs).values():
        assert torch.equal(logits, expected)


@FAMILIES
@pytest.mark.parametrize(
    ("settings", "rate", "bound"),
    [
        ({}, 1e-3, 1e-4),
        ({"bf16": True}, 1e-3, 0.04),
        ({"fp16": True}, 1e-5, 0.01),  # so that the updates that the scaler skips at first are no matter
        ({"torch_compile": True}, 1e-3, 1e-3),
    ],
    ids=["fp32", "bf16", "fp16", "compiled"],
)
def test_a_run_goes_as_on_a_cpu(tmp_path, monkeypatch, build, config, rows, settings, rate, bound):
    """With the same stones drawn, too."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    expected = run(tmp_path / "cpu", build, config, rows, use_cpu=True, learning_rate=rate)
    trainer = run(tmp_path / "gpu", build, config, rows, learning_rate=rate, **settings)
    assert trainer.accelerator.device.type == "cuda"
    assert (trainer.accelerator.scaler is not None) == ("fp16" in settings)
    assert {parameter.dtype for parameter in trainer.connectors.parameters()} == {torch.float32}
    assert [set(log) for log in step_logs(trainer)] == [set(log) for log in step_logs(expected)]
    for found, other in zip(losses(trainer), losses(expected), strict=True):
        assert found == pytest.approx(other, rel=bound)


@FAMILIES
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, build, config, rows):
    saving = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
    whole = run(tmp_path / "run", build, config, rows, **saving)
    resumed = new(tmp_path / "again", build, config, rows, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert_same_state(state_of(resumed.model), state_of(whole.model))


def test_a_wrong_label_is_named_before_a_kernel_could_trip_over_it(tmp_path):
    rows = image_rows(16)
    rows[10]["labels"] = torch.tensor(9)
    settings = {"max_steps": 4, "train_sampling_strategy": "sequential", **ON_GPU}
    trainer = make_trainer(tmp_path, tiny_vit(num_hidden_layers=2), tiny_vit(), Lazy(rows), **settings)
    with pytest.raises(ValueError, match="`labels` holds 9"):
        trainer.train()
    assert trainer.state.global_step == 2
    torch.zeros(1, device="cuda").item()  # the device still answers


class SecondStep(TrainerCallback):
    """Lets torch warn of everything that waits for the device, in the second step alone."""

    def on_step_begin(self, args, state, control, **kwargs):
        torch.cuda.set_sync_debug_mode("warn" if state.global_step == 1 else "default")

    def on_step_end(self, args, state, control, **kwargs):
        torch.cuda.set_sync_debug_mode("default")


@FAMILIES
def test_a_step_waits_for_the_device_no_more_often_than_the_stock_trainers(tmp_path, build, config, rows):
    """Which trains the student alone: the masks of the teacher's clean pass come on top, and no others."""

    def waits(trainer):
        trainer.add_callback(SecondStep())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.train()
        places = [(warning.filename, warning.lineno) for warning in caught if "synchroniz" in str(warning.message)]
        masks = [place for place in places if "masking_utils" in place[0]]
        return masks, [place for place in places if place not in masks]

    arguments = {name: value for name, value in QUIET.items() if name not in ("num_blocks", "use_cpu")}
    arguments |= {"max_steps": 2, "logging_steps": 100}
    stock = Trainer(build(**config).cuda(), TrainingArguments(str(tmp_path), **arguments), train_dataset=rows(16))
    ours = new(tmp_path, build, config, rows, max_steps=2, logging_steps=100, stepping_stones="all")
    (masks, others), (stock_masks, stock_others) = waits(ours), waits(stock)
    assert len(others) <= len(stock_others), (others, stock_others)
    assert len(masks) <= 2 * len(stock_masks), (masks, stock_masks)
