"""Which rows of logits are compared with the teacher's, with a label of their own or without."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from ..losses.rows import IGNORED
from .positions import position_mask
from .tasks import Task

DISTILL_MASK = "distill_mask"
"""Entry of a batch (B, T) that says of each token whether its prediction is distilled, whatever its label."""


def rows_of_logits(model: PreTrainedModel, inputs: Mapping[str, Any], logits: torch.Tensor) -> torch.Tensor:
    """Which rows are distilled where labels have another form than logits: all that are no padding.

    Args:
        model: The student.
        inputs: A batch.
        logits: What it gives for it, from `Task.logits`: (B, ..., C).

    Returns:
        Booleans (B, ...).
    """
    rows = logits.shape[:-1]
    mask = position_mask(model, "", inputs, logits) if len(rows) == 2 else None
    if mask is None:
        return torch.ones(rows, dtype=torch.bool, device=logits.device)
    return mask.to(logits.device).bool()


def distilled_rows(model: PreTrainedModel, task: Task, inputs: Mapping[str, Any], everywhere: bool) -> torch.Tensor:
    """Which rows are compared with the teacher's: all that have a label, and those that need none.

    Where an example is one row, it needs none. Where its tokens are rows of their own, an example without any label is
    distilled at all positions that are no padding, and one that has some at these alone, unless `everywhere` says that
    prompts and the like count, too. A token whose row is the one before (causal language models) counts if both of them
    are no padding, so that nothing depends on how much a batch is padded.

    Args:
        model: The student.
        task: What its head predicts.
        inputs: A batch with labels, -100 where there are none.
        everywhere: Whether positions without a label count in examples that have some.

    Returns:
        Booleans in the shape of `Task.labels`.

    Example:
        ```python
        >>> import torch
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from hf_blockkd.pairing.distilled_rows import distilled_rows
        >>> from hf_blockkd.pairing.tasks import Task
        >>> model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9))
        >>> batch = {"attention_mask": torch.tensor([[1, 1, 1, 0]] * 2)}
        >>> batch["labels"] = torch.tensor([[-100, -100, 5, -100], [-100] * 4])
        >>> distilled_rows(model, Task.of(model), batch, everywhere=False).tolist()
        [[False, True, False], [True, True, False]]

        ```
    """
    labels = task.labels(inputs)
    if task.problem(inputs) != "single_label_classification" or labels.ndim < 2:
        return torch.ones_like(labels, dtype=torch.bool)
    is_labelled = labels != IGNORED
    if inputs.get(DISTILL_MASK) is not None:
        return is_labelled | task.align_labels(inputs[DISTILL_MASK].to(labels.device).bool())
    wanted = torch.ones_like(is_labelled)
    real = position_mask(model, "", inputs, torch.empty((*inputs["labels"].shape, 0), device="meta"))
    if real is not None and real.shape == inputs["labels"].shape:
        wanted = real.to(labels.device).bool()
        wanted = wanted[:, 1:] & wanted[:, :-1] if task.shifted else wanted
    if not everywhere:
        wanted = wanted & ~is_labelled.flatten(1).any(1).view(-1, *[1] * (labels.ndim - 1))
    return is_labelled | wanted
