"""Tiny data sets, a trainer with quiet settings, and callbacks that look on: what the trainer's tests share."""

from __future__ import annotations

import os
import signal
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_jit_checkpoint import CheckpointManager

from hf_blockkd import BlockwiseDistillConfig, BlockwiseDistillTrainer
from hf_blockkd.connectors.attached import attached

from .tiny_models import LABELS, VOCABULARY

Rows = list[dict[str, torch.Tensor]]

QUIET = {
    "num_blocks": 2,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_steps": 1,
}
"""What every run of the tests has in common."""
PLAIN_SGD = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
"""An optimizer under which a wrong scale of the gradient shows in the weights, as Adam's would not."""


def image_rows(count: int = 8, seed: int = 0) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    return [
        {"pixel_values": torch.randn(1, 8, 8, generator=generator), "labels": torch.tensor(i * 3 % LABELS)}
        for i in range(count)
    ]


def text_rows(count: int = 8, length: int = 6, seed: int = 0) -> Rows:
    """Sequences with a class each; the first ones are padded by one token."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        token_ids = torch.randint(3, VOCABULARY, (length,), generator=generator)
        mask = torch.ones(length, dtype=torch.long)
        if i % 2:
            token_ids[-1], mask[-1] = 0, 0
        rows.append({"input_ids": token_ids, "attention_mask": mask, "labels": torch.tensor(i * 3 % LABELS)})
    return rows


def token_rows(count: int = 8, length: int = 6, seed: int = 0) -> Rows:
    """Sequences for language models; row i leaves the first `i % length` labels out."""
    rows = []
    for i, row in enumerate(text_rows(count, length, seed)):
        labels = row["input_ids"].clone()
        labels[: i % length] = -100
        rows.append({**row, "labels": labels})
    return rows


def prompt_rows(count=8, length=7, seed=3):
    """Texts of unequal length, padded on the right, whose first tokens are prompts of unequal length."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator)
        mask = torch.arange(length) < length - i % 3
        labels = ids.masked_fill(~mask | (torch.arange(length) < 2 + i % 2), -100)
        rows.append({"input_ids": ids * mask, "attention_mask": mask.long(), "labels": labels})
    return rows


class Lazy(torch.utils.data.Dataset):
    """Rows that nobody sees before they are read."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def make_trainer(
    folder: Path | str,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    train: Rows | None = None,
    *,
    callbacks: list[TrainerCallback] | None = None,
    eval_dataset: Any = None,
    compute_metrics: Any = None,
    peft_config: Any = None,
    **config: Any,
) -> BlockwiseDistillTrainer:
    return BlockwiseDistillTrainer(
        model=student,
        teacher_model=teacher,
        args=BlockwiseDistillConfig(str(folder), **{**QUIET, **config}),
        train_dataset=train,
        eval_dataset=eval_dataset,
        compute_metrics=compute_metrics,
        callbacks=callbacks,
        peft_config=peft_config,
    )


def state_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def assert_same_state(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Same names and same bits."""
    assert actual.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(actual[name], expected[name])]
    assert not different


def differs(actual: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return any(not torch.equal(actual[name], other[name]) for name in other)


def max_difference(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert actual.keys() == expected.keys()
    return max((actual[name] - expected[name]).abs().max().item() for name in expected)


def with_connectors(trainer: BlockwiseDistillTrainer) -> AbstractContextManager:
    """The student as it is while it trains, with the connectors on it."""
    return attached(trainer.pair.all_connectors, trainer.model)


class Gradients(TrainerCallback):
    """Keeps the gradients of every optimizer step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


class Terminate(TrainerCallback):
    """Sends SIGTERM to its own process in the midst of a step, and waits until it has come through."""

    def __init__(self, step: int, manager: CheckpointManager) -> None:
        self.step, self.manager = step, manager

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            self.hook = model.register_forward_pre_hook(self.terminate)

    def terminate(self, *args):
        self.hook.remove()
        os.kill(os.getpid(), signal.SIGTERM)
        while not self.manager.is_checkpoint_requested:
            time.sleep(0.01)


def step_logs(trainer: BlockwiseDistillTrainer) -> list[dict[str, float]]:
    """What was logged at the training steps, without evaluations and the closing summary."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def batch_of(rows: Rows) -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def file_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
