"""Evaluating the teacher and the stepping stones as the student is, by the trainer's own loop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..routing.entering import main_outputs
from .diagnostics import block_alignment

if TYPE_CHECKING:
    from ..trainer import BlockwiseDistillTrainer

TEACHER = "teacher"
"""What is evaluated is this, the student, or the index of a stepping stone."""


def loss_under_teacher(
    trainer: BlockwiseDistillTrainer, model: nn.Module, inputs: Mapping[str, Any], evaluated: str | int
) -> tuple[torch.Tensor, dict[str, Any]]:
    """The own loss and the outputs of the teacher, or of a stone."""
    pair = trainer.pair
    teacher_inputs = pair.inputs_for("teacher", inputs, labels=True)
    with trainer.accelerator.autocast():
        outputs, extras = pair.stones.teach(teacher_inputs)
        if evaluated != TEACHER:
            with pair.stones.capture([evaluated]) as states:
                model(**pair.inputs_for("student", inputs))
            outputs = pair.stones.run(evaluated, states, teacher_inputs, extras)
    return outputs.loss, {"loss": outputs.loss, **dict(enumerate(main_outputs(outputs)))}


def evaluate_all(
    trainer: BlockwiseDistillTrainer, eval_dataset: Any, ignore_keys: list[str] | None, metric_key_prefix: str
) -> dict[str, float]:
    """See `BlockwiseDistillTrainer.evaluate_stepping_stones`."""
    dataloader, usually = trainer.get_eval_dataloader(eval_dataset), trainer.evaluated
    metrics: dict[str, float] = {}
    # A connector that no stone trains says nothing, but where no stone trains at all they are what was asked for.
    stones = trainer.pair.trained_stones or range(1, len(trainer.block_map) + 1)
    try:
        for evaluated in (TEACHER, *stones):
            trainer.evaluated = evaluated
            name = evaluated if evaluated == TEACHER else f"stone_{evaluated}"
            loop = trainer.evaluation_loop(
                dataloader,
                description=f"Evaluation of {name}",
                prediction_loss_only=True if trainer.compute_metrics is None else None,
                ignore_keys=ignore_keys,
                metric_key_prefix=f"{metric_key_prefix}_{name}",
            )
            metrics.update(loop.metrics)
            # Closes the progress bar.
            trainer.control = trainer.callback_handler.on_predict(
                trainer.args, trainer.state, trainer.control, loop.metrics
            )
    finally:
        trainer.evaluated = usually
    with in_eval_mode(trainer.model), trainer.accelerator.autocast():
        alignment = block_alignment(trainer.pair, (trainer._prepare_inputs(batch) for batch in dataloader))
    return metrics | {f"{metric_key_prefix}_block_{i}_cka": value for i, value in alignment.items()}


def stone_logits(trainer: BlockwiseDistillTrainer, inputs: Mapping[str, Any]) -> dict[int, torch.Tensor]:
    """See `BlockwiseDistillTrainer.stepping_stone_logits`."""
    pair, inputs = trainer.pair, trainer._prepare_inputs(dict(inputs))
    teacher_inputs = pair.inputs_for("teacher", inputs)
    indices = range(1, len(pair.stones) + 1)
    with in_eval_mode(trainer.model), trainer.accelerator.autocast():
        _, extras = pair.stones.teach(teacher_inputs)
        with pair.stones.capture(indices) as states:
            trainer.model(**pair.inputs_for("student", inputs))
        logits = {i: main_outputs(pair.stones.run(i, states, teacher_inputs, extras)) for i in indices}
    return {i: heads[0] if len(heads) == 1 else torch.stack(heads, dim=-1) for i, heads in logits.items()}


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """A model in eval mode for a while."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
