"""Random replacement of the teacher's blocks by the student's."""

from __future__ import annotations

import random

from ..losses.learners import Key, Learner, LossWeights
from ..training.step import Step
from .base import Objective

FIRST_RATE = 0.3
"""Share of blocks replaced in the first step (the basic replacing rate b of the authors' scheduler)."""
REPLACING_SHARE = 0.5
"""Part of the run over which the rate rises to 1; what comes after is their fine-tuning of the successor."""


class BertOfTheseus(Objective):
    """Task loss of a model whose blocks are the student's or the teacher's by chance.

    BERT-of-Theseus (Xu et al., 2020, arXiv 2002.02925). The chance of a block to be the student's rises linearly to 1,
    so that the student is left at the end. Made for students of `make_student`, of the teacher's width and with its
    embeddings and head.
    """

    student_weights = LossWeights(0.0, 0.0, 0.0)
    needs_teacher_states = True
    needs_paths = True
    distils = False

    def connectors(self, num_blocks: int) -> list[int]:
        return list(range(1, num_blocks + 1))

    def learners(self, step: Step) -> dict[Key, Learner]:
        rate = replacing_rate(step.index, step.num_steps)
        chance = random.Random(f"{self.args.seed}-{step.index}")
        path = ""
        while "S" not in path:  # the teacher alone would not learn
            path = "".join("S" if chance.random() < rate else "T" for _ in step.pair.block_map.student)
        return {"path": step.path(path, LossWeights(1.0, 0.0, 0.0))}


def replacing_rate(index: int, num_steps: int) -> float:
    """Chance of each block to be the student's at optimizer step `index`.

    Example:
        ```python
        >>> from hf_blockkd.objectives.theseus import replacing_rate
        >>> [round(replacing_rate(index, 100), 2) for index in (0, 25, 50, 99)]
        [0.3, 0.65, 1.0, 1.0]

        ```
    """
    return min(1.0, FIRST_RATE + (1 - FIRST_RATE) * index / max(1, REPLACING_SHARE * num_steps))
