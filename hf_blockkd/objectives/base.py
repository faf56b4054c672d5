"""What an objective has to say: `Objective`."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from ..config import BlockwiseDistillConfig
from ..losses.learners import FULL_WEIGHTS, Key, Learner, LossWeights
from ..pairing.pair import Pair
from ..training.step import Step


class Objective:
    """What a step trains besides the student itself: hybrids (`learners`), and losses of another kind (`terms`).

    The defaults are those of plain knowledge distillation: the student's task loss and its divergence from the teacher.

    Args:
        args: The configuration.

    Attributes:
        student_weights: What the student's own losses count.
        needs_teacher: Whether the teacher's clean pass is run at all.
        needs_teacher_states: Whether the configuration asks for its states at the ends of its blocks.
        needs_paths: Whether hybrids may go from the teacher back into the student.
        distils: Whether rows without a label teach anything.
        deploys_last_stone: Whether what it trains is the student's body under the teacher's head.
        keeps_stones: Whether stones are what a run is for, and connectors worth training under a frozen student.
    """

    student_weights: ClassVar[LossWeights] = FULL_WEIGHTS
    needs_teacher: ClassVar[bool] = True
    needs_teacher_states: ClassVar[bool] = False
    needs_paths: ClassVar[bool] = False
    distils: ClassVar[bool] = True
    deploys_last_stone: ClassVar[bool] = False
    keeps_stones: ClassVar[bool] = False

    def __init__(self, args: BlockwiseDistillConfig) -> None:
        self.args = args

    def compares_states(self, pair: Pair) -> bool:
        """Whether the teacher's states at the ends of its blocks are looked at, connectors being fitted or not."""
        return self.needs_teacher_states

    def weights_without_labels(self, pair: Pair) -> dict[str, float]:
        """Fields of the configuration that say what rows without a label learn from, as they are for this run."""
        return {"distill_weight": self.args.distill_weight} if self.distils else {}

    def connectors(self, num_blocks: int) -> list[int]:
        """Indices of the connectors that ever train, rising, of 1 to `num_blocks`."""
        return []

    def stones(self, pair: Pair) -> list[int]:
        """Indices of the connectors behind which the teacher's layers run in training, as far as is known."""
        return self.connectors(len(pair.block_map))

    def resolved(self, pair: Pair) -> dict[str, Any]:
        """Fields of the configuration whose defaults depend on the run, as they are for this one."""
        return {"stepping_stones": self.stones(pair) or "none"} if self.args.stepping_stones == "auto" else {}

    def falling_weights(self, step: Step) -> dict[str, float]:
        """Fields of the configuration that fall over the run, as they are at a step."""
        return {}

    def learners(self, step: Step) -> dict[Key, Learner]:
        """The hybrids of a step, run; called after the clean passes of both models."""
        return {}

    def terms(self, step: Step) -> dict[str, tuple[torch.Tensor, float]]:
        """Losses of another kind: name -> (scalar, weight)."""
        return {}
