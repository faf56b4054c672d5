"""Function-consistent feature distillation."""

from __future__ import annotations

import random

from ..losses.learners import Key, Learner, LossWeights
from ..training.step import Step
from .hint import FeatureHint

PATHS_PER_STEP = 2
"""Mixed paths in each step, as in the authors' settings."""


class FCFD(FeatureHint):
    """States have to look like the teacher's and to work like them (Liu et al., ICLR 2023, arXiv 2304.11832).

    To plain distillation and hints it adds the divergence of mixed paths, which begin in one model and end in the
    other. Two of them are drawn at each step; they have no task loss.
    """

    needs_paths = True

    def learners(self, step: Step) -> dict[Key, Learner]:
        num_blocks = len(step.pair.block_map)
        paths = [first * i + second * (num_blocks - i) for first, second in ("ST", "TS") for i in range(1, num_blocks)]
        # The same on every rank, in every micro-batch, and after a resume.
        drawn = random.Random(f"{self.args.seed}-{step.index}").sample(paths, min(PATHS_PER_STEP, len(paths)))
        return {f"path_{path}": step.path(path, LossWeights(0.0, 1.0, 0.0)) for path in drawn}
