"""Block-wise logit distillation."""

from __future__ import annotations

from typing import Any

import torch
from transformers.utils import logging

from ..config_values import asks_for_stones
from ..losses.learners import Key, Learner, LossWeights
from ..pairing.pair import Pair
from ..training.step import Step
from .base import Objective
from .hint import state_error
from .sampling import StoneDraw, choose_stones, draw_stones, sampling_shares, stone_weights

logger = logging.get_logger(__name__)

PUBLISHED = {"stone_weight": 1.0, "state_weight": 0.0, "stone_schedule": "constant"}
OURS = {"stone_weight": 1 / 3, "state_weight": 5.0, "stone_schedule": "linear"}
"""By measurement (examples/benchmarks/README.md): defaults where connectors were fitted, and states are at hand."""
SMALL_STATE_WEIGHT = 0.5
"""Likewise for models without a head, whose vectors stand for less beside their states than logits do, and for students
that begin as layers of the teacher's at its whole width, whose states are near its own."""


def ours(pair: Pair) -> dict[str, Any]:
    """Our defaults for two models."""
    return {**OURS, "state_weight": SMALL_STATE_WEIGHT} if pair.is_copy or pair.embeddings is not None else OURS


class BlockKD(Objective):
    """Errors of states, or task loss and divergence on stepping stones (Yu et al., 2024, arXiv 2411.01547).

    Stones brought nothing next to errors of states in any measurement (examples/benchmarks/README.md), so that they run
    by default where states are not compared.

    With t the share of the run that is done, L_i the task loss and divergence of stone i with their weights, C_i s and
    t_i the connected state and the teacher's, position by position, all stones add

        (1 - t) (sum_i stone_weight L_i + sum_j state_weight |C_j s - t_j|^2 / |t_j|^2)

    to plain distillation, i the `stepping_stones` and j the `state_blocks`. Errors of states, the fall to 0 and a
    weight other than 1 are ours, `PUBLISHED` the paper's. States differ by orders of magnitude between models, and
    within a text (the first token of many language models): relative errors are alike, so that one weight does for all.
    After the last block those positions count that the teacher's head reads: to follow the others of a classifier,
    which nothing reads any more, cost copied layers of MiniLM a point (examples/benchmarks/README.md).
    """

    @property
    def stepping_stones(self) -> str | list[int]:
        return self.args.stepping_stones

    @property
    def stone_weighting(self) -> str:
        return self.args.stone_weighting

    @property
    def stone_sampling(self) -> str:
        return self.args.stone_sampling

    @property
    def needs_teacher_states(self) -> bool:
        return bool(self.args.state_weight) or (self.args.state_blocks is not None and self.args.state_weight != 0)

    def compares_states(self, pair: Pair) -> bool:
        return bool(self.setting("state_weight", pair))

    def weights_without_labels(self, pair: Pair) -> dict[str, float]:
        own = {"state_weight": self.setting("state_weight", pair), "cross_weight": self.args.cross_weight}
        return super().weights_without_labels(pair) | (own if pair.trained_stones else {})

    def connectors(self, num_blocks: int) -> list[int]:
        stones = [] if self.args.stone_weight == 0 else self.named(self.stepping_stones, num_blocks)
        return sorted({*stones, *self.state_blocks(num_blocks)})

    def state_blocks(self, num_blocks: int) -> list[int]:
        """Blocks after which states are compared, if they are at all."""
        args = self.args
        if args.state_weight == 0 or args.stores_teacher:
            return []
        # A weight of their own asks for states where there are no stones to go by.
        beside = "last_two" if self.stepping_stones == "none" and args.state_weight else self.stepping_stones
        return self.named(beside if args.state_blocks is None else args.state_blocks, num_blocks)

    def named(self, blocks: str | list[int], num_blocks: int) -> list[int]:
        """Indices that a word or a list stands for."""
        return choose_stones(blocks, num_blocks, self.args.stones_per_step)

    def stones(self, pair: Pair) -> list[int]:
        return self.stones_where(self.compares_states(pair), len(pair.block_map))

    def stones_where(self, compares_states: bool, num_blocks: int) -> list[int]:
        """Indices of the stones that run where states are compared, or where they are not."""
        args = self.args
        is_spared = compares_states and self.stepping_stones == "auto" and not asks_for_stones(args)
        return [] if args.stone_weight == 0 or is_spared else self.named(self.stepping_stones, num_blocks)

    def resolved(self, pair: Pair) -> dict[str, Any]:
        found = super().resolved(pair)
        names = ["state_weight", "stone_schedule", *["stone_weight"] * bool(self.stones(pair))]
        found |= {name: self.setting(name, pair) for name in names}
        return found | ({"state_blocks": self.state_blocks(len(pair.block_map))} if found["state_weight"] else {})

    def falling_weights(self, step: Step) -> dict[str, float]:
        found = self.resolved(step.pair)
        names = ("state_weight", "stone_weight") if found["stone_schedule"] == "linear" else ()
        return {name: found[name] * self.fade(step) for name in names if found.get(name)}

    def learners(self, step: Step) -> dict[Key, Learner]:
        return {
            i: step.stone(i, LossWeights(*[draw.weight] * 3), draw.examples, draw.rate)
            for i, draw in self.draw(step).items()
        }

    def terms(self, step: Step) -> dict[str, tuple[torch.Tensor, float]]:
        weight = self.setting("state_weight", step.pair) * self.fade(step)
        # Also of stones that are not drawn at this step: their states are there.
        named = "stepping_stones" if self.args.state_blocks is None else "state_blocks"
        blocks = self.trained(self.state_blocks(len(step.pair.block_map)), step.pair, named) if weight else []
        errors = [state_error(step, i, relative=True) for i in blocks]
        return {"state": (sum(errors), weight)} if errors else {}

    def is_fitted(self, pair: Pair) -> bool:
        """Whether connectors were fitted, and the teacher's states are at hand."""
        return bool(pair.fitted_stones) and not self.args.stores_teacher

    def setting(self, name: str, pair: Pair) -> Any:
        """A field of the configuration, or its default for this run."""
        own = getattr(self.args, name)
        is_ours = self.is_fitted(pair) or (name == "state_weight" and self.needs_teacher_states)
        return own if own is not None else (ours(pair) if is_ours else PUBLISHED)[name]

    def fade(self, step: Step) -> float:
        """What is left, at this step, of the weights of stones and states."""
        return 1 - step.index / step.num_steps if self.setting("stone_schedule", step.pair) == "linear" else 1.0

    def trained(self, asked: list[int], pair: Pair, named: str = "stepping_stones") -> list[int]:
        """Those of some connectors that train, which a field names."""
        # Asked for anew at every step, so that a callback may change it; they train where it named them at first.
        chosen = [i for i in asked if i in pair.trained_stones]
        if len(chosen) < len(asked):
            logger.warning_once(
                f"`{named}` is {getattr(self.args, named)!r} by now, but the connectors of stones "
                f"{sorted({*asked} - {*chosen})} do not train; name them when the trainer is made."
            )
        return chosen

    def draw(self, step: Step) -> dict[int, StoneDraw]:
        """The stones of this micro-batch, and what of it each of them gets."""
        args, stones = self.args, step.pair.stones
        chosen = self.trained(self.stones(step.pair), step.pair)
        scale = self.setting("stone_weight", step.pair) * self.fade(step)
        if not scale or not chosen:
            return {}
        weights = stone_weights(chosen, len(stones), self.stone_weighting)
        weights = {i: scale * weight for i, weight in weights.items()}
        return draw_stones(
            self.stepping_stones,
            weights,
            sampling_shares(weights, stones.suffix_layers, self.stone_sampling),
            seed=args.seed,
            step=step.index,
            num_examples=step.losses.num_examples,
            first_example=step.first_example,
            stones_per_step=args.stones_per_step,
            fraction=args.stone_fraction,
            every=args.stones_every,
        )
