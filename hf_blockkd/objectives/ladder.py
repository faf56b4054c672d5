"""Stepping stones as models that are kept: the ladder between student and teacher."""

from __future__ import annotations

from typing import Any

from ..pairing.pair import Pair
from ..training.step import Step
from .block_kd import BlockKD, ours
from .sampling import StoneDraw, draw_stones, sampling_shares


class Ladder(BlockKD):
    """Block-wise logit distillation for the sake of the stones, each of which is saved as a model of its own.

    As `BlockKD`, but for what makes good rungs: all stones take part to the end of the run, count alike, and together
    as much as the student; one of them runs at each step, drawn the more often the cheaper it is (`sampling_shares`),
    which leaves the sum over all an unbiased estimate. Save them with `BlockwiseDistillTrainer.save_stepping_stone`.
    `stone_weight`, `state_weight` and `stone_schedule` of the configuration go before.

    Under a frozen student it trains the connectors alone: a ladder of a student that was trained before, by whatever.
    """

    keeps_stones = True

    def connectors(self, num_blocks: int) -> list[int]:
        return list(range(1, num_blocks + 1))

    def stones(self, pair: Pair) -> list[int]:
        return self.connectors(len(pair.block_map)) if self.setting("stone_weight", pair) else []

    def state_blocks(self, num_blocks: int) -> list[int]:
        return self.connectors(num_blocks) if self.args.state_blocks is None else super().state_blocks(num_blocks)

    def setting(self, name: str, pair: Pair) -> Any:
        own = getattr(self.args, name)
        kept = {"stone_schedule": "constant", "stone_weight": 1 / len(pair.stones)}
        kept["state_weight"] = ours(pair)["state_weight"] if self.is_fitted(pair) else 0.0
        return kept[name] if own is None else own

    def draw(self, step: Step) -> dict[int, StoneDraw]:
        scale = self.setting("stone_weight", step.pair) * self.fade(step)
        if not scale:
            return {}
        weights = dict.fromkeys(self.connectors(len(step.pair.stones)), scale)
        shares = sampling_shares(weights, step.pair.stones.suffix_layers, by="cost")
        examples = step.losses.num_examples, step.first_example
        return draw_stones("sample", weights, shares, self.args.seed, step.index, *examples)
