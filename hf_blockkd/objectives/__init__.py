"""What a run trains on, one file an idea: `OBJECTIVES` and `make_objective`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..losses.learners import Key, Learner
from .base import Objective
from .block_kd import BlockKD
from .fcfd import FCFD
from .hint import FeatureHint, SimKD
from .kd import KnowledgeDistillation, StudentAlone
from .theseus import BertOfTheseus

if TYPE_CHECKING:
    from ..config import BlockwiseDistillConfig
    from ..training.step import Step

OBJECTIVES: dict[str, type[Objective]] = {
    "block_kd": BlockKD,
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

    @property
    def needs_teacher_states(self) -> bool:
        return any(part.needs_teacher_states for part in self.parts)

    def connectors(self, num_blocks: int) -> list[int]:
        return sorted({i for part in self.parts for i in part.connectors(num_blocks)})

    def learners(self, step: Step) -> dict[Key, Learner]:
        return {key: learner for part in self.parts for key, learner in part.learners(step).items()}

    def terms(self, step: Step) -> dict[str, tuple[torch.Tensor, float]]:
        return {name: term for part in self.parts for name, term in part.terms(step).items()}


def check_objective(name: str) -> list[str]:
    """The names in `"block_kd"` or in a sum such as `"block_kd+hint"`.

    Raises:
        ValueError: If one is unknown, named twice, or cannot be added to others.
    """
    names = name.split("+")
    known = ", ".join(map(repr, OBJECTIVES))
    unknown = [one for one in names if one not in OBJECTIVES]
    if unknown:
        raise ValueError(f"`objective` is {name!r}, but {unknown[0]!r} is unknown; choose one of {known}, or a sum.")
    if len(set(names)) < len(names) or {"hint", "fcfd"} <= set(names):
        raise ValueError(f"`objective` is {name!r}, which adds the same loss twice; name each once.")
    alone = [one for one in names if OBJECTIVES[one].stands_alone]
    if alone and len(names) > 1:
        raise ValueError(
            f"`objective` is {name!r}, but {alone[0]!r} replaces the losses of plain distillation, to which the others "
            "add; name it by itself."
        )
    return names


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
