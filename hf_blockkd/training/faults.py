"""What stops a run on its way, told in a sentence, before it can spoil what was saved."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .step import Step

RESUME = "go on with `trainer.train(resume_from_checkpoint=True)`"


def check_gradients(model: nn.Module, norm: torch.Tensor | float | None, step: int) -> None:
    """Raise a `ValueError` if an update would write values that are not finite into the weights.

    Args:
        model: The student with its connectors.
        norm: Of its gradients for the whole step, `None` where nobody computed it.
        step: Number of the optimizer step, for the message.
    """
    if norm is None or math.isfinite(norm):
        return
    weights = (name for name, parameter in model.named_parameters() if not torch.isfinite(parameter).all())
    where = next(weights, "the gradient")
    raise ValueError(
        f"At optimizer step {step}, {where} is not finite; training stops before this update, and the last checkpoint "
        f"is untouched: lower `learning_rate`, correct the data or train in a wider dtype, and {RESUME}."
    )


def check_teacher(step: Step, where: str) -> None:
    """Raise a `ValueError` if the teacher's clean pass gave values that are not finite.

    Args:
        step: After `teach`.
        where: The batch, for the message.
    """
    finite = torch.isfinite(step.teacher_rows)
    if not finite.all():
        raise ValueError(
            f"The teacher gives values that are not finite for examples {step.losses.examples(~finite)} of "
            f"{where}; training stops here, and the last checkpoint is untouched. Check these inputs, or run the "
            "teacher in a wider dtype."
        )


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
