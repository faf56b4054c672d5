"""The methods that the sweep compares: each a few settings of one trainer."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from hf_blockkd import BlockwiseDistillTrainer
from hf_blockkd.config_values import OBJECTIVE_WEIGHTS
from hf_blockkd.losses.learners import Key, Learner
from hf_blockkd.objectives import OBJECTIVES, BlockKD
from hf_blockkd.objectives.block_kd import OURS
from hf_blockkd.training.connector_start import RIDGE
from hf_blockkd.training.step import Step


@dataclass(frozen=True)
class Method:
    """What a method changes of the recipe.

    Attributes:
        settings: Fields of the configuration that differ from the recipe's.
        length: Number of steps, relative to the recipe's.
        schedule: A part of the run, the stones in it, and the stones after it.
        search: Settings of which the best on the validation rows is taken, next to the learning rate.
        teacher_dtype: What the teacher is cast to.
        norm_before: Whether the states that enter a connector are normalised.
        ridge: The penalty in the fit of connectors.
    """

    settings: dict[str, Any]
    length: float = 1.0
    schedule: tuple[float, Any, Any] | None = None
    search: tuple[dict[str, Any], ...] = field(default=({},))
    teacher_dtype: torch.dtype | None = None
    norm_before: bool = False
    ridge: float = RIDGE


class StonesInTwoParts(TrainerCallback):
    """Some stones in the first part of a run, and others after."""

    def __init__(self, share: float, first: Any, then: Any) -> None:
        self.share, self.first, self.then = share, first, then

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        args.stepping_stones = self.first if state.global_step < self.share * state.max_steps else self.then


def normalise_before_connectors(trainer: BlockwiseDistillTrainer) -> None:
    """Put a layer norm, without weights of its own, before the map of every connector."""
    connectors = trainer.pair.connectors
    for index, connector in enumerate(connectors):
        norm = nn.LayerNorm(connector.in_features, elementwise_affine=False)
        connectors[index] = nn.Sequential(norm, connector)


class ReweightedStones(BlockKD):
    """Block-KD with other weights of a stone's task loss and divergence, by its number and that of all blocks."""

    def reweigh(self, index: int, num_blocks: int) -> tuple[float, float]:
        raise NotImplementedError

    def learners(self, step: Step) -> dict[Key, Learner]:
        learners = super().learners(step)
        for index, learner in learners.items():
            task, distill = self.reweigh(index, len(step.pair.stones))
            weights = learner.weights
            learner.weights = weights._replace(task=task * weights.task, distill=distill * weights.distill)
        return learners


class StonesWithoutLabels(ReweightedStones):
    """Stones that learn of the teacher alone, as FCFD's mixed paths do."""

    def reweigh(self, index: int, num_blocks: int) -> tuple[float, float]:
        return 0.0, 1.0


class EarlyStones(ReweightedStones):
    """Weights that halve from the first stone to the last, instead of from the last to the first."""

    def reweigh(self, index: int, num_blocks: int) -> tuple[float, float]:
        weight = 2.0 ** (num_blocks + 1 - 2 * index)
        return weight, weight


class ClippedStones(BlockKD):
    """Stones that send the states of no example a gradient larger than that of the batch's median."""

    def learners(self, step: Step) -> dict[Key, Learner]:
        states = step.states["S"]
        step.states["S"] = {end: with_clipped_gradient(own) for end, own in states.items()}
        learners = super().learners(step)
        step.states["S"] = states
        return learners


def with_clipped_gradient(states: torch.Tensor) -> torch.Tensor:
    """The same states (B, ...), whose gradient is scaled down for examples where its norm is above the median."""

    def clip(gradient: torch.Tensor) -> torch.Tensor:
        norms = gradient.flatten(1).norm(dim=1)
        factors = (norms.median() / norms.clamp(min=torch.finfo(norms.dtype).tiny)).clamp(max=1.0)
        return gradient * factors.reshape(-1, *[1] * (gradient.ndim - 1))

    same = states.view_as(states)
    if same.requires_grad:
        same.register_hook(clip)
    return same


