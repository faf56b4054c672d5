"""What a step takes under each objective: `objective_cost`."""

from __future__ import annotations

from transformers import PreTrainedModel

from ..config import BlockwiseDistillConfig
from ..objectives import OBJECTIVES
from .counting import assume_fitted, count_step, counting_trainer, prepare_batches
from .step_cost import StepCost, extended, step_cost

OTHERS = tuple(name for name in OBJECTIVES if name not in ("block_kd", "kd"))
"""Those that differ from plain KD in more than stepping stones."""
SAME_AT_EVERY_STEP = ("alone", "hint", "simkd")
DRAWS = 4
"""Steps, spread over a run, that are counted where each of them draws its hybrids."""


def objective_cost(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    args: BlockwiseDistillConfig,
    objective: str,
    batch_size: int,
    sequence_length: int | None,
) -> StepCost:
    """The cost of a step of an objective, in the mean of some steps spread over a run where these differ.

    Args:
        student: The student.
        teacher: The teacher.
        args: The configuration that will train, but for the objective.
        objective: One, or a sum.
        batch_size: Examples in a step.
        sequence_length: Tokens per example, for models of text.

    Raises:
        ValueError: If the models do not fit it.
    """
    with counting_trainer(student, teacher, args, objective=objective, cross_weight=0.0) as trainer:
        assume_fitted(trainer, args)
        batches = prepare_batches(trainer, batch_size, sequence_length)
        draws = 1 if objective in SAME_AT_EVERY_STEP else DRAWS
        costs = []
        for trainer.state.global_step in range(draws):
            trainer.state.max_steps = draws
            costs.append(extended([count_step(trainer, batch) for batch in batches], batch_size))
        flops, activations = zip(*costs, strict=True)
        return step_cost(objective, trainer, sum(flops) / draws, max(activations), trainer.pair.all_connectors)
