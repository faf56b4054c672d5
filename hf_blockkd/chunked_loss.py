"""The Block-KD objective at large vocabularies: the logits of a few rows at a time, never those of all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from .heads import Head
from .losses import BlockKDLoss, LearnerTerms, LossWeights, RowLosses, learner_terms, weighted_sum
from .top_k import TopK

Rows = slice | torch.Tensor

CHUNK_ELEMENTS = {"cpu": 2**22}
"""Logits of one model that a chunk holds by default, by device: 16 MiB in float32, which a CPU's allocator reuses."""
OTHER_CHUNK_ELEMENTS = 2**25
"""The same for all other devices, 128 MiB, where small chunks would leave much of the time to launching kernels."""


def default_chunk_size(vocabulary: int, device: torch.device | str = "cpu") -> int:
    """Rows in a chunk: as many as that many logits allow, but enough to keep the head's product efficient."""
    return max(64, CHUNK_ELEMENTS.get(torch.device(device).type, OTHER_CHUNK_ELEMENTS) // vocabulary)


def chunked_block_kd_loss(
    losses: RowLosses,
    student: torch.Tensor,
    teacher: torch.Tensor | TopK,
    stones: Mapping[int, torch.Tensor],
    weights: Mapping[int, float],
    task_weight: float = 1.0,
    distill_weight: float = 1.0,
    cross_weight: float = 0.0,
    subsets: Mapping[int, torch.Tensor] | None = None,
    *,
    student_head: Head,
    teacher_head: Head,
    chunk_size: int,
) -> BlockKDLoss:
    """`block_kd_loss` of final states instead of logits, with the heads applied to `chunk_size` rows at a time.

    One learner's logits of one chunk are all that lives at once, beside the teacher's. The gradients of the states
    and of the student's head are computed along with the loss, chunk by chunk, and kept until backward: no logits are
    stored, and none computed twice (only a cross term needs the stones' logits a second time). The terms are those of
    `learner_terms`, as in the plain path.

    Args:
        losses: Labels and options.
        student: (N, D) rows of the student's final states, from `losses.rows`.
        teacher: (N, D') rows of the teacher's final states, or the likeliest classes of N rows.
        stones: Likewise for each stone.
        weights: Weight of each stone.
        task_weight: alpha.
        distill_weight: beta.
        cross_weight: gamma.
        subsets: As in `block_kd_loss`.
        student_head: Applied to `student`.
        teacher_head: Applied to all the others.
        chunk_size: Rows at a time, at least 1.
    """
    loss_weights = LossWeights(task_weight, distill_weight, cross_weight)
    learners = {0: student, **stones}
    learner_weights = {0: 1.0, **{i: weights[i] for i in stones}}
    parameters = student_head.parameters

    @torch.no_grad()
    def targets(rows: slice) -> tuple[torch.Tensor | TopK, torch.Tensor | None]:
        clean = teacher[rows] if isinstance(teacher, TopK) else teacher_head(teacher[rows])
        if not (loss_weights.cross and stones):
            return clean, None
        total: torch.Tensor | float = 0.0
        for states in stones.values():
            total = total + teacher_head(states[rows]).float()
        return clean, total / len(stones)

    def one_learner(
        index: int, states: torch.Tensor, clean: torch.Tensor | TopK, ensemble: torch.Tensor | None, rows: Rows
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits = (teacher_head if index else student_head)(states)
        terms = learner_terms(losses.part(rows), logits, clean, ensemble)
        weighted = sum(weight * part for weight, part in zip(loss_weights, terms, strict=True))
        return learner_weights[index] * weighted, torch.stack(terms)

    total, parts = _ChunkedLoss.apply(
        targets, one_learner, list(learners), subsets or {}, len(teacher), chunk_size, *learners.values(), *parameters
    )
    terms = {index: LearnerTerms(*row) for index, row in zip(learners, parts, strict=True)}
    summed = weighted_sum(terms[0], {i: terms[i] for i in stones}, weights, loss_weights)
    summed.total = total
    return summed


class _ChunkedLoss(torch.autograd.Function):
    """Sum of a loss over chunks of rows, with its gradients computed on the way."""

    @staticmethod
    def forward(
        ctx: Any,
        targets: Callable,
        one_learner: Callable,
        indices: list[int],
        subsets: Mapping[int, torch.Tensor],
        num_rows: int,
        chunk_size: int,
        *tensors: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        states, parameters = tensors[: len(indices)], tensors[len(indices) :]
        gradients = [torch.zeros_like(tensor) if tensor.requires_grad else None for tensor in tensors]
        total = torch.zeros((), device=states[0].device)
        parts = torch.zeros((len(indices), len(LearnerTerms._fields)), device=states[0].device)
        for start in range(0, num_rows, chunk_size):
            chunk = slice(start, min(start + chunk_size, num_rows))
            clean, ensemble = targets(chunk)
            for position, index in enumerate(indices):
                own, rows, target = chunk, chunk, clean
                if index in subsets:
                    own = _between(subsets[index], chunk)
                    rows = subsets[index][own]
                    if not len(rows):
                        continue
                    target = clean[rows - start]
                with torch.enable_grad():
                    piece = states[position][own].detach().requires_grad_()
                    loss, terms = one_learner(index, piece, target, ensemble, rows)
                    # Only the student, which comes first, has a head that learns.
                    sources = [piece, *(parameters if position == 0 else ())]
                    found = torch.autograd.grad(loss, sources, allow_unused=True)
                total += loss.detach()
                parts[position] += terms.detach()
                if gradients[position] is not None:
                    gradients[position][own] = found[0]
                for slot, gradient in enumerate(found[1:], start=len(indices)):
                    if gradient is not None:
                        gradients[slot] += gradient
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(parts)
        return total, parts

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scaled = (None if saved is None else saved * gradient for saved in ctx.saved_tensors)
        return (*[None] * 6, *scaled)


def _between(rising: torch.Tensor, chunk: slice) -> slice:
    """Where in a rising tensor the numbers from `chunk.start` to `chunk.stop - 1` stand."""
    bounds = torch.tensor([chunk.start, chunk.stop], device=rising.device)
    return slice(*torch.searchsorted(rising, bounds).tolist())
