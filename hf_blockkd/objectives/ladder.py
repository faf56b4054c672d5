"""Stepping stones as models that are kept: the ladder between student and teacher."""

from __future__ import annotations

from typing import Any

from ..pairing.pair import Pair
from .block_kd import BlockKD, ours


class Ladder(BlockKD):
    """Block-wise logit distillation for the sake of the stones, each of which is saved as a model of its own.

    As `BlockKD`, but for what makes good rungs: all stones take part to the end of the run, count alike, and together
    as much as the student; one of them runs at each step, drawn the more often the cheaper it is (`sampling_shares`),
    which leaves the sum over all an unbiased estimate. Save them with `BlockwiseDistillTrainer.save_stepping_stone`.
    All that the configuration says of stones and states goes before, but for `stone_weighting` and `stone_sampling`:
    `stepping_stones=[1]` trains for one rung, and a list, as in `BlockKD`, runs whole at every step.

    Under a frozen student it trains the connectors alone: a ladder of a student that was trained before, by whatever.
    """

    keeps_stones = True
    stone_weighting = "uniform"
    stone_sampling = "cost"

    @property
    def stepping_stones(self) -> str | list[int]:
        return "sample" if self.args.stepping_stones == "auto" else self.args.stepping_stones

    def setting(self, name: str, pair: Pair) -> Any:
        own = getattr(self.args, name)
        rungs = self.named(self.stepping_stones, len(pair.stones))
        kept = {"stone_schedule": "constant", "stone_weight": 1 / max(1, len(rungs))}
        kept["state_weight"] = ours(pair)["state_weight"] if self.is_fitted(pair) else 0.0
        return kept[name] if own is None else own
