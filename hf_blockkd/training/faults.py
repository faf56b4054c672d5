"""What stops a run on its way, told in a sentence, before it can spoil what was saved."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments
from transformers.utils import logging

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


class LossCheck:
    """What the micro-batches of an optimizer step lose, looked at together, before the update.

    To look at a value is to wait until the device has computed it. The stock trainer waits for the loss of every
    micro-batch (see `nan_filter`), this once for all of them and the norm of the gradient.

    Args:
        args: The configuration.
        is_sharded: Whether no rank could run the teacher again by itself.
    """

    def __init__(self, args: TrainingArguments, is_sharded: bool = False) -> None:
        self._args = args
        # DeepSpeed and some optimizers change weights in the backward.
        self._at_once = is_sharded or "layerwise" in args.optim or "lomo" in args.optim
        self._seen: deque[tuple[torch.Tensor, Mapping[str, torch.Tensor], Callable[[], Step]]] = deque()

    def add(
        self,
        model: nn.Module,
        step: Step,
        total: torch.Tensor,
        parts: Mapping[str, torch.Tensor],
        again: Callable[[], Step],
    ) -> None:
        """Note a micro-batch.

        Args:
            model: The student with its connectors.
            step: The micro-batch.
            total: Its loss.
            parts: What that is made of, by name.
            again: Gives it after the teacher's clean pass once more, which is not kept until then.
        """
        self._seen.append((total.detach(), parts, (lambda: step) if self._at_once else again))
        # Outside of a run nobody checks; its windows are as long as the field says by now.
        while len(self._seen) > self._args.gradient_accumulation_steps:
            self._seen.popleft()
        if self._at_once:
            self.check(model, None, step.index + 1)

    def forget(self) -> None:
        """Drop what a run that was interrupted has left."""
        self._seen.clear()

    def check(self, model: nn.Module, norm: torch.Tensor | float | None, step: int) -> None:
        """Raise a `ValueError` if a loss, or the gradient, is not finite, and forget what was noted.

        It names what the teacher gave, a weight, or the first part of the loss.

        Args:
            model: The student with its connectors.
            norm: Of its gradients for the whole step, `None` where it says nothing.
            step: Number of the optimizer step, for the message.
        """
        seen = [*self._seen]
        self._seen.clear()
        if _are_finite([*(total for total, _, _ in seen), *([] if norm is None else [norm])]):
            return
        where = f"a batch of optimizer step {step}"
        for total, parts, again in seen:
            if torch.isfinite(total):
                continue
            check_teacher(again(), where)
            check_weights(model, step)
            wrong = [name for name, value in parts.items() if not torch.isfinite(value)]
            # A hybrid's own terms before the sums that they are in.
            name = next((name for name in wrong if "/" in name), next(iter(wrong), "loss"))
            raise ValueError(_stopped(f"`{name}` is {parts.get(name, total).item()} on {where}"))
        check_weights(model, step)
        raise ValueError(_stopped(f"At optimizer step {step}, the gradient is not finite"))


def _are_finite(values: list[torch.Tensor | float]) -> bool:
    """Whether all of some scalars are, by one look at them, wherever they are."""
    flags = [torch.as_tensor(value).isfinite() for value in values]
    return not flags or bool(functools.reduce(lambda one, other: one & other.to(one.device), flags))


@contextmanager
def nan_filter(args: TrainingArguments, is_on: bool) -> Iterator[bool]:
    """Switch the stock trainer's filter of losses that are not finite on or off inside the context.

    In training it has nothing to filter, for the run stops, and waits twice for every micro-batch; in evaluation it
    leaves out batches without labels.

    Yields:
        Whether it is on outside.
    """
    usual, args.logging_nan_inf_filter = args.logging_nan_inf_filter, is_on
    try:
        yield usual
    finally:
        args.logging_nan_inf_filter = usual


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