CHOICES = {
    "block_kd_without_labels": StonesWithoutLabels,
    "block_kd_early": EarlyStones,
    "block_kd_clipped": ClippedStones,
}
OBJECTIVES |= CHOICES
OBJECTIVE_WEIGHTS |= dict.fromkeys(CHOICES, OBJECTIVE_WEIGHTS["block_kd"])

HINTS = ({"hint_weight": 1.0}, {"hint_weight": 0.1})
AS_PUBLISHED = {"connector_start": "random"}  # with which weights are as published, too
LAST_TWO = {"stepping_stones": "last_two"}

COMPARED: dict[str, dict[str, Any]] = {
    "alone": {"objective": "alone"},
    "KD": {"objective": "kd"},
    "the default": {},
    "the last two stones": LAST_TWO,
}
"""Settings that are compared where there is no recipe: scenes and sound."""


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
        "hint, fitted": Method({"objective": "hint"}),
        "states after all blocks": Method({"stepping_stones": "none", "state_blocks": "all"}),
        "the last stone, states after all blocks": Method({"stepping_stones": [num_blocks], "state_blocks": "all"}),
        # With connectors as they are made, by the published losses: what stones bring for their price.
        **{
            name: dataclasses.replace(method, settings={**AS_PUBLISHED, **method.settings})
            for name, method in prices(num_blocks).items()
        },
        **{f"KD, {longer:g} times the steps": Method({"objective": "kd"}, longer) for longer in (1.25, 1.6, 2.0)},
        "KD, temperature 1": Method({"objective": "kd", "temperature": 1.0}),
        "KD, temperature 2": Method({"objective": "kd", "temperature": 2.0}),
        **{
            name: dataclasses.replace(method, settings={**LAST_TWO, **method.settings})
            for name, method in stone_choices(num_blocks).items()
        },
    }


def stone_choices(num_blocks: int) -> dict[str, Method]:
    """Name -> what is changed of a run with the last two stones."""
    return {
        "the last two stones": Method({}),
        "a sampled stone": Method({"stepping_stones": "sample"}),
        "a sampled stone at every 4th step": Method({"stepping_stones": "sample", "stones_every": 4}),
        "without states": Method({"state_weight": 0.0}),
        "all stones, without states": Method({"stepping_stones": "all", "state_weight": 0.0}),
        "all stones": Method({"stepping_stones": "all"}),
        "last stone": Method({"stepping_stones": [num_blocks]}),
        "random connectors": Method({**AS_PUBLISHED, **OURS}),
        "DKD on stones": Method({"divergence": "dkd"}),
        "standardised logits": Method({"standardize_logits": True}),
        "no labels for stones": Method({"objective": "block_kd_without_labels"}),
        "uniform weights": Method({"stepping_stones": "all", "stone_weighting": "uniform"}),
        "weights that fall": Method({"stepping_stones": "all", "objective": "block_kd_early"}),
        "stone weight 1/10": Method({"stone_weight": 1 / 10}),
        "stone weight 1": Method({"stone_weight": 1.0}),
        "stone weight 3": Method({"stone_weight": 3.0}),
        "constant weights": Method({"stone_schedule": "constant"}),
        "stones' gradients clipped": Method({"objective": "block_kd_clipped"}),
        "stones in the first half": Method({}, schedule=(0.5, "last_two", "none")),
        "stones in the second half": Method({}, schedule=(0.5, "none", "last_two")),
        "cross term": Method({"cross_weight": 0.5}),
        "MLP connectors": Method({"connector": "mlp"}),
        "norm before connectors": Method({}, norm_before=True),
        "teacher in bfloat16": Method({}, teacher_dtype=torch.bfloat16),
        **{f"state weight {weight:g}": Method({"state_weight": weight}) for weight in (1.0, 10.0)},
        **{f"ridge {ridge:g}": Method({}, ridge=ridge) for ridge in (0.001, 0.1, 3.0)},
        "half the blocks": Method({"num_blocks": max(1, num_blocks // 2)}),
        "temperature 1": Method({"temperature": 1.0}),
        "temperature 2": Method({"temperature": 2.0}),
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
        "Block-KD, then shared": Method({"stepping_stones": "all"}, schedule=(0.5, "all", "share")),
        "Block-KD, then KD": Method({"stepping_stones": "all"}, schedule=(1 / 3, "all", "none")),
    }
