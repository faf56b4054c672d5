"""Which layers of the teacher a student of fewer layers keeps: `choose_layers`, and what it measures for that."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..data.calibration import BATCH_SIZE
from ..losses.chunked_loss import default_chunk_size
from ..losses.embeddings import embedding_loss
from ..losses.rows import RowLosses
from ..models.pooling import Pooling
from ..pairing.positions import position_mask
from ..pairing.tasks import Task
from ..routing.entering import capture_states, enter_at, record_extras
from ..routing.forwards import in_eval_mode
from ..routing.layers import LayerStack
from ..routing.logits import main_outputs, only_logits
from .choices import LAYER_CHOICES
from .progress import bar

NUM_EXAMPLES = 16
"""Examples that layers are measured on: four times as many chose the same layers by influence (ten of SmolLM2-135M's
thirty), and students of MiniLM that were as accurate on SST-2, to a point, by KL."""
NUM_TRIED = 8
"""Layers that `drop_order` tries after its first round: those that were missed least when they were last tried. Which
ones these are changes little from round to round, so that the others would cost most of the time and never go."""


def choose_layers(
    model: PreTrainedModel,
    stack: LayerStack,
    num_layers: int | None,
    layers: str | Sequence[int],
    batches: Iterable[Mapping[str, Any]] | None = None,
) -> list[int]:
    """The layers that a student of `num_layers` layers keeps.

    Args:
        model: The teacher.
        stack: Its layers.
        num_layers: How many; default: as many as `layers` names, or all.
        layers: `"even"` spreads them from first to last, `"outer"` takes the first and the last ones, `"kl"` those
            that are left by `drop_order`, `"influence"` those of the largest `layer_influence`; a rising list of
            indices names them.
        batches: From `batches_for`, of which the first `NUM_EXAMPLES` examples are read; `"kl"` and `"influence"`
            need them.

    Returns:
        Rising indices.

    Raises:
        ValueError: If depth and layers do not fit the teacher or each other, or what is to be measured cannot be.

    Example:
        ```python
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from hf_blockkd import find_layer_stack
        >>> from hf_blockkd.students.layer_scores import choose_layers
        >>> teacher = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=6, n_head=2, vocab_size=99))
        >>> choose_layers(teacher, find_layer_stack(teacher), 3, "outer")
        [0, 1, 5]

        ```
    """
    depth = len(stack)
    if not isinstance(layers, str):
        return _named_layers(depth, num_layers, layers)
    if layers not in LAYER_CHOICES:
        choices = ", ".join(map(repr, LAYER_CHOICES))
        raise ValueError(f"`layers` is {layers!r}; choose {choices} or a list of layer indices.")
    num_layers = depth if num_layers is None else whole_number("num_layers", num_layers)
    if not 1 <= num_layers <= depth:
        raise ValueError(f"`num_layers` is {num_layers}, but must be from 1 to the teacher's depth, {depth}.")
    if num_layers == depth:
        return list(range(depth))
    if layers == "even":
        return [round(i * (depth - 1) / max(num_layers - 1, 1)) for i in range(num_layers)]
    if layers == "outer":
        first = (num_layers + 1) // 2
        return [*range(first), *range(depth - (num_layers - first), depth)]
    if batches is None:
        raise ValueError(
            f"`layers` is {layers!r}, which needs `data` to measure the layers on; give some training examples, or "
            "choose 'even' or 'outer'."
        )
    batches = list(itertools.islice(batches, NUM_EXAMPLES // BATCH_SIZE))
    if layers == "kl":
        dropped = drop_order(model, stack, batches, depth - num_layers)
        return [index for index in range(depth) if index not in dropped]
    influence = layer_influence(model, stack, batches)
    _check_depth(model, num_layers, depth, sum(score < float("inf") for score in influence))
    # Of equal ones, the lower stays.
    return sorted(sorted(range(depth), key=lambda index: -influence[index])[:num_layers])


def _named_layers(depth: int, num_layers: int | None, layers: Sequence[int]) -> list[int]:
    try:
        chosen = [operator.index(index) for index in layers]
    except TypeError:
        choices = ", ".join(map(repr, LAYER_CHOICES))
        raise ValueError(
            f"`layers` is of type {type(layers).__name__}; choose {choices} or a list of layer indices."
        ) from None
    rises = all(a < b for a, b in itertools.pairwise(chosen))
    if not chosen or not rises or chosen[0] < 0 or chosen[-1] >= depth:
        raise ValueError(f"`layers` is {chosen}, but must be a rising list of layer indices from 0 to {depth - 1}.")
    if num_layers not in (None, len(chosen)):
        raise ValueError(f"`num_layers` is {num_layers}, but `layers` names {len(chosen)} layers; give one of them.")
    return chosen


def whole_number(name: str, value: Any) -> int:
    """An argument called `name` as an int.

    Raises:
        ValueError: If it is no whole number.
    """
    try:
        return operator.index(value)
    except TypeError:
        # A model in its place would fill the screen.
        shown = repr(value) if isinstance(value, (str, float)) else f"of type {type(value).__name__}"
        raise ValueError(f"`{name}` is {shown}, but must be a whole number.") from None


@torch.no_grad()
def layer_influence(model: PreTrainedModel, stack: LayerStack, batches: Iterable[Mapping[str, Any]]) -> list[float]:
    """How much each layer turns the states that it gets: one minus the mean cosine between what enters and leaves it.

    It is the block influence of ShortGPT (Men et al., arXiv 2403.03853) and Minitron (arXiv 2407.14679), for the price
    of one forward. It sees what a layer does to the states, not what that does to the logits.

    Args:
        model: The model; it runs in eval mode.
        stack: Its layers.
        batches: Keyword arguments of its forward.

    Returns:
        For each layer a number from 0 to 2, the mean over all positions (B, T, D) but padding, or over examples where
        states have another form; infinity for layers that change the shape of the states and cannot be dropped.

    Example:
        ```python
        >>> import torch
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from hf_blockkd import find_layer_stack
        >>> from hf_blockkd.routing.dummy_inputs import dummy_inputs
        >>> from hf_blockkd.students.layer_scores import layer_influence
        >>> model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=99))
        >>> for weight in model.transformer.h[1].parameters():
        ...     _ = torch.nn.init.zeros_(weight)
        >>> first, idle = layer_influence(model, find_layer_stack(model), [dummy_inputs(model)])
        >>> first > 0.001, abs(idle) < 1e-6
        (True, True)

        ```
    """
    depth = len(stack)
    totals, count = torch.zeros(depth, dtype=torch.float64), 0
    with in_eval_mode(model), only_logits(model):
        for batch in bar(batches, "Batches by which layers are chosen"):
            with capture_states(stack, range(depth + 1)) as states:
                model(**batch)
            droppable = _droppable(states)
            kept, rows = None, states[0].shape[:1]
            if all(one.ndim == 3 for one in states.values()):
                kept = position_mask(model, stack.path, batch, states[0])
                rows = states[0].shape[:2]
            for index in range(depth):
                if index not in droppable:
                    totals[index] = float("inf")
                    continue
                before, after = (states[place].float().reshape(*rows, -1) for place in (index, index + 1))
                cosines = F.cosine_similarity(before, after, dim=-1).flatten()
                cosines = cosines if kept is None else cosines[kept.flatten().bool()]
                totals[index] += (1 - cosines).double().sum().cpu()
            count += rows.numel() if kept is None else int(kept.bool().sum())
    return (totals / max(count, 1)).tolist()


@torch.no_grad()
def drop_order(
    model: PreTrainedModel, stack: LayerStack, batches: Sequence[Mapping[str, Any]], num_dropped: int
) -> list[int]:
    """The layers that a model misses least, in the order in which they go.

    One after the other, that layer goes whose absence, together with those that went before, changes the model's own
    outputs least: the KL divergence of its logits from those of the whole model, over all positions but padding; the
    squared error of what a regression or a model without a head returns. So layers that make up for each other do not
    go both, as they may where each is measured by itself.

    Nothing is copied: the layers hand on what they get (`enter_at`), and those below the first that is missing are not
    run again. The first layer that goes costs about half as many forwards as there are layers, each other one two and
    half as many as `NUM_TRIED`; more where heads are large.

    Args:
        model: The model; it runs in eval mode.
        stack: Its layers.
        batches: Keyword arguments of its forward; they are run through many times.
        num_dropped: How many layers go.

    Returns:
        Their indices.

    Raises:
        ValueError: If fewer layers keep the shape of the states, without which the others do not run.

    Example:
        ```python
        >>> import torch
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from hf_blockkd import find_layer_stack
        >>> from hf_blockkd.routing.dummy_inputs import dummy_inputs
        >>> from hf_blockkd.students.layer_scores import drop_order
        >>> model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=3, n_head=2, vocab_size=99))
        >>> for weight in model.transformer.h[1].parameters():
        ...     _ = torch.nn.init.zeros_(weight)
        >>> drop_order(model, find_layer_stack(model), [dummy_inputs(model)], num_dropped=1)
        [1]

        ```
    """
    dropped: list[int] = []
    change = 0.0
    # By layer that is left: how much more changed without it, too, when it was last tried.
    growth: dict[int, float] = {}
    with in_eval_mode(model), only_logits(model):
        for _ in bar(range(num_dropped), "Layers dropped"):
            tried = sorted(growth, key=growth.__getitem__)[:NUM_TRIED] if dropped else range(len(stack))
            changes: dict[int, float] = {}
            for batch in batches:
                for index, one in _changes(model, stack, batch, dropped, tried).items():
                    changes[index] = changes.get(index, 0.0) + one
            growth |= {index: one - change for index, one in changes.items()}
            _check_depth(model, len(stack) - num_dropped, len(stack), len(growth) + len(dropped))
            dropped.append(min(changes, key=changes.__getitem__))
            change = changes[dropped[-1]]
            del growth[dropped[-1]]
    return dropped


def _changes(
    model: PreTrainedModel,
    stack: LayerStack,
    batch: Mapping[str, Any],
    dropped: Collection[int],
    tried: Collection[int],
) -> dict[int, float]:
    """By layer that is tried, how far outputs are from the model's own without it and without those dropped before."""
    depth = len(stack)
    with capture_states(stack, range(depth + 1)) as states, record_extras(stack) as extras:
        clean = model(**batch)
    tried = sorted(_droppable(states).intersection(tried))
    if dropped:
        first = min(dropped)
        entered = enter_at(stack, first, states[first], extras, without=dropped)
        with entered, capture_states(stack, range(first, depth)) as later:
            model(**batch)
        states |= later
    changes = {}
    for index in tried:
        with enter_at(stack, index, states[index], extras, without=[index, *dropped]):
            changes[index] = output_change(model, batch, model(**batch), clean)
    return changes


