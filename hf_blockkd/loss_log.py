"""The parts of the loss between two logging steps: `LossLog`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch
from accelerate import Accelerator

from .losses import BlockKDLoss


class LossLog:
    """Sums of the parts of the loss, kept on the device, so that only a logging step waits for it.

    The micro-batches of an optimizer step add up, as they do for the gradient; steps are averaged.
    """

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._steps: dict[str, set[int]] = defaultdict(set)

    def add(self, loss: BlockKDLoss, scale: float, step: int, rates: Mapping[int, float]) -> None:
        """Add the parts of one micro-batch.

        Args:
            loss: The parts.
            scale: Multiplies them, as it does the total for the backward.
            step: The optimizer step that the micro-batch belongs to.
            rates: The share of the examples that each stone ran on, which its own losses are divided by.
        """
        parts = {"loss_task": loss.task, "loss_distill": loss.distill, "loss_cross": loss.cross}
        parts |= {f"stone_{i}/task": value / rates[i] for i, value in loss.stone_task.items()}
        parts |= {f"stone_{i}/distill": value / rates[i] for i, value in loss.stone_distill.items()}
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
