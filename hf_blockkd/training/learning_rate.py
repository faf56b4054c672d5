"""A learning rate found by a short run at rising rates: `range_test`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback

NUM_STEPS = 80
"""Of a range test; another 80 at most, without learning, say what the loss would have been on the same batches."""
LOWEST, HIGHEST = 1e-5, 3e-2
"""Rates of the first and of the last step: what was best in all of our sweeps lies well between them."""
WIDTH = 0.2
"""Of the bell that smooths losses over rates, in decades: about five steps to each side."""
HARM = 1.3
"""Times the loss of a model that learns nothing, from which on higher rates are not tried."""
WINDOW = 5
"""Steps whose losses are summed to see that."""
SETTINGS: dict[str, Any] = {
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "logging_steps": 1,
    "logging_nan_inf_filter": False,
    "eval_strategy": "no",
    "eval_on_start": False,
    "save_strategy": "no",
    "load_best_model_at_end": False,
    "report_to": "none",
    "push_to_hub": False,
    "disable_tqdm": True,
    # Weights that fall to nothing over so few steps would look like learning.
    "stone_schedule": "constant",
}
"""Fields of `BlockwiseDistillConfig` in which the test's trainers differ from that of the run."""


@dataclass(frozen=True)
class RangeTest:
    """What a range test found.

    Attributes:
        rates: Of its steps, rising.
        losses: At these steps.
        untrained: What the untouched model has for a loss on the same batches, with the same dropout.

    Example:
        ```python
        >>> from hf_blockkd.training.learning_rate import RangeTest
        >>> rates = [10 ** (i / 10 - 5) for i in range(31)]
        >>> losses = [1 - 50 * rate if rate < 2e-3 else 450 * rate for rate in rates]
        >>> f"{RangeTest(rates, losses, [1.0] * 31).rate:.1e}"
        '2.0e-03'

        ```
    """

    rates: list[float]
    losses: list[float]
    untrained: list[float]

    @property
    def relative(self) -> list[float]:
        """The loss at each rate over that of the untouched model, smoothed over neighbouring rates.

        Both are smoothed before they are divided, so that a batch counts by its loss.
        """
        places = [math.log10(rate) for rate in self.rates]
        smoothed = []
        for place in places:
            weights = [math.exp(-0.5 * ((place - other) / WIDTH) ** 2) for other in places]
            sums = [
                sum(w * one for w, one in zip(weights, many, strict=True)) for many in (self.losses, self.untrained)
            ]
            smoothed.append(sums[0] / sums[1])
        return smoothed

    @property
    def rate(self) -> float:
        """The highest rate beyond that of the lowest loss at which half of what was gained is still there.

        Smith (2017, arXiv 1506.01186) takes for the highest rate of a schedule the one at which the curve stops
        falling and turns ragged or up. That place lies on a broad floor, where noise would choose it; the slope behind
        the floor is steep, and half of its height is a place that can be found.
        """
        relative = self.relative
        lowest = min(range(len(relative)), key=relative.__getitem__)
        last, kept = lowest, (1 + relative[lowest]) / 2
        while last + 1 < len(relative) and relative[last + 1] <= max(kept, relative[lowest]):
            last += 1
        return self.rates[last]


class RatesOfSteps(TrainerCallback):
    """Sets the rate of every step, keeps its loss, and ends the run where nothing more is to be found.

    Args:
        rates: Of the steps.

    Attributes:
        losses: Of those that are through.
    """

    def __init__(self, rates: list[float]) -> None:
        self.rates, self.losses = rates, []

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        for group in optimizer.param_groups:
            group["lr"] = self.rates[state.global_step]

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" not in logs:
            return
        self.losses.append(logs["loss"])
        first, last = self.losses[:WINDOW], self.losses[-WINDOW:]
        # Twice, because here nothing is known yet of how much batches differ.
        control.should_training_stop |= not sum(last) < 2 * HARM * sum(first) * len(last) / len(first)


def range_test(make_trainer: Callable[..., Trainer], num_steps: int = NUM_STEPS) -> RangeTest:
    """Train a copy of a model for some steps at rising rates, and another one over the same batches at none.

    Args:
        make_trainer: Makes a trainer on a copy of the model that is to train, with the fields that it is given in place
            of the run's own; the model itself keeps its bits.
        num_steps: How many steps; the rate is multiplied by the same number after each.

    Returns:
        The curve, as far as it was followed; its `rate` is the one to train with.

    Raises:
        ValueError: If the model cannot be trained at the lowest rates either.
    """
    rates = [LOWEST * (HIGHEST / LOWEST) ** (step / max(num_steps - 1, 1)) for step in range(num_steps)]
    losses = _losses(make_trainer, rates)
    untrained = _losses(make_trainer, [0.0] * len(losses))
    return RangeTest(rates[: len(losses)], losses, untrained[: len(losses)])


def _losses(make_trainer: Callable[..., Trainer], rates: list[float]) -> list[float]:
    trainer, steps = make_trainer(max_steps=len(rates), **SETTINGS), RatesOfSteps(rates)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(steps)
    try:
        trainer.train()
    except ValueError:
        # A loss or a gradient that is not finite ends the test where rates are too high, and nothing else does.
        if len(steps.losses) < WINDOW:
            raise
    return [loss for loss in steps.losses if math.isfinite(loss)]
