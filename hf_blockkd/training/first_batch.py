"""What is found out on the first batch of a run, before its first update: `check_first_batch`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ..config import BlockwiseDistillConfig
from ..data.seeding import restored_random_states
from ..pairing.pair import Pair
from ..routing.forwards import in_eval_mode
from .options import check_smoothing
from .own_loss import TaskLosses, batch_to_compare
from .self_test import first_examples, self_test
from .step import Step
from .teacher_rows import TeacherRows


def check_first_batch(
    pair: Pair,
    args: BlockwiseDistillConfig,
    model: nn.Module,
    inputs: Mapping[str, Any],
    stones: Sequence[int],
    task_losses: TaskLosses,
    teacher_rows: TeacherRows,
    accelerator: Accelerator,
) -> None:
    """Task losses as in evaluation, the self-test of the routing, and the search for a shared prefix.

    Args:
        pair: The models.
        args: The configuration.
        model: The student with all that is around it.
        inputs: The batch, with labels, on the device.
        stones: Indices of those that run, rising.
        task_losses: Told which models have a loss of their own.
        teacher_rows: Told what the teacher's layers hand on.
        accelerator: Of the run.

    Raises:
        ValueError: If options, batch and models do not fit.
        UnsupportedArchitectureError: If the teacher does not give its own logits when it is entered in its middle.
    """
    check_smoothing(args, pair.task, pair.task.problem(inputs))
    some = first_examples(inputs, pair.task)
    models = {"student": model} | ({"teacher": pair.teacher} if stones else {})
    # Not compiled for one forward in eval mode.
    eager = torch.compiler.set_stance("force_eager")
    with in_eval_mode(model), restored_random_states(accelerator.device), eager, accelerator.autocast():
        batch = batch_to_compare(pair, inputs, some)
        task_losses.compare(pair, models, batch, lambda one: Step(pair, args, one).losses)
    if teacher_rows.are_entered:
        with accelerator.autocast():
            teacher_rows.keep(self_test(pair, some, _sharing(args) if stones else None, stones))


def _sharing(args: BlockwiseDistillConfig) -> str | None:
    """The setting by which a stone runs on some of the examples only, if there is one."""
    if args.stepping_stones == "share":
        return "`stepping_stones='share'`"
    return f"`stone_fraction={args.stone_fraction}`" if args.stone_fraction < 1 else None
