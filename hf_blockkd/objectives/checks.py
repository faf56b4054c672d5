"""What an objective asks of models, data and configuration before it may train: `check_run`."""

from __future__ import annotations

from typing import Any

from ..config import BlockwiseDistillConfig
from ..data.captured import check_captured
from ..data.checks import check_label_column
from ..data.teacher_cache import check_cacheable
from ..pairing.pair import Pair
from ..training.generated import check_generates
from ..training.on_policy import check_on_policy
from ..training.options import check_has_labels, check_smoothing
from .base import Objective


def check_run(
    objective: Objective,
    args: BlockwiseDistillConfig,
    pair: Pair,
    train_dataset: Any,
    processing_class: Any,
    is_captured: bool,
) -> None:
    """Raise a `ValueError` if a run cannot be what it was asked to be; nothing is trained or written by then.

    Args:
        objective: What trains.
        args: The configuration.
        pair: The models.
        train_dataset: As the trainer gets it.
        processing_class: Likewise.
        is_captured: Whether what stands in for the teacher cannot run, and columns of the data say what it gave.
    """
    task, needs = pair.task, (objective.needs_teacher, objective.needs_teacher_states)
    check_label_column(train_dataset, task.num_example_classes)
    check_smoothing(args, task, task.problem_type)
    check_has_labels(args, task, objective.distils)
    check_cacheable(args, task, train_dataset, *needs)
    check_captured(args, pair, train_dataset, processing_class, *needs, is_absent=is_captured)
    check_generates(args, pair.student, objective.deploys_last_stone)
    check_on_policy(args, task, objective.distils)
