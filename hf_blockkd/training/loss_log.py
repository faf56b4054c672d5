"""The parts of the loss between two logging steps: `LossLog`."""

from __future__ import annotations

from collections import defaultdict

import torch
from accelerate import Accelerator

from ..losses.learners import DistillationLoss, Learners


class LossLog:
    """Sums of the parts of the loss, kept on the device, so that only a logging step waits for it.

    The micro-batches of an optimizer step add up, as they do for the gradient; steps are averaged.
    """

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._steps: dict[str, set[int]] = defaultdict(set)

    def add(self, loss: DistillationLoss, learners: Learners, scale: float, step: int) -> None:
        """Add the parts of one micro-batch.

        Args:
            loss: The parts.
            learners: What they are the losses of.
            scale: Multiplies them, as it does the total for the backward.
            step: The optimizer step that the micro-batch belongs to.
        """
        parts = {"loss_task": loss.task, "loss_distill": loss.distill, "loss_cross": loss.cross}
        parts |= {f"loss_{name}": value for name, value in loss.terms.items()}
        for key, terms in loss.learners.items():
            name = f"stone_{key}" if isinstance(key, int) else key
            parts[f"{name}/task"] = terms.task / learners[key].rate
            parts[f"{name}/distill"] = terms.distill / learners[key].rate
        for name, value in parts.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach() * scale
            self._steps[name].add(step)

    def take(self, accelerator: Accelerator) -> dict[str, float]:
        """The average over steps and ranks since the last call; every rank must call it.

        A part is averaged over the steps that computed it: a sampled stone skips some.
        """
        if not self._sums:
            return {}
        sums = accelerator.gather(torch.stack(list(self._sums.values()))[None]).mean(0).tolist()
        averages = {name: value / len(self._steps[name]) for name, value in zip(self._sums, sums, strict=True)}
        self._sums.clear()
        self._steps.clear()
        return averages
