"""Whether labels come at all, where they alone train and nobody could know it before: `LabelWatch`."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

STEPS = 10
"""Optimizer steps that a run is given: one batch of many may be without labels, ten of them are none by chance."""

logger = logging.get_logger(__name__)


class LabelWatch(TrainerCallback):
    """Says once that a run has trained nothing: labels alone would, and no row of its first steps has one.

    What can be known before the first step is refused there (`check_learns`). Here are streams, and data sets that make
    a row when it is read, whose labels may yet come: hence a warning.

    Example:
        ```python
        >>> import torch
        >>> from hf_blockkd.training.label_watch import LabelWatch
        >>> watch = LabelWatch()
        >>> watch.begin("`objective` is 'alone'", "choose 'block_kd' or 'kd'")
        >>> watch.see(torch.tensor([0])), watch.is_waiting
        (None, True)
        >>> watch.see(torch.tensor([3])), watch.is_waiting
        (None, False)

        ```
    """

    def __init__(self) -> None:
        self.is_waiting, self._cause, self._cure, self._steps = False, "", "", 0

    def begin(self, cause: str | None, cure: str) -> None:
        """A run begins.

        Args:
            cause: What makes labels all that trains; `None` where something else does, and nothing is watched.
            cure: What to do about it.
        """
        self.is_waiting, self._cause, self._cure, self._steps = cause is not None, cause or "", cure, 0

    def see(self, counts: torch.Tensor) -> None:
        """Take note of the numbers of labels in an accumulation window, one or several; it waits for no device after.

        Args:
            counts: Of this process, or of all.
        """
        if self.is_waiting and bool(counts.any()):
            self.is_waiting = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._steps += 1
        if self._steps == STEPS:
            self._say()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._say()

    def _say(self) -> None:
        # Of a finished run that is resumed, no step is left.
        if not self.is_waiting or not self._steps:
            return
        self.is_waiting = False
        logger.warning(
            f"Nothing has been trained so far: {self._cause}, so that labels alone train, but no row that this process "
            f"has read in its first steps ({self._steps}) has one; label some, or {self._cure}."
        )
