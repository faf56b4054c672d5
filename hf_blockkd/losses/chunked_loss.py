"""The loss of a step at large vocabularies: the logits of a few rows at a time, never those of all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ..models.heads import Head
from .learners import (
    STUDENT,
    DistillationLoss,
    Learner,
    Learners,
    LearnerTerms,
    LossWeights,
    learner_terms,
    weighted_sum,
)
from .rows import RowLosses
from .top_k import TopK

Rows = slice | torch.Tensor

CHUNK_ELEMENTS = {"cpu": 2**21}
"""Logits of one model that a chunk holds by default, by device: 8 MiB in float32, by measurement
(examples/benchmarks/README.md)."""
OTHER_CHUNK_ELEMENTS = 2**25
"""The same for all other devices, 128 MiB, where small chunks would leave much of the time to launching kernels."""


def default_chunk_size(vocabulary: int, device: torch.device | str = "cpu") -> int:
    """Rows in a chunk: as many as that many logits allow, but enough to keep the head's product efficient."""
    return max(64, CHUNK_ELEMENTS.get(torch.device(device).type, OTHER_CHUNK_ELEMENTS) // vocabulary)


def chunked_distillation_loss(
    losses: RowLosses,
    learners: Learners,
    teacher: torch.Tensor | TopK | None,
    weights: LossWeights,
    *,
    student_head: Head,
    teacher_head: Head,
    chunk_size: int,
) -> DistillationLoss:
    """`distillation_loss` of final states instead of logits, with the heads applied to `chunk_size` rows at a time.

    One learner's logits of one chunk are all that lives at once, beside the teacher's. The gradients of the states
    and of the student's head are computed along with the loss, chunk by chunk, and kept until backward: no logits are
    stored, and none computed twice (only a cross term needs the hybrids' logits a second time). The terms are those of
    `learner_terms`, as in the plain path.

    Args:
        losses: Labels and options.
        learners: As in `distillation_loss`, with rows (N, D) of final states.
        teacher: (N, D') rows of the teacher's final states, the likeliest classes of N rows, or `None`.
        weights: alpha, beta and gamma.
        student_head: Applied to the rows of learners that have it.
        teacher_head: Applied to all the others.
        chunk_size: Rows at a time, at least 1.
    """
    hybrids = [learner.rows for key, learner in learners.items() if key != STUDENT]
    parameters = student_head.parameters

    @torch.no_grad()
    def targets(rows: slice) -> tuple[torch.Tensor | TopK | None, torch.Tensor | None]:
        clean = teacher
        if teacher is not None:
            clean = teacher[rows] if isinstance(teacher, TopK) else teacher_head(teacher[rows])
        if not (weights.cross and hybrids):
            return clean, None
        total: torch.Tensor | float = 0.0
        for states in hybrids:
            total = total + teacher_head(states[rows]).float()
        return clean, total / len(hybrids)

    def one_learner(
        learner: Learner,
        states: torch.Tensor,
        clean: torch.Tensor | TopK | None,
        ensemble: torch.Tensor | None,
        rows: Rows,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits = (student_head if learner.student_head else teacher_head)(states)
        terms = learner_terms(losses.part(rows), logits, clean, ensemble)
        weighted = sum(a * b * term for a, b, term in zip(weights, learner.weights, terms, strict=True))
        return weighted, torch.stack(terms)

    states = [learner.rows for learner in learners.values()]
    total, parts = _ChunkedLoss.apply(
        targets, one_learner, list(learners.values()), len(losses), losses.magnitude, chunk_size, *states, *parameters
    )
    terms = {key: LearnerTerms(*row) for key, row in zip(learners, parts, strict=True)}
    return replace(weighted_sum(learners, terms, weights), total=total)


class _ChunkedLoss(torch.autograd.Function):
    """Sum of a loss over chunks of rows, with its gradients computed on the way."""

    @staticmethod
    def forward(
        ctx: Any,
        targets: Callable,
        one_learner: Callable,
        learners: list[Learner],
        num_rows: int,
        scale: torch.Tensor,
        chunk_size: int,
        *tensors: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        states, parameters = tensors[: len(learners)], tensors[len(learners) :]
        # Those of the head are sums over chunks, which in its own dtype would err more the more chunks there are.
        dtypes = [own.dtype for own in states] + [torch.promote_types(p.dtype, torch.float32) for p in parameters]
        gradients = [
            torch.zeros_like(tensor, dtype=dtype) if tensor.requires_grad else None
            for tensor, dtype in zip(tensors, dtypes, strict=True)
        ]
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        # A gradient scaler comes too late for what is computed here: in float16, a mean over many rows would underflow.
        ctx.scale = scale.to(states[0].device)
        total = torch.zeros((), device=states[0].device)
        parts = torch.zeros((len(learners), len(LearnerTerms._fields)), device=states[0].device)
        for start in range(0, num_rows, chunk_size):
            chunk = slice(start, min(start + chunk_size, num_rows))
            clean, ensemble = targets(chunk)
            for position, learner in enumerate(learners):
                own, rows, target = chunk, chunk, clean
                if learner.subset is not None:
                    own = _between(learner.subset, chunk)
                    rows = learner.subset[own]
                    if not len(rows):
                        continue
                    target = None if clean is None else clean[rows - start]
                with torch.enable_grad():
                    piece = states[position][own].detach().requires_grad_()
                    loss, terms = one_learner(learner, piece, target, ensemble, rows)
                    # The teacher's head does not learn.
                    sources = [piece, *(parameters if learner.student_head else ())]
                    found = torch.autograd.grad(loss * ctx.scale, sources, allow_unused=True)
                total += loss.detach()
                parts[position] += terms.detach()
                if gradients[position] is not None:
                    gradients[position][own] = found[0]
                for slot, gradient in enumerate(found[1:], start=len(learners)):
                    if gradient is not None:
                        gradients[slot] += gradient
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(parts)
        return total, parts

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradient = gradient / ctx.scale
        scaled = (
            None if saved is None else (saved * gradient).to(dtype)
            for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*[None] * 6, *scaled)


def _between(rising: torch.Tensor, chunk: slice) -> slice:
    """Where in a rising tensor the numbers from `chunk.start` to `chunk.stop - 1` stand."""
    bounds = torch.tensor([chunk.start, chunk.stop], device=rising.device)
    return slice(*torch.searchsorted(rising, bounds).tolist())
