"""The weighted sum of the losses of all that learn in a step: the student, stepping stones, other hybrids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .rows import RowLosses
from .top_k import TopK

STUDENT = "student"
"""Key of the student among the learners; stepping stones go by their index, other hybrids by the name in the log."""

Key = int | str


class LossWeights(NamedTuple):
    """What the three losses count: of a step, alpha, beta and gamma; of a learner, relative to those."""

    task: float
    distill: float
    cross: float


PLAIN_WEIGHTS = LossWeights(1.0, 1.0, 0.0)
"""alpha, beta and gamma by default."""
FULL_WEIGHTS = LossWeights(1.0, 1.0, 1.0)
"""Those of a learner that counts as much as the student in plain distillation."""


class LearnerTerms(NamedTuple):
    """The three losses of one learner, as scalars."""

    task: torch.Tensor
    distill: torch.Tensor
    cross: torch.Tensor


@dataclass
class Learner:
    """One of the models, or hybrids of both, that a step trains.

    Attributes:
        rows: Rows of its logits, from `RowLosses.rows`, or of the states that enter its head where that waits.
        weights: What its losses count, relative to those of the student in plain distillation.
        subset: Where it ran on some of the examples only, the rising indices of its rows among those of the batch.
        rate: Share of the examples that it runs on, in the mean over steps: its logged losses are divided by it.
        student_head: Whether its head is the student's, which trains, or the teacher's.
        task: Its task loss, where that is not what `RowLosses.task` makes of its rows.
    """

    rows: torch.Tensor
    weights: LossWeights = FULL_WEIGHTS
    subset: torch.Tensor | None = None
    rate: float = 1.0
    student_head: bool = False
    task: torch.Tensor | None = None


Learners = Mapping[Key, Learner]


@dataclass
class DistillationLoss:
    """The loss of a step and its parts, all scalars.

    Attributes:
        total: `alpha * task + beta * distill + gamma * cross`, and what an objective adds in `terms`.
        task: Weighted sum of the learners' task losses.
        distill: Weighted sum of their divergences from the teacher.
        cross: Weighted sum of their divergences from the mean logits of all hybrids; 0 where gamma is, or without any.
        learners: The losses of each hybrid, unweighted.
        terms: What an objective adds, by name, unweighted.
    """

    total: torch.Tensor
    task: torch.Tensor
    distill: torch.Tensor
    cross: torch.Tensor
    learners: dict[Key, LearnerTerms]
    terms: dict[str, torch.Tensor]

    def parts(self, learners: Learners) -> dict[str, torch.Tensor]:
        """All parts by the names under which they are logged; those of hybrids per example that they ran on.

        Args:
            learners: What they are the losses of.
        """
        parts = {"loss_task": self.task, "loss_distill": self.distill, "loss_cross": self.cross}
        parts |= {f"loss_{name}": value for name, value in self.terms.items()}
        for key, terms in self.learners.items():
            name = f"stone_{key}" if isinstance(key, int) else key
            parts[f"{name}/task"] = terms.task / learners[key].rate
            parts[f"{name}/distill"] = terms.distill / learners[key].rate
        return parts


def block_kd_learners(
    student: torch.Tensor,
    stones: Mapping[int, torch.Tensor],
    weights: Mapping[int, float],
    subsets: Mapping[int, torch.Tensor] | None = None,
    rates: Mapping[int, float] | None = None,
) -> dict[Key, Learner]:
    """The learners of block-wise logit distillation: the student, and stones that count as much as their weight.

    Args:
        student: Rows of the student.
        stones: Rows of each stone, by index.
        weights: Weight of each, at least for the indices in `stones`.
        subsets: For stones that ran on some of the examples only, their `Learner.subset`.
        rates: Likewise, their `Learner.rate`.
    """
    learners: dict[Key, Learner] = {STUDENT: Learner(student, student_head=True)}
    for i, rows in stones.items():
        share = LossWeights(*[weights[i]] * 3)
        learners[i] = Learner(rows, share, (subsets or {}).get(i), (rates or {}).get(i, 1.0))
    return learners


def distillation_loss(
    losses: RowLosses,
    learners: Learners,
    teacher: torch.Tensor | TopK | None,
    weights: LossWeights = PLAIN_WEIGHTS,
) -> DistillationLoss:
    """The three-part objective of block-wise logit distillation (Yu et al., 2024, arXiv 2411.01547), from logits.

    With Y_S, Y_T, Y_i the logits of student, teacher and stone i, Y_ens the mean of all Y_i, and w_i its weight:

        L_task    = CE(Y_S, y)     + sum_i w_i CE(Y_i, y)
        L_distill = d(Y_S, Y_T)    + sum_i w_i d(Y_i, Y_T)
        L_cross   = d(Y_S, Y_ens)  + sum_i w_i d(Y_i, Y_ens)

    Targets are detached. With the student as the only learner this is plain knowledge distillation.

    Args:
        losses: The labels, the divergence and its options.
        learners: From `block_kd_learners`, or those of another objective.
        teacher: Rows of the teacher's clean logits, or the likeliest classes of each ([`TopK`]); `None` leaves out all
            distillation.
        weights: alpha, beta and gamma; with a gamma of 0 the cross term is not computed.

    Example:
        ```python
        >>> import torch
        >>> from hf_blockkd.losses.learners import block_kd_learners, distillation_loss
        >>> from hf_blockkd.losses.rows import RowLosses
        >>> rows = torch.zeros(2, 4)
        >>> losses = RowLosses("single_label_classification", torch.tensor([0, 1]))
        >>> loss = distillation_loss(losses, block_kd_learners(rows, {1: rows}, {1: 1.0}), rows)
        >>> round(loss.task.item(), 4), loss.distill.item()  # twice ln 4: once the student's, once the stone's
        (2.7726, 0.0)

        ```
    """
    hybrids = [learner.rows.float() for key, learner in learners.items() if key != STUDENT]
    ensemble = torch.stack(hybrids).mean(0) if weights.cross and hybrids else None
    terms = {}
    for key, learner in learners.items():
        own, target = losses, teacher
        if learner.subset is not None:
            own, target = losses.part(learner.subset), None if teacher is None else teacher[learner.subset]
        terms[key] = learner_terms(own, learner.rows, target, ensemble, learner.task)
    return weighted_sum(learners, terms, weights)


def learner_terms(
    losses: RowLosses,
    rows: torch.Tensor,
    teacher: torch.Tensor | TopK | None,
    ensemble: torch.Tensor | None,
    task: torch.Tensor | None = None,
) -> LearnerTerms:
    """The losses of one learner from its logits; those without a target are 0, and its own task loss goes before."""
    task = losses.task(rows) if task is None else task
    zero = torch.zeros_like(task)
    distill, cross = (zero if target is None else losses.distill(rows, target) for target in (teacher, ensemble))
    return LearnerTerms(task, distill, cross)


def weighted_sum(learners: Learners, terms: Mapping[Key, LearnerTerms], weights: LossWeights) -> DistillationLoss:
    """Put the learners' terms together."""
    parts = LearnerTerms(
        *(
            sum(learner.weights[part] * terms[key][part] for key, learner in learners.items())
            for part in range(len(LearnerTerms._fields))
        )
    )
    return DistillationLoss(
        total=sum(weight * part for weight, part in zip(weights, parts, strict=True)),
        **parts._asdict(),
        learners={key: own for key, own in terms.items() if key != STUDENT},
        terms={},
    )
