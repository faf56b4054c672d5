"""Running the teacher and the stepping stones as the student is run when it is evaluated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.utils import ModelOutput

from ..losses.learners import STUDENT
from ..models.heads import without_logits
from ..pairing.pair import Pair
from ..routing.logits import main_outputs

TEACHER = "teacher"
"""What is evaluated is this, the student, or the index of a stepping stone."""


def roles_of(evaluated: str | int | None) -> tuple[str, ...]:
    """The models that read a batch where the student, the teacher or a stone is evaluated; with `None`, in training."""
    return {STUDENT: ("student",), TEACHER: ("teacher",)}.get(evaluated, ("student", "teacher"))


def run_hybrid(
    pair: Pair, model: nn.Module, inputs: Mapping[str, Any], evaluated: str | int, labels: bool = False
) -> ModelOutput:
    """The outputs of the teacher, or of a stone.

    Args:
        pair: The models.
        model: The student with all that is around it.
        inputs: A batch.
        evaluated: `TEACHER`, or the index of a stone.
        labels: Whether the outputs hold the teacher's own loss, too, for which the batch needs labels.
    """
    teacher_inputs = pair.inputs_for("teacher", inputs, labels=labels)
    if evaluated == TEACHER:
        return pair.stones.teach(teacher_inputs)[0]
    with without_logits(pair.student_head, pair.teacher_head):
        _, extras = pair.stones.teach(pair.inputs_for("teacher", inputs))
        with pair.stones.capture([evaluated]) as states:
            model(**pair.inputs_for("student", inputs))
    return pair.stones.run(evaluated, states, teacher_inputs, extras)


def predictions(outputs: ModelOutput, loss: torch.Tensor | None = None) -> dict[str | int, torch.Tensor]:
    """What an evaluation gathers: the logits, and not the states and attentions that some models return, too."""
    return ({} if loss is None else {"loss": loss}) | dict(enumerate(main_outputs(outputs)))


def stone_logits(pair: Pair, model: nn.Module, inputs: Mapping[str, Any]) -> dict[int, torch.Tensor]:
    """See `BlockwiseDistillTrainer.stepping_stone_logits`."""
    teacher_inputs = pair.inputs_for("teacher", inputs)
    indices = range(1, len(pair.stones) + 1)
    _, extras = pair.stones.teach(teacher_inputs)
    with pair.stones.capture(indices) as states:
        model(**pair.inputs_for("student", inputs))
    logits = {i: main_outputs(pair.stones.run(i, states, teacher_inputs, extras)) for i in indices}
    return {i: heads[0] if len(heads) == 1 else torch.stack(heads, dim=-1) for i, heads in logits.items()}
