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
from .one_block import OneBlock

TEACHER = "teacher"
Evaluated = str | int | OneBlock
"""What is evaluated: the student, the teacher, a stepping stone by its index, or the teacher with one other block."""


def roles_of(evaluated: Evaluated | None) -> tuple[str, ...]:
    """The models that read a batch where the student, the teacher or a stone is evaluated; with `None`, in training."""
    return {STUDENT: ("student",), TEACHER: ("teacher",)}.get(evaluated, ("student", "teacher"))


def run_hybrid(
    pair: Pair, model: nn.Module, inputs: Mapping[str, Any], evaluated: Evaluated, labels: bool = False
) -> ModelOutput:
    """The outputs of the teacher, of a stone, or of the teacher with one other block.

    Args:
        pair: The models.
        model: The student with all that is around it.
        inputs: A batch.
        evaluated: What is run.
        labels: Whether the outputs hold the teacher's own loss, too, for which the batch needs labels.
    """
    teacher_inputs = pair.inputs_for("teacher", inputs, labels=labels)
    if evaluated == TEACHER:
        return pair.stones.teach(teacher_inputs)[0]
    if isinstance(evaluated, OneBlock):
        return evaluated.run(pair, model, inputs, teacher_inputs)
    with without_logits(pair.student_head, pair.teacher_head):
        _, extras = pair.stones.teach(pair.inputs_for("teacher", inputs))
        with pair.stones.capture([evaluated]) as states:
            model(**pair.inputs_for("student", inputs))
    return pair.stones.run(evaluated, states, teacher_inputs, extras)


def predictions(outputs: ModelOutput, loss: torch.Tensor | None = None) -> dict[str | int, torch.Tensor]:
    """What an evaluation gathers: the logits, and not the states and attentions that some models return, too.

    Of detectors it is all that `Trainer` gathers of the student, boxes among it, which metrics look for at their place.
    """
    has_boxes = "pred_boxes" in outputs
    own = {name: outputs[name] for name in outputs if name != "loss"} if has_boxes else enumerate(main_outputs(outputs))
    return ({} if loss is None else {"loss": loss}) | dict(own)


def stone_logits(pair: Pair, model: nn.Module, inputs: Mapping[str, Any]) -> dict[int, torch.Tensor]:
    """See `BlockwiseDistillTrainer.stepping_stone_logits`."""
    teacher_inputs = pair.inputs_for("teacher", inputs)
    indices = range(1, len(pair.stones) + 1)
    _, extras = pair.stones.teach(teacher_inputs)
    with pair.stones.capture(indices) as states:
        model(**pair.inputs_for("student", inputs))
    outputs = {i: pair.stones.run(i, states, teacher_inputs, extras) for i in indices}
    if pair.embeddings is not None:
        return {i: pair.logits("teacher", one, teacher_inputs) for i, one in outputs.items()}
    logits = {i: main_outputs(one) for i, one in outputs.items()}
    return {i: heads[0] if len(heads) == 1 else torch.stack(heads, dim=-1) for i, heads in logits.items()}


def evaluated_vectors(
    pair: Pair, model: nn.Module, inputs: Mapping[str, Any], evaluated: Evaluated
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The vectors of models without heads, on a batch.

    Args:
        pair: The models.
        model: The student with all that is around it.
        inputs: A batch.
        evaluated: Likewise.

    Returns:
        Those of what is evaluated, (B, D), as they are of a student that is saved; the same as they are compared, where
        those of the student may be of another width; and the teacher's.
    """
    teacher_inputs = pair.inputs_for("teacher", inputs)
    targets = pair.logits("teacher", pair.teacher(**teacher_inputs), teacher_inputs)
    if evaluated == STUDENT:
        own = pair.inputs_for("student", inputs)
        outputs = model(**own)
        vectors = pair.embeddings.vectors("student", outputs, own, connected=False)
        return vectors, pair.logits("student", outputs, own), targets
    outputs = run_hybrid(pair, model, inputs, evaluated)
    vectors = pair.logits("teacher", outputs, teacher_inputs)
    return vectors, vectors, targets
