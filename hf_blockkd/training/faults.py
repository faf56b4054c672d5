"""What stops a run on its way, told in a sentence, before it can spoil what was saved."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..losses.learners import DistillationLoss, Learners
from ..saving.checkpoints import RESUME
from .step import Step

logger = logging.get_logger(__name__)


def warn_of_float16(model: nn.Module, scaler: Any) -> None:
    """Warn of a student in float16 whose small updates are lost, where no gradient scaler keeps them."""
    if scaler is None and any(one.requires_grad and one.dtype == torch.float16 for one in model.parameters()):
        logger.warning(
            f"The student {type(model).__name__} trains in float16 without a gradient scaler, so that small gradients "
            "and updates are lost; load it in float32, and set `fp16=True` or `bf16=True` instead."
        )


def check_gradients(model: nn.Module, norm: torch.Tensor | float | None, step: int) -> None:
    """Raise a `ValueError` if an update would write values that are not finite into the weights.

    Args:
        model: The student with its connectors.
        norm: Of its gradients for the whole step, `None` where nobody computed it.
        step: Number of the optimizer step, for the message.
    """
    if norm is not None and not math.isfinite(norm):
        check_weights(model, step)
        raise ValueError(_stopped(f"At optimizer step {step}, the gradient is not finite"))


def check_weights(model: nn.Module, step: int) -> None:
    """Raise a `ValueError` that names the first weight that is not finite, if there is one."""
    wrong = next((name for name, weight in model.named_parameters() if not torch.isfinite(weight).all()), None)
    if wrong is not None:
        raise ValueError(_stopped(f"At optimizer step {step}, {wrong} is not finite"))


def _stopped(what: str) -> str:
    return (
        f"{what}; training stops before this update, and the last checkpoint is untouched: lower `learning_rate`, "
        f"correct the data, mask the same classes in both models or train in a wider dtype, and {RESUME}."
    )


def check_teacher(step: Step, where: str) -> None:
    """Raise a `ValueError` if the teacher's clean pass gave what no loss can be made of.

    Args:
        step: After `teach`.
        where: The batch, for the message.
    """
    if not isinstance(step.teacher_rows, torch.Tensor):
        return
    # A class with a logit of -inf is one that the teacher leaves out.
    wrong = step.teacher_rows.isnan() | step.teacher_rows.isposinf()
    if wrong.any():
        raise ValueError(
            f"The teacher gives values that are not finite for examples {step.losses.examples(wrong)} of "
            f"{where}; training stops here, and the last checkpoint is untouched. Check these inputs, or run the "
            "teacher in a wider dtype."
        )


def check_loss(model: nn.Module, step: Step, loss: DistillationLoss, learners: Learners) -> None:
    """Raise a `ValueError` if a loss is not finite: naming what the teacher gave, a weight, or the first of its terms.

    Args:
        model: The student with its connectors.
        step: The micro-batch.
        loss: Its loss.
        learners: What it is the loss of.
    """
    if torch.isfinite(loss.total):
        return
    where = f"a batch of optimizer step {step.index + 1}"
    check_teacher(step, where)
    check_weights(model, step.index + 1)
    parts = loss.parts(learners)
    wrong = [name for name, value in parts.items() if not torch.isfinite(value)]
    # A hybrid's own terms before the sums that they are in.
    name = next((name for name in wrong if "/" in name), next(iter(wrong), "loss"))
    raise ValueError(_stopped(f"`{name}` is {parts.get(name, loss.total).item()} on {where}"))


def is_dead_worker(error: BaseException) -> bool:
    """Whether an exception tells of a worker of the data loader; its signal may come at any moment of a run."""
    return isinstance(error, RuntimeError) and "DataLoader worker" in str(error)


@contextmanager
def dead_workers_explained() -> Iterator[None]:
    """Say what to do where a worker process of the data loader was killed."""
    try:
        yield
    except RuntimeError as error:
        if not is_dead_worker(error):
            raise
        raise RuntimeError(
            f"{error}; training stops here, and the last checkpoint is untouched: workers are mostly killed for want "
            f"of memory, so lower `dataloader_num_workers`, and {RESUME}."
        ) from error
