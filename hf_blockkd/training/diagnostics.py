"""How a student comes along, block by block: the size of its gradients, and its likeness to the teacher."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.nn.utils import get_total_norm
from transformers import TrainerState, TrainingArguments

from ..models.heads import without_logits
from ..pairing.pair import Pair
from ..routing.entering import capture_states

MAX_EXAMPLES = 1000
"""Examples that the alignment is computed on; more change little and would have to be kept."""


class BlockGradientNorms:
    """The norm of the gradient of each of the student's blocks, before clipping, taken at the steps that are logged.

    Args:
        pair: The models of the run.
    """

    def __init__(self, pair: Pair) -> None:
        self._pair = pair
        self._norms: list[torch.Tensor] = []
        self._whole: torch.Tensor | float = 0.0
        self._most = 0.0

    def see(self, args: TrainingArguments, state: TrainerState, whole: torch.Tensor | float) -> None:
        """Take note of the gradients of an optimizer step, if it is one that is logged; it waits for no device.

        Args:
            args: The configuration.
            state: Of the run, before the step is counted.
            whole: The norm of all gradients before these were clipped to `max_grad_norm`, by which they are now.
        """
        step = state.global_step + 1
        is_logged = step % state.logging_steps == 0 or (args.logging_first_step and step == 1)
        if args.logging_strategy != "steps" or not is_logged:
            return
        layers, ends = self._pair.stones.student_stack.layers, self._pair.block_map.student
        self._whole, self._most = whole, args.max_grad_norm or 0.0
        self._norms = [
            get_total_norm([p.grad for layer in layers[start:end] for p in layer.parameters() if p.grad is not None])
            for start, end in zip((0, *ends), ends, strict=False)
        ]

    def take(self) -> dict[str, float]:
        """`grad_norm_block_<i>` of the last logged step, beside the whole `grad_norm`; nothing twice."""
        norms, self._norms = self._norms, []
        if not norms:
            return {}
        # As `torch.nn.utils.clip_grads_with_norm_` has it, the other way round.
        factor = max(1.0, (float(self._whole) + 1e-6) / self._most) if self._most > 0 else 1.0
        return {f"grad_norm_block_{i}": norm.item() * factor for i, norm in enumerate(norms, start=1)}


@torch.no_grad()
def block_alignment(
    pair: Pair, batches: Iterable[Mapping[str, Any]], gather: Callable[[torch.Tensor], torch.Tensor] = lambda one: one
) -> dict[int, float]:
    """Linear CKA between the states after each student block and after the teacher's of the same number.

    The states of an example are averaged over its positions, padding left out. 1 means that one is a rotated and scaled
    copy of the other, 0 that they have nothing in common; connectors take no part in it.

    Args:
        pair: The models, in eval mode.
        batches: Prepared batches; the first 1,000 examples are looked at.
        gather: Brings together what the ranks have, each example once.

    Returns:
        Block, from 1 -> a number from 0 to 1.
    """
    stacks = {"student": pair.stones.student_stack, "teacher": pair.stones.teacher_stack}
    ends = {"student": pair.block_map.student, "teacher": pair.block_map.teacher}
    models = {"student": pair.student, "teacher": pair.teacher}
    kept: dict[tuple[str, int], list[torch.Tensor]] = defaultdict(list)
    seen = 0
    for batch in batches:
        for role, model in models.items():
            head = getattr(pair, f"{role}_head")
            with without_logits(head), capture_states(stacks[role], ends[role]) as states:
                model(**pair.inputs_for(role, batch))
            for block, end in enumerate(ends[role], start=1):
                bridge = pair.geometry.bridges.get(block)
                layout = bridge and (bridge.source if role == "student" else bridge.target)
                tokens = layout.tokens(states[end]) if layout else states[end]
                kept[role, block].append(gather(pooled(tokens, pair.position_mask(batch, tokens))).cpu())
        seen += len(kept["student", 1][-1])
        if seen >= MAX_EXAMPLES:
            break
    return {
        block: linear_cka(*(torch.cat(kept[role, block]) for role in models))
        for block in range(1, len(pair.stones) + 1)
    }


def pooled(states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The mean over the positions of each example, or over those that a mask leaves: (B, T, D) -> (B, D)."""
    if mask is None or mask.numel() != states.shape[0] * states.shape[1]:
        return states.mean(1).float()
    mask = mask.reshape(*states.shape[:2], 1).to(states)
    return ((states * mask).sum(1) / mask.sum(1).clamp(min=1)).float()


def linear_cka(x: torch.Tensor, y: torch.Tensor) -> float:
    """Linear centred kernel alignment of two sets of features (Kornblith et al., ICML 2019, arXiv 1905.00414, eq. 4).

    Args:
        x: (N, D), features of N examples.
        y: (N, D'), other features of the same examples.

    Returns:
        A number from 0 to 1; 0 where one of them is constant.

    Example:
        ```python
        >>> import torch
        >>> from hf_blockkd.training.diagnostics import linear_cka
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0]])
        >>> round(linear_cka(x, -5 * x.flip(1) + 7), 4)
        1.0

        ```
    """
    x, y = ((side - side.mean(0)).double() for side in (x, y))
    # The smaller of the two ways to write the same product.
    if len(x) < max(x.shape[1], y.shape[1]):
        a, b = x @ x.T, y @ y.T
        common, own = (a * b).sum(), a.norm() * b.norm()
    else:
        common, own = (x.T @ y).square().sum(), (x.T @ x).norm() * (y.T @ y).norm()
    return (common / own).item() if own > 0 else 0.0