def output_change(model: PreTrainedModel, batch: Mapping[str, Any], outputs: ModelOutput, clean: ModelOutput) -> float:
    """How far outputs of a model are from its own clean ones, as a sum over rows.

    Args:
        model: The model, whose task says what a row is.
        batch: What both were computed from.
        outputs: With something changed inside the model.
        clean: Of the model as it is.

    Returns:
        The KL divergence of the logits over all positions that are no padding, in nats; the squared error where they
        are no distributions (regression, maps, models without a head); where states have become narrower, which leaves
        no other comparison, how the mean states of the examples are like each other (`"similarity"` of
        `hf_blockkd.losses.embeddings`); infinity for what is not finite.
    """
    total = sum(change.item() for change, _ in changes_of_rows(model, batch, outputs, clean))
    return total if total == total else float("inf")


def changes_of_rows(
    model: PreTrainedModel, batch: Mapping[str, Any], outputs: ModelOutput, clean: ModelOutput
) -> Iterator[tuple[torch.Tensor, int]]:
    """Parts of the sum that `output_change` is, each a scalar with its gradient, and the number of their rows.

    Args:
        model: As there.
        batch: As there.
        outputs: As there.
        clean: As there.
    """
    for ours, theirs in zip(main_outputs(outputs), main_outputs(clean), strict=True):
        problem = compared_as(model, clean)
        kept = position_mask(model, "", batch, theirs) if theirs.ndim == 3 else None
        if have_other_widths(ours, theirs):
            ours, theirs = (Pooling().pool(states, kept) for states in (ours, theirs))
            yield embedding_loss(ours, theirs, "similarity").sum(), len(ours)
            continue
        ours, theirs = ours.flatten(0, -2), theirs.flatten(0, -2)
        if kept is not None:
            ours, theirs = ours[kept.flatten().bool()], theirs[kept.flatten().bool()]
        size = default_chunk_size(ours.shape[-1], ours.device)
        for rows, target_rows in zip(ours.split(size), theirs.split(size), strict=True):
            single = problem == "single_label_classification"
            labels = torch.zeros(len(rows) if single else rows.shape, dtype=torch.long, device=rows.device)
            losses = RowLosses(problem, labels, num_items=1.0)
            yield losses.distill(losses.rows(rows), losses.rows(target_rows)), len(rows)


