"""Block-wise logit distillation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers.utils import logging

from ..learners import Key, Learner
from ..losses import stone_weights
from ..sampling import StoneDraw, draw_stones, sampling_shares
from ..stepping_stones import choose_stones
from .base import Objective

if TYPE_CHECKING:
    from ..step import Step

logger = logging.get_logger(__name__)


class BlockKD(Objective):
    """Task loss and divergence on every stepping stone, too (Yu et al., 2024, arXiv 2411.01547)."""

    weights = ("task_weight", "distill_weight", "cross_weight")

    def connectors(self, num_blocks: int) -> list[int]:
        return choose_stones(self.args.stepping_stones, num_blocks, self.args.stones_per_step)

    def learners(self, step: Step) -> dict[Key, Learner]:
        return {i: step.stone(i, draw) for i, draw in self.draw(step).items()}

    def draw(self, step: Step) -> dict[int, StoneDraw]:
        """The stones of this micro-batch, and what of it each of them gets."""
        args, stones = self.args, step.pair.stones
        # Read anew at every step, so that a callback may change it; connectors train where it named them at first.
        asked = self.connectors(len(stones))
        chosen = [i for i in asked if i in step.pair.trained_stones]
        if len(chosen) < len(asked):
            logger.warning_once(
                f"`stepping_stones` is {args.stepping_stones!r} by now, but the connectors of stones "
                f"{sorted({*asked} - {*chosen})} do not train; name them when the trainer is made."
            )
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
