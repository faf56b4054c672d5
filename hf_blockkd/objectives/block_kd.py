"""Block-wise logit distillation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers.utils import logging

from ..learners import Key, Learner
from ..losses import stone_weights
from ..sampling import StoneDraw, draw_stones, sampling_shares
from ..stepping_stones import choose_stones
from .base import Objective
from .hint import state_error

if TYPE_CHECKING:
    from ..step import Step

logger = logging.get_logger(__name__)

STATE_WEIGHT = 3.0  # on CIFAR-10, 1 is worse, and 10 as good or better


class BlockKD(Objective):
    """Task loss and divergence on every stepping stone, too (Yu et al., 2024, arXiv 2411.01547).

    For stones whose connectors were fitted before the run, or for all with a `state_weight`, it adds the error of the
    connected states relative to the teacher's, position by position: |C s - t|^2 / |t|^2. That is ours; 0 leaves the
    published losses. States differ by orders of magnitude between models, and within a text (the first token of many
    language models); relative errors are alike, so that one weight does for all.
    """

    weights = ("task_weight", "distill_weight", "cross_weight")

    def connectors(self, num_blocks: int) -> list[int]:
        return choose_stones(self.args.stepping_stones, num_blocks, self.args.stones_per_step)

    def learners(self, step: Step) -> dict[Key, Learner]:
        return {i: step.stone(i, draw) for i, draw in self.draw(step).items()}

    def terms(self, step: Step) -> dict[str, tuple[torch.Tensor, float]]:
        weight, stones = self.args.state_weight, step.pair.trained_stones
        if weight is None:
            weight, stones = STATE_WEIGHT, step.pair.fitted_stones
        if not weight or not step.states.get("T"):  # which a cache does not keep
            return {}
        # Also of stones that are not drawn at this step: their states are there.
        errors = [state_error(step, i, relative=True) for i in self.chosen(step) if i in stones]
        return {"state": (sum(errors), weight)} if errors else {}

    def chosen(self, step: Step) -> list[int]:
        """The stones that may be drawn at this step."""
        # Read anew at every step, so that a callback may change it; connectors train where it named them at first.
        asked = self.connectors(len(step.pair.stones))
        chosen = [i for i in asked if i in step.pair.trained_stones]
        if len(chosen) < len(asked):
            logger.warning_once(
                f"`stepping_stones` is {self.args.stepping_stones!r} by now, but the connectors of stones "
                f"{sorted({*asked} - {*chosen})} do not train; name them when the trainer is made."
            )
        return chosen

    def draw(self, step: Step) -> dict[int, StoneDraw]:
        """The stones of this micro-batch, and what of it each of them gets."""
        args, stones, chosen = self.args, step.pair.stones, self.chosen(step)
        weights = stone_weights(chosen, len(stones), args.stone_weighting)
        return draw_stones(
            args.stepping_stones,
            weights,
            sampling_shares(weights, stones.suffix_layers, args.stone_sampling),
            seed=args.seed,
            step=step.index,
            num_examples=step.losses.num_examples,
            first_example=step.first_example,
            stones_per_step=args.stones_per_step,
            fraction=args.stone_fraction,
            every=args.stones_every,
        )
