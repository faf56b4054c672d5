"""The methods that the sweep compares: each a few settings of one trainer."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainerCallback

from hf_blockkd.learners import Key, Learner
from hf_blockkd.objectives import OBJECTIVES, BlockKD
from hf_blockkd.step import Step


@dataclass(frozen=True)
class Method:
    """Settings of a run, the length of its training relative to the recipe's, and a schedule of its stones.

    Attributes:
        settings: Fields of the configuration that differ from the recipe's.
        length: Number of steps, relative to the recipe's.
        schedule: A part of the run, and the stones after it.
        search: Settings of which the best on the validation rows is taken, next to the learning rate.
    """

    settings: dict[str, Any]
    length: float = 1.0
    schedule: tuple[float, str] | None = None
    search: tuple[dict[str, Any], ...] = field(default=({},))


class ManyEarlyFewLate(TrainerCallback):
    """All stones in the first part of a run, and other ones after."""

    def __init__(self, share: float, later: str) -> None:
        self.share, self.later = share, later

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        args.stepping_stones = "all" if state.global_step < self.share * state.max_steps else self.later


class StonesWithoutLabels(BlockKD):
    """Block-KD whose stones learn of the teacher alone, as FCFD's mixed paths do."""

    def learners(self, step: Step) -> dict[Key, Learner]:
        learners = super().learners(step)
        for learner in learners.values():
            learner.weights = learner.weights._replace(task=0.0)
        return learners


OBJECTIVES["block_kd_without_labels"] = StonesWithoutLabels

HINTS = ({"hint_weight": 1.0}, {"hint_weight": 0.1})
AS_PUBLISHED = {"connector_start": "random", "state_weight": 0.0}


def methods(num_blocks: int) -> dict[str, Method]:
    """Name -> method, for a cut into so many blocks."""
    return {
        "alone": Method({"objective": "alone"}),
        "KD": Method({"objective": "kd"}),
        "DKD": Method({"objective": "kd", "divergence": "dkd"}),
        "standardised KD": Method({"objective": "kd", "standardize_logits": True}),
        "hint": Method({"objective": "hint", **AS_PUBLISHED}, search=HINTS),
        "SimKD": Method({"objective": "simkd", **AS_PUBLISHED}),
        "FCFD": Method({"objective": "fcfd", **AS_PUBLISHED}),
        "Theseus": Method({"objective": "theseus", **AS_PUBLISHED}),
        "the default": Method({}),
        "the default, sampled": Method({"stepping_stones": "sample"}),
        # What the default is made of.
        "hint, fitted": Method({"objective": "hint"}),
        "without states": Method({"state_weight": 0.0}),
        "all stones, without states": Method({"stepping_stones": "all", "state_weight": 0.0}),
        "all stones": Method({"stepping_stones": "all"}),
        "last stone": Method({"stepping_stones": [num_blocks]}),
        "random connectors": Method({"connector_start": "random"}),
        # What stones bring for their price; with connectors as they are made, by the published losses.
        **{
            name: dataclasses.replace(method, settings={**AS_PUBLISHED, **method.settings})
            for name, method in prices(num_blocks).items()
        },
        "KD, 1.25 times the steps": Method({"objective": "kd"}, length=1.25),
        "KD, 2 times the steps": Method({"objective": "kd"}, length=2.0),
        # What matters.
        "DKD on stones": Method({"divergence": "dkd"}),
        "standardised logits": Method({"standardize_logits": True}),
        "no labels for stones": Method({"objective": "block_kd_without_labels"}),
        "uniform weights": Method({"stepping_stones": "all", "stone_weighting": "uniform"}),
        "cross term": Method({"cross_weight": 0.5}),
        "MLP connectors": Method({"connector": "mlp"}),
        "state weight 1": Method({"state_weight": 1.0}),
        "state weight 10": Method({"state_weight": 10.0}),
        "half the blocks": Method({"num_blocks": max(1, num_blocks // 2)}),
        "temperature 1": Method({"temperature": 1.0}),
        "temperature 2": Method({"temperature": 2.0}),
        "KD, temperature 1": Method({"objective": "kd", "temperature": 1.0}),
        "KD, temperature 2": Method({"objective": "kd", "temperature": 2.0}),
    }


def prices(num_blocks: int) -> dict[str, Method]:
    """Name -> which stones run, and how often."""
    return {
        "Block-KD": Method({"stepping_stones": "all"}),
        "Block-KD, last two stones": Method({"stepping_stones": "last_two"}),
        "Block-KD, last stone": Method({"stepping_stones": [num_blocks]}),
        "Block-KD, sampled": Method({"stepping_stones": "sample"}),
        "Block-KD, sampled uniformly": Method({"stepping_stones": "sample", "stone_sampling": "uniform"}),
        "Block-KD, shared": Method({"stepping_stones": "share"}),
        "Block-KD, shared by cost": Method({"stepping_stones": "share", "stone_sampling": "cost"}),
        "Block-KD, a quarter of the examples": Method({"stepping_stones": "all", "stone_fraction": 0.25}),
        "Block-KD, every 4th step": Method({"stepping_stones": "all", "stones_every": 4}),
        "Block-KD, then shared": Method({"stepping_stones": "all"}, schedule=(0.5, "share")),
        "Block-KD, then KD": Method({"stepping_stones": "all"}, schedule=(1 / 3, "none")),
    }
