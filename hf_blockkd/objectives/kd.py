"""The student by itself, and plain knowledge distillation."""

from __future__ import annotations

from ..losses.learners import LossWeights
from .base import Objective


class KnowledgeDistillation(Objective):
    """Task loss and divergence from the teacher's logits (Hinton et al., 2015, arXiv 1503.02531).

    With `divergence="dkd"` it is decoupled knowledge distillation, with `standardize_logits=True` that of standardised
    logits.
    """


class StudentAlone(Objective):
    """The task loss of the student; the teacher is not run."""

    student_weights = LossWeights(1.0, 0.0, 0.0)
    needs_teacher = False
    distils = False
