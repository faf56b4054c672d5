"""What a run trains on, one file an idea: `OBJECTIVES` and `make_objective`."""

from __future__ import annotations

from typing import Any

import torch

from ..config import BlockwiseDistillConfig
from ..config_values import check_objective
from ..losses.learners import Key, Learner
from ..pairing.pair import Pair
from ..training.step import Step
from .base import Objective
from .block_kd import BlockKD
from .fcfd import FCFD
from .hint import FeatureHint, SimKD
from .kd import KnowledgeDistillation, StudentAlone
from .ladder import Ladder
from .theseus import BertOfTheseus

OBJECTIVES: dict[str, type[Objective]] = {
    "block_kd": BlockKD,
    "ladder": Ladder,
    "kd": KnowledgeDistillation,
    "alone": StudentAlone,
    "hint": FeatureHint,
    "simkd": SimKD,
    "fcfd": FCFD,
    "theseus": BertOfTheseus,
}


class SumOfObjectives(Objective):
    """What several objectives add to plain distillation, together."""

    def __init__(self, args: BlockwiseDistillConfig, parts: list[Objective]) -> None:
        super().__init__(args)
        self.parts = parts
        self.needs_paths = any(part.needs_paths for part in parts)
        self.distils = any(part.distils for part in parts)
        self.keeps_stones = any(part.keeps_stones for part in parts)

    @property
    def needs_teacher_states(self) -> bool:
        return any(part.needs_teacher_states for part in self.parts)

    def compares_states(self, pair: Pair) -> bool:
        return any(part.compares_states(pair) for part in self.parts)

    def weights_without_labels(self, pair: Pair) -> dict[str, float]:
        return {name: weight for part in self.parts for name, weight in part.weights_without_labels(pair).items()}

    def connectors(self, num_blocks: int) -> list[int]:
        return sorted({i for part in self.parts for i in part.connectors(num_blocks)})

    def stones(self, pair: Pair) -> list[int]:
        return sorted({i for part in self.parts for i in part.stones(pair)})

    def resolved(self, pair: Pair) -> dict[str, Any]:
        parts = {name: value for part in self.parts for name, value in part.resolved(pair).items()}
        return parts | super().resolved(pair)

    def falling_weights(self, step: Step) -> dict[str, float]:
        return {name: weight for part in self.parts for name, weight in part.falling_weights(step).items()}

    def learners(self, step: Step) -> dict[Key, Learner]:
        return {key: learner for part in self.parts for key, learner in part.learners(step).items()}

    def terms(self, step: Step) -> dict[str, tuple[torch.Tensor, float]]:
        return {name: term for part in self.parts for name, term in part.terms(step).items()}


def make_objective(args: BlockwiseDistillConfig) -> Objective:
    """The objective that a configuration names.

    Example:
        ```python
        >>> from hf_blockkd import BlockwiseDistillConfig
        >>> from hf_blockkd.objectives import make_objective
        >>> make_objective(BlockwiseDistillConfig("student", objective="block_kd+hint")).connectors(3)
        [1, 2, 3]

        ```
    """
    parts = [OBJECTIVES[name](args) for name in check_objective(args.objective)]
    return parts[0] if len(parts) == 1 else SumOfObjectives(args, parts)
