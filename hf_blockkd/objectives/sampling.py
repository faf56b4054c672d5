"""Which stepping stones a step runs, on which examples, and how much each counts: `draw_stones`."""

from __future__ import annotations

import itertools
import math
import random
from bisect import bisect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..config_values import STONES

_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


def choose_stones(stepping_stones: str | list[int], num_blocks: int, stones_per_step: int = 1) -> list[int]:
    """Indices of the stones that ever take part in training.

    Args:
        stepping_stones: `"last_two"` (or the only one), `"auto"`, which runs no others, `"all"`, `"none"`,
            `"sample"`, `"share"` or a list of indices.
        num_blocks: n.
        stones_per_step: How many `"sample"` draws.

    Raises:
        ValueError: If an index is not from 1 to n, or a sample is larger than n.
    """
    if stepping_stones == "none":
        return []
    if stepping_stones == "sample" and stones_per_step > num_blocks:
        raise ValueError(f"`stones_per_step` is {stones_per_step}, but there are only {num_blocks} stepping stones.")
    if stepping_stones in ("last_two", "auto"):
        return list(range(max(1, num_blocks - 1), num_blocks + 1))
    if stepping_stones in ("all", "sample", "share"):
        return list(range(1, num_blocks + 1))
    if isinstance(stepping_stones, str):
        raise ValueError(
            f"`stepping_stones` is {stepping_stones!r}; choose {', '.join(map(repr, STONES))} or a list of indices."
        )
    unknown = [index for index in stepping_stones if not 1 <= index <= num_blocks]
    if unknown:
        raise ValueError(
            f"`stepping_stones` names stone {unknown[0]}, but {num_blocks} blocks make stones 1 to {num_blocks}."
        )
    return list(stepping_stones)


def stone_weights(stones: Collection[int], num_blocks: int, weighting: str = "halving") -> dict[int, float]:
    """Weight of each stepping stone in the three sums.

    Args:
        stones: Indices of the stones, from 1 to `num_blocks`.
        num_blocks: n.
        weighting: `"halving"` is 2^-(n-i): the nearer a stone is to the student, the more it counts (Yu et al., 2024,
            arXiv 2411.01547); `"uniform"` is 1.

    Raises:
        ValueError: If `weighting` is neither.

    Example:
        ```python
        >>> from hf_blockkd.objectives.sampling import stone_weights
        >>> stone_weights([1, 2, 3], num_blocks=3)
        {1: 0.25, 2: 0.5, 3: 1.0}

        ```
    """
    if weighting not in ("halving", "uniform"):
        raise ValueError(f"Unknown stone weighting {weighting!r}; choose 'halving' or 'uniform'.")
    return {i: 2.0 ** -(num_blocks - i) if weighting == "halving" else 1.0 for i in stones}


@dataclass(frozen=True)
class StoneDraw:
    """A stone's part in a step.

    Attributes:
        weight: What its losses count. Its mean over draws, with the examples it leaves out counted as 0, is that of
            `stone_weights`, so the gradient's is that of all stones on all examples.
        examples: Rising indices of the examples that it runs on, `None` for all.
        rate: Share of all examples that it runs on, in the mean over the steps that draw it.
    """

    weight: float
    examples: torch.Tensor | None = None
    rate: float = 1.0


def sampling_shares(weights: Mapping[int, float], layers: Mapping[int, int], by: str) -> dict[int, float]:
    """How often each stone is drawn, as shares that sum to 1.

    Args:
        weights: Weight of each stone, from `stone_weights`.
        layers: Number of teacher layers that each stone runs.
        by: `"uniform"`; `"weight"`: a stone is drawn as often as it counts, so that every draw counts the same; or
            `"cost"`: in proportion to `weight / sqrt(cost)`, which for losses of equal spread has the least variance at
            a given price (Neyman's allocation). The price is one unit per layer and one for connector and head.

    Example:
        ```python
        >>> from hf_blockkd.objectives.sampling import sampling_shares
        >>> sampling_shares({1: 0.5, 2: 1.5}, {1: 3, 2: 0}, by="weight")
        {1: 0.25, 2: 0.75}

        ```
    """
    raw = {
        i: 1.0 if by == "uniform" else weight if by == "weight" else weight / math.sqrt(1 + layers[i])
        for i, weight in weights.items()
    }
    total = sum(raw.values())
    return {i: share / total for i, share in raw.items()}


