"""Students within a budget: `Budget`, and the sizes that meet it, `sizes_within`, each a `Fit`."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import inf
from numbers import Real
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..models.flops import forward_flops
from ..routing.layers import LayerStack
from .config_changes import BUILD_ERRORS, INNER_FIELDS, student_config
from .config_parts import GROUP_FIELDS, part_of_the_stack, same_in_all_layers, width_and_head
from .layer_scores import choose_layers

Sizes = dict[str, int]
"""Depth and other arguments of `make_student` that make a student of some size."""
INNER_STEPS = 16
"""Parts in which the inner width of MLPs is cut, where nothing else of the width can be, and in which what heads leave
of a budget is filled with it."""
NEAR = 0.9
"""Share of a budget from which on it counts as used."""
UNUSED = 2
"""What a share of the budget that is left counts next to a share of depth, width or neurons that is missing."""


class Fit(NamedTuple):
    """Sizes within a budget.

    Attributes:
        sizes: Depth and other arguments of `make_student`.
        number: What such a student has of what is counted.
        larger: The smallest sizes beyond the budget that were looked at; empty without any.
        beyond: What a student of these would have, or infinity.
        limit: What the budget allows.
    """

    sizes: Sizes
    number: float
    larger: Sizes
    beyond: float
    limit: float

    def shortfall(self, budget: Budget) -> str:
        """A sentence that says what is left of the budget, and why, where that is more than a tenth; else nothing."""
        if self.number >= NEAR * self.limit:
            return ""
        sizes = ", ".join(f"{name}={size}" for name, size in self.larger.items())
        why = f", since sizes come in steps: with {sizes} it would have {self.beyond:,}" if sizes else ""
        return (
            f"`{budget.name}` is {budget.value!r}, which is {self.limit:,.0f} {budget.unit}; the student has "
            f"{self.number:,} ({self.number / self.limit:.0%} of that){why}."
        )


@dataclass(frozen=True)
class Budget:
    """How large a student may be.

    Attributes:
        name: Of the argument that sets it.
        value: Below 1, a share of what the teacher has; else a number.
        unit: What is counted.
        measure: Counts it in a model, which stands on the meta device.
    """

    name: str
    value: float
    unit: str
    measure: Callable[[PreTrainedModel], int]

    @classmethod
    def of_parameters(cls, value: float) -> Budget:
        """A number of parameters."""
        return cls("parameters", value, "parameters", lambda model: model.num_parameters())

    @classmethod
    def of_flops(cls, value: float, inputs: Mapping[str, Any]) -> Budget:
        """A number of FLOPs of a forward on some inputs."""
        return cls("flops", value, "FLOPs", lambda model: forward_flops(model, inputs))

    def within(self, whole: int) -> float:
        """The largest number that meets it.

        Args:
            whole: The teacher's.

        Raises:
            ValueError: If that is no budget.
        """
        is_number = isinstance(self.value, Real) and not isinstance(self.value, bool)
        if not is_number or not 0 < self.value < whole or self.value == 1:
            raise ValueError(
                f"`{self.name}` is {self.value!r}, but must be a share of the teacher's {whole:,} {self.unit}, such as "
                "0.25, or a smaller number than theirs."
            )
        return self.value * whole if self.value < 1 else self.value


def sizes_within(
    teacher: PreTrainedModel,
    stack: LayerStack,
    budget: Budget,
    num_layers: int | None = None,
    hidden_size: int | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Iterator[list[Fit]]:
    """Sizes of students within a budget, first those that use it, and keep of the depth as much as of the width.

    For each depth, the widest student that fits is counted; where that leaves more than a tenth of the budget, also
    those of this width and of the next one whose MLPs have as many neurons as fit, if they may come first. The nearer
    the shares of the teacher's depth, width and neurons are to each other, and the nearer the number is to the budget,
    the earlier a student comes: cutting one of them far costs more than cutting all a little.

    Args:
        teacher: The teacher.
        stack: Its layers.
        budget: The budget.
        num_layers: The depth, where it is given.
        hidden_size: The width, where it is given.
        overrides: More fields of the student's config.

    Returns:
        For each way to make a layer narrower that meets the budget at some depth: with fewer heads, with smaller heads,
        with fewer inner neurons, as it is. Which of them a model can be cut in is not known here.

    Raises:
        ValueError: If no student is as small as that, or the budget is that of the teacher or more.

    Example:
        ```python
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from hf_blockkd import find_layer_stack
        >>> from hf_blockkd.students.budget import Budget, sizes_within
        >>> teacher = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=8, n_head=8, vocab_size=99))
        >>> fits = next(sizes_within(teacher, find_layer_stack(teacher), Budget.of_parameters(0.25)))
        >>> [fit.sizes for fit in fits[:2]]
        [{'num_layers': 6, 'hidden_size': 32}, {'num_layers': 5, 'hidden_size': 32}]

        ```
    """
    overrides = dict(overrides or {})
    part = part_of_the_stack(teacher, teacher.config, stack)
    limit = budget.within(_measured(budget, type(teacher), teacher.config))
    depths = range(1, len(stack) + 1) if num_layers is None else [num_layers]
    smallest, refusals = inf, []
    next_number, next_sizes = inf, {}

    @functools.cache
    def counted(items: tuple[tuple[str, int], ...]) -> float:
        nonlocal smallest, next_number, next_sizes
        fields = {**overrides, **dict(items)}
        chosen = choose_layers(teacher, stack, fields.pop("num_layers"), "even")
        try:
            config = student_config(teacher, stack, chosen, fields.pop("hidden_size", None), fields)
            number = _measured(budget, type(teacher), config)
        except BUILD_ERRORS as error:
            refusals.append(error)
            return inf
        smallest = min(smallest, number)
        if limit < number < next_number:
            next_number, next_sizes = number, dict(items)
        return number

    def count(sizes: Sizes) -> float:
        return counted(tuple(sizes.items()))

    def rated(share: float, own: float, sizes: Sizes) -> tuple[float, float, Sizes]:
        kept, number = (sizes["num_layers"] / len(stack), share, own), count(sizes)
        return max(kept) - min(kept) + UNUSED * (1 - number / limit), -number, sizes

    inner = _inner_widths(part, overrides)
    is_met = False
    for way in _ways(part, hidden_size, overrides, inner):
        found, unfilled = [], []
        next_number, next_sizes = inf, {}
        for depth in depths:
            rising = [(share, {"num_layers": depth, **sizes}) for share, sizes in way]
            place = _widest(count, rising, limit)
            if place is None:
                continue
            share, sizes = rising[place]
            found.append(rated(share, share, sizes))
            if count(sizes) < NEAR * limit and not inner.keys() & sizes.keys():
                # Neurons come in finer steps than all else: more of them at this width, or fewer at the next one.
                unfilled += [(abs(depth / len(stack) - one[0]), *one) for one in rising[place : place + 2]]
        for apart, share, sizes in sorted(unfilled, key=lambda one: one[0]):
            if apart > min(one[0] for one in found):
                break  # however many neurons, it would not come first
            filled = [(own, {**sizes, **more}) for own, more in _inner_shares(inner) if own != share]
            if (place := _widest(count, filled, limit)) is not None:
                found.append(rated(share, *filled[place]))
        if found:
            is_met = True
            found.sort(key=lambda one: one[:2])
            yield [Fit(sizes, -number, next_sizes, next_number, limit) for _, number, sizes in found]
    if smallest == inf:
        raise refusals[0]
    if not is_met:
        raise ValueError(
            f"`{budget.name}` is {budget.value!r}, which is {limit:,.0f} {budget.unit}, but the smallest student of "
            f"{type(teacher).__name__} that its sizes allow has {smallest:,}; raise the budget, or build a student "
            "from a config of your own."
        )


def _ways(
    part: PreTrainedConfig, hidden_size: int | None, overrides: Mapping[str, Any], inner: Sizes
) -> Iterator[list[tuple[float, Sizes]]]:
    """Ways to make layers narrower: the shares of the width that they keep, which rise, and what sets them."""
    if hidden_size is not None:
        width = same_in_all_layers(part, "hidden_size")
        yield [(hidden_size / width if isinstance(width, int) else 1.0, {"hidden_size": hidden_size})]
        return
    try:
        width, head = width_and_head(part)
    except ValueError:  # models in stages have no one width
        width = 0
    if width:
        # Of whole groups of queries where there are fewer keys, or of a part of one group.
        groups = next((own for name in GROUP_FIELDS if isinstance(own := same_in_all_layers(part, name), int)), 0)
        queries = max(1, width // (head * groups)) if groups else 1
        heads = [own for own in range(1, width // head + 1) if own < queries or own % queries == 0]
        yield [(own * head / width, {"hidden_size": own * head}) for own in heads]
        if head > 1 and "num_attention_heads" not in overrides:
            number = width // head
            fixed = {"num_attention_heads": number}
            yield [(own / head, {"hidden_size": own * number, **fixed}) for own in range(1, head + 1)]
    if inner:
        yield _inner_shares(inner)
    yield [(1.0, {})]


def _inner_widths(part: PreTrainedConfig, overrides: Mapping[str, Any]) -> Sizes:
    """Fields of the inner width of MLPs that are free, and the teacher's."""
    found = {name: size for name in INNER_FIELDS if isinstance(size := same_in_all_layers(part, name), int)}
    return {name: size for name, size in found.items() if name not in overrides and size >= INNER_STEPS}


def _inner_shares(inner: Sizes) -> list[tuple[float, Sizes]]:
    """Shares of these widths, which rise, and what sets them; none without such widths."""
    shares = [step / INNER_STEPS for step in range(1, INNER_STEPS + 1)] if inner else []
    return [(share, {name: int(share * size) for name, size in inner.items()}) for share in shares]


def _widest(count: Callable[[Sizes], float], rising: list[tuple[float, Sizes]], limit: float) -> int | None:
    """Place of the largest sizes within a limit on a number that rises with them."""
    low, high, found = 0, len(rising) - 1, None
    while low <= high:
        middle = (low + high) // 2
        if count(rising[middle][1]) <= limit:
            low, found = middle + 1, middle
        else:
            high = middle - 1
    return found


def _measured(budget: Budget, model_class: type, config: PreTrainedConfig) -> int:
    with torch.device("meta"):
        model = model_class(copy.deepcopy(config))
    return budget.measure(model)
