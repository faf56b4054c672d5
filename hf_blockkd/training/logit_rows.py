"""Where the logits of a step exist: all at once, or a chunk of rows at a time: `LogitRows`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..losses.chunked_loss import chunked_distillation_loss, default_chunk_size
from ..losses.learners import DistillationLoss, Learners, LossWeights, distillation_loss
from ..losses.rows import RowLosses
from ..losses.top_k import TopK
from ..models.heads import Head
from ..pairing.pair import Pair


class LogitRows:
    """What every forward of a step ends in: rows of logits, or of the states that enter a head, which then waits.

    Over large vocabularies the heads are applied to a chunk of rows at a time, by the loss. Where labels have another
    form than rows of logits, it takes logits to know the rows. Everything that depends on that is here, so that a step
    reads alike either way.

    Args:
        pair: The models.
        make_losses: Makes those of the whole batch, of logits where it takes them.
        asked: `loss_chunk_size` of the configuration.

    Attributes:
        losses: Those of the whole batch; `None` before its rows are known.
        chunk_size: Rows whose logits exist at a time; `None` where all fit, or a model's head cannot be applied by
            itself.
    """

    def __init__(self, pair: Pair, make_losses: Callable[[torch.Tensor | None], RowLosses], asked: int | None) -> None:
        self.pair, self._make_losses = pair, make_losses
        self.losses = losses = make_losses(None) if pair.task.form is None else None
        self.chunk_size = None
        if losses is not None and asked != 0 and pair.student_head is not None and pair.teacher_head is not None:
            size = asked or default_chunk_size(pair.task.num_classes, losses.labels.device)
            self.chunk_size = size if len(losses) > size else None

    @property
    def teacher_head(self) -> Head | None:
        """What makes logits of the teacher's rows; `None` where they are logits."""
        return None if self.chunk_size is None else self.pair.teacher_head

    def run(
        self, model: nn.Module, role: str, inputs: Mapping[str, Any], losses: RowLosses | None = None
    ) -> tuple[Any, torch.Tensor]:
        """Run a model, or a hybrid; its outputs, and its rows.

        Args:
            model: What is called.
            role: Whose head it ends in, `"student"` or `"teacher"`.
            inputs: What it takes.
            losses: Those of the examples in `inputs`; default: those of the whole batch.
        """
        if self.chunk_size is None:
            outputs = model(**inputs)
            logits = self.pair.logits(role, outputs, inputs)
            if self.losses is None:
                self.losses = self._make_losses(logits)
            return outputs, (self.losses if losses is None else losses).rows(logits)
        head = {"student": self.pair.student_head, "teacher": self.pair.teacher_head}[role]
        with head.capture() as captured:
            outputs = model(**inputs)
        return outputs, (self.losses if losses is None else losses).rows(self.pair.task.align(captured["states"]))

    def loss(
        self, learners: Learners, teacher_rows: torch.Tensor | TopK | None, weights: LossWeights
    ) -> DistillationLoss:
        """The loss of what learns in a step, from the rows of each."""
        if self.chunk_size is None:
            return distillation_loss(self.losses, learners, teacher_rows, weights)
        heads = {"student_head": self.pair.student_head, "teacher_head": self.pair.teacher_head}
        return chunked_distillation_loss(
            self.losses, learners, teacher_rows, weights, **heads, chunk_size=self.chunk_size
        )
