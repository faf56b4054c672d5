"""The cost of one training step: `StepCost`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from ..connectors.attached import without_connectors
from ..trainer import BlockwiseDistillTrainer


@dataclass(frozen=True)
class StepCost:
    """The cost of one training step under one setting of `stepping_stones`.

    Attributes:
        name: The setting, in words.
        flops: FLOPs of forward and backward; the mean over draws where stones or examples are drawn.
        parameters: Bytes of all weights: teacher, student and connectors.
        gradients: Bytes of the gradients.
        optimizer: Bytes of AdamW's two moments.
        activations: Bytes of what the forward keeps for the backward; the largest draw where stones are sampled.
    """

    name: str
    flops: float
    parameters: int
    gradients: int
    optimizer: int
    activations: float

    @property
    def memory(self) -> float:
        """Bytes of all four together."""
        return self.parameters + self.gradients + self.optimizer + self.activations


def step_cost(
    name: str, trainer: BlockwiseDistillTrainer, flops: float, activations: float, trained: Iterable[nn.Module]
) -> StepCost:
    """The cost of a step of a trainer in which the student and some of the connectors train."""
    pair = trainer.pair
    own = [*without_connectors(dict(pair.student.named_parameters())).values()]
    connectors = [parameter for connector in trained for parameter in connector.parameters()]
    gradients = _bytes(parameter for parameter in (*own, *connectors) if parameter.requires_grad)
    weights = _bytes((*own, *pair.teacher.parameters(), *pair.all_connectors.parameters()))
    return StepCost(name, flops, weights, gradients, 2 * gradients, activations)


def extended(counts: Sequence[tuple[float, ...]], batch_size: int) -> tuple[float, ...]:
    """What is counted at a batch size, such as FLOPs and activations, of the counts at 1 and at 2."""
    # Some of it, as of position biases, is not per example.
    return tuple(one + (batch_size - 1) * (two - one) for one, two in zip(*counts, strict=True))


def _bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)
