"""The parts of the loss between two logging steps, and what falling weights they count: `LossLog`."""

from __future__ import annotations

from collections.abc import Mapping

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
        # Known on the host, and the same on all ranks.
        self._weights: dict[str, float] = {}

    def add(
        self,
        loss: DistillationLoss,
        learners: Learners,
        scale: float,
        step: int,
        weights: Mapping[str, float] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Add the parts of one micro-batch.

        Args:
            loss: The parts.
            learners: What they are the losses of.
            scale: Multiplies them, as it does the total for the backward.
            step: The optimizer step that the micro-batch belongs to.
            weights: What the objective lets change over the run, by name, as it is at this step.

        Returns:
            The parts by name, as they were.
        """
        is_first = self._steps.get("loss_task", (0, -1))[1] != step
        for name, weight in (weights or {}).items() if is_first else ():
            self._weights[name] = self._weights.get(name, 0.0) + weight
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
        averages |= {name: weight / self._steps["loss_task"][0] for name, weight in self._weights.items()}
        self._sums.clear()
        self._weights.clear()
        self._steps.clear()
        return averages