def have_other_widths(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether two models return states of other widths."""
    return ours.shape[1 if ours.ndim == 4 else -1] != theirs.shape[1 if theirs.ndim == 4 else -1]


def compared_as(model: PreTrainedModel, outputs: ModelOutput) -> str:
    """The problem type by which outputs of a model are compared; regression where they are no distributions."""
    is_distribution = hasattr(outputs, "logits") or hasattr(outputs, "start_logits")
    logits = main_outputs(outputs)[0]
    if not is_distribution or logits.ndim > 3 or logits.shape[-1] == 1:
        return "regression"
    return Task.of(model).problem_type or "single_label_classification"


def _droppable(states: Mapping[int, torch.Tensor]) -> set[int]:
    """Layers that return the states in the form in which they get them."""
    forms = {depth: (one.shape, one.dtype) for depth, one in states.items()}
    return {index for index in range(len(states) - 1) if forms[index] == forms[index + 1]}


def _check_depth(model: PreTrainedModel, num_layers: int, depth: int, num_droppable: int) -> None:
    if num_layers < depth - num_droppable:
        raise ValueError(
            f"`num_layers` is {num_layers}, but {depth - num_droppable} of the {depth} layers of "
            f"{type(model).__name__} change the shape of the states, so that none of them can go; keep more layers."
        )
