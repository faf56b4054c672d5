"""The parts of the loss between two logging steps: `LossLog`."""

from __future__ import annotations

import torch
from accelerate import Accelerator

from ..losses.learners import DistillationLoss, Learners


class LossLog:
    """Sums of the parts of the loss, kept on the device, so that only a logging step waits for it.

    The micro-batches of an optimizer step add up, as they do for the gradient; steps are averaged.
    """

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        # How many steps computed a part, and the last of them.
        self._steps: dict[str, tuple[int, int]] = {}

    def add(self, loss: DistillationLoss, learners: Learners, scale: float, step: int) -> dict[str, torch.Tensor]:
        """Add the parts of one micro-batch.

        Args:
            loss: The parts.
            learners: What they are the losses of.
            scale: Multiplies them, as it does the total for the backward.
            step: The optimizer step that the micro-batch belongs to.

        Returns:
            The parts by name, as they were.
        """
        parts = {name: value.detach() for name, value in loss.parts(learners).items()}
        for name, value in parts.items():
            self._sums[name] = self._sums.get(name, 0.0) + value * scale
            count, last = self._steps.get(name, (0, -1))
            self._steps[name] = count + (step != last), step
        return parts

    def take(self, accelerator: Accelerator) -> dict[str, float]:
        """The average over steps and ranks since the last call; every rank must call it.

        A part is averaged over the steps that computed it: a sampled stone skips some.
        """
        if not self._sums:
            return {}
        sums = accelerator.gather(torch.stack(list(self._sums.values()))[None]).mean(0).tolist()
        averages = {name: value / self._steps[name][0] for name, value in zip(self._sums, sums, strict=True)}
        self._sums.clear()
        self._steps.clear()
        return averages