def draw_stones(
    mode: str | list[int],
    weights: Mapping[int, float],
    shares: Mapping[int, float],
    seed: int,
    step: int,
    num_examples: int,
    first_example: int = 0,
    stones_per_step: int = 1,
    fraction: float = 1.0,
    every: int = 1,
) -> dict[int, StoneDraw]:
    """Draw the stones of one micro-batch.

    The draw depends on the seed, the step, and the place of an example in the whole batch of that step. So it is the
    same after a resume, on every rank, and however the batch is split into micro-batches.

    Args:
        mode: `stepping_stones` of the configuration: `"sample"` draws `stones_per_step` for all examples; `"share"`
            draws one for each example; all others run every stone of `weights`.
        weights: Weight of each stone that can be drawn, from `stone_weights`.
        shares: From `sampling_shares`.
        seed: Of the run.
        step: Optimizer steps done so far.
        num_examples: Examples in the micro-batch.
        first_example: Place of its first example in the step's whole batch.
        stones_per_step: Number of draws for `"sample"`.
        fraction: Share of the examples on which stones run at all.
        every: Stones run at one step in so many.

    Returns:
        Stone -> its part; a stone that is absent does not run.

    Example:
        ```python
        >>> from hf_blockkd.objectives.sampling import draw_stones
        >>> drawn = draw_stones("share", {1: 0.5, 2: 1.5}, {1: 0.25, 2: 0.75}, seed=0, step=7, num_examples=8)
        >>> {i: (draw.weight, draw.examples.tolist()) for i, draw in drawn.items()}
        {1: (2.0, [0, 3]), 2: (2.0, [1, 2, 4, 5, 6, 7])}

        ```
    """
    if not weights or step % every:
        return {}
    chance = random.Random(f"{seed}-{step}")
    order = chance.sample(sorted(weights), len(weights))
    if mode == "sample":
        odds = inclusion_odds(shares, stones_per_step)
        edges = list(itertools.accumulate(odds[i] for i in order))[:-1]
        # Points at a distance of 1 hit no stone twice, and each as often as its odds.
        start = chance.random()
        drawn = {order[bisect(edges, start + draw)] for draw in range(stones_per_step)}
        weights = {i: weights[i] / odds[i] for i in drawn}
    start = chance.random()
    # Points in [0, 1), each of them uniform by itself, that spread out evenly together.
    places = range(first_example, first_example + num_examples)
    points = [(start + place * _GOLDEN_RATIO) % 1 / fraction for place in places]
    scale = every / fraction
    if mode == "share":
        edges = list(itertools.accumulate(shares[i] for i in order))[:-1]
        stones = [order[bisect(edges, point)] if point < 1 else None for point in points]
        return {
            i: StoneDraw(weights[i] * scale / shares[i], _where(i, stones), shares[i] * fraction)
            for i in sorted(weights)
        }
    examples = None if fraction == 1 else _where(True, [point < 1 for point in points])
    return {i: StoneDraw(weights[i] * scale, examples, fraction) for i in sorted(weights)}


def inclusion_odds(shares: Mapping[int, float], draws: int) -> dict[int, float]:
    """Probability of each stone to be among `draws` different ones: in proportion to its share, but at most 1."""
    certain: set[int] = set()
    while True:
        rest = sum(share for i, share in shares.items() if i not in certain)
        odds = {i: 1.0 if i in certain else share * (draws - len(certain)) / rest for i, share in shares.items()}
        more = {i for i, one in odds.items() if one >= 1} - certain
        if not more:
            return odds
        certain |= more


def _where(value: Any, values: Sequence[Any]) -> torch.Tensor:
    return torch.tensor([index for index, other in enumerate(values) if other == value], dtype=torch.long)
