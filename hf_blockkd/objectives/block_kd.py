"""Block-wise logit distillation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..learners import Key, Learner
from ..losses import stone_weights
from ..sampling import StoneDraw, draw_stones, sampling_shares
from ..stepping_stones import choose_stones
from .base import Objective

if TYPE_CHECKING:
    from ..step import Step


class BlockKD(Objective):
    """Task loss and divergence on every stepping stone, too (Yu et al., 2024, arXiv 2411.01547)."""

    def connectors(self, num_blocks: int) -> list[int]:
        return choose_stones(self.args.stepping_stones, num_blocks, self.args.stones_per_step)

    def learners(self, step: Step) -> dict[Key, Learner]:
        return {i: step.stone(i, draw) for i, draw in self.draw(step).items()}

    def draw(self, step: Step) -> dict[int, StoneDraw]:
        """The stones of this micro-batch, and what of it each of them gets."""
        args, stones = self.args, step.pair.stones
        # Read anew at every step, so that a callback may change it; connectors train where it named them at first.
        chosen = [i for i in self.connectors(len(stones)) if i in step.pair.trained_stones]
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
