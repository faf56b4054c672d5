"""Depth and width that fit into a budget of parameters: `sizes_within`, and the better of several: `distance`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..routing.forwards import in_dtype_of, in_eval_mode
from ..routing.layers import LayerStack
from ..routing.logits import only_logits
from .config_changes import BUILD_ERRORS, student_config
from .config_parts import part_of_the_stack, same_in_all_layers, width_and_head
from .layer_scores import choose_layers, output_change


def sizes_within(
    teacher: PreTrainedModel,
    stack: LayerStack,
    parameters: float,
    num_layers: int | None = None,
    hidden_size: int | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> list[tuple[int, int]]:
    """Depths and widths of students within a budget, first the one that keeps as much of the depth as of the width.

    For each depth, the widest student that fits is counted. The nearer the shares of the teacher's depth and width are
    to each other, the earlier it comes: cutting one of them far costs more than cutting both a little.

    Args:
        teacher: The teacher.
        stack: Its layers.
        parameters: Below 1, a share of the teacher's parameters; else a number of them.
        num_layers: The depth, where it is given.
        hidden_size: The width, where it is given.
        overrides: More fields of the student's config.

    Returns:
        Pairs of number of layers and width, at least one.

    Raises:
        ValueError: If no student is as small as that, or the budget is that of the teacher or more.

    Example:
        ```python
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from hf_blockkd import find_layer_stack
        >>> from hf_blockkd.students.budget import sizes_within
        >>> teacher = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=8, n_head=8, vocab_size=99))
        >>> sizes_within(teacher, find_layer_stack(teacher), parameters=0.25)[:3]
        [(4, 32), (5, 32), (6, 32)]

        ```
    """
    overrides = dict(overrides or {})
    whole = teacher.num_parameters()
    is_number = isinstance(parameters, Real) and not isinstance(parameters, bool)
    if not is_number or not 0 < parameters < whole or parameters == 1:
        raise ValueError(
            f"`parameters` is {parameters!r}, but must be a share of the teacher's {whole:,} parameters, such as 0.25, "
            "or a smaller number than theirs."
        )
    budget = parameters * whole if parameters < 1 else parameters
    part = part_of_the_stack(teacher, teacher.config, stack)
    width, _ = width_and_head(part)
    depths = range(1, len(stack) + 1) if num_layers is None else [num_layers]
    widths = _widths(part) if hidden_size is None else [hidden_size]
    found: dict[tuple[int, int], int] = {}
    for depth in depths:
        fitting = _widest(teacher, stack, depth, widths, overrides, budget)
        if fitting is not None:
            found[depth, fitting[0]] = fitting[1]
    if not found:
        smallest = _count(teacher, stack, depths[0], widths[0], overrides)
        raise ValueError(
            f"`parameters` is {parameters!r}, which is {budget:,.0f} parameters, but the smallest student of "
            f"{type(teacher).__name__} that heads allow has {smallest:,}; raise the budget, or build a student from a "
            "config of your own."
        )

    def imbalance(sizes: tuple[int, int]) -> float:
        depth, own = sizes
        return abs(depth / len(stack) - own / width)

    return sorted(found, key=lambda sizes: (imbalance(sizes), -found[sizes]))


@torch.no_grad()
def distance(teacher: PreTrainedModel, student: PreTrainedModel, batches: Iterable[Mapping[str, Any]]) -> float:
    """How far a student's outputs are from its teacher's, as `output_change` measures it.

    Args:
        teacher: The teacher.
        student: Of the same class.
        batches: Inputs for both.
    """
    with in_eval_mode(teacher), in_eval_mode(student), only_logits(teacher), only_logits(student):
        return sum(
            output_change(teacher, batch, student(**in_dtype_of(student, batch)), teacher(**batch)) for batch in batches
        )


def _widths(part: PreTrainedConfig) -> list[int]:
    """Widths of whole heads, and of whole groups of queries where there are fewer keys, or of a part of one group."""
    width, head = width_and_head(part)
    groups = same_in_all_layers(part, "num_key_value_heads")
    queries = max(1, width // (head * groups)) if isinstance(groups, int) and groups else 1
    return [head * heads for heads in range(1, width // head + 1) if heads < queries or heads % queries == 0]


def _widest(
    teacher: PreTrainedModel,
    stack: LayerStack,
    depth: int,
    widths: list[int],
    overrides: dict[str, Any],
    budget: float,
) -> tuple[int, int] | None:
    """The largest width within the budget, and the number of parameters; they rise with the width."""
    low, high, found = 0, len(widths) - 1, None
    while low <= high:
        middle = (low + high) // 2
        try:
            count = _count(teacher, stack, depth, widths[middle], overrides)
        except BUILD_ERRORS:
            count = float("inf")
        if count <= budget:
            low, found = middle + 1, (widths[middle], count)
        else:
            high = middle - 1
    return found


def _count(teacher: PreTrainedModel, stack: LayerStack, depth: int, width: int, overrides: dict[str, Any]) -> int:
    chosen = choose_layers(teacher, stack, depth, "even")
    config = student_config(teacher, stack, chosen, width, overrides)
    with torch.device("meta"):
        return type(teacher)(config).num_parameters()
