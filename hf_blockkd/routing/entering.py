"""Running a model's upper layers from hidden states that it did not compute itself.

There is one technique, the model's *own forward*: the layers below the entry depth pass their input through, a hook
hands the foreign states to the layer at the entry depth, and everything else (masks, rotary tables, final norm,
pooling, head, soft-capping) stays the business of the model's own code.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, is_dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .calls import check_calls, record_calls
from .dummy_inputs import dummy_inputs
from .errors import UnsupportedArchitectureError
from .forwards import recomputed, replaced_forward
from .handed_on import record_writes, replay_writes
from .layers import LayerStack, find_layer_stack
from .only_logits import only_logits
from .places import Place, first_tensor, read, replaced

Extras = dict[int | str, Any]
"""What each layer returned besides its hidden states (position bias, ...), by layer index: the place of the states, all
else that was returned, and the shape and dtype that the layer gave the states of one example, where it changed them;
absent where it did none of it. Under `WRITES`, what the layers wrote into dictionaries that they share."""
WRITES = "writes"


@contextmanager
def capture_states(stack: LayerStack, depths: Collection[int]) -> Iterator[dict[int, torch.Tensor]]:
    """Capture hidden states while the model's forward runs inside the context.

    Args:
        stack: The stack of the model that will run.
        depths: Which states: `k` is what enters layer `k`, and the depth of the stack is what leaves the last layer
            (before the model's final norm, unlike `output_hidden_states[-1]`).

    Yields:
        A dictionary that the forward fills: depth -> tensor, still attached to the autograd graph.
    """
    states: dict[int, torch.Tensor] = {}

    def keep_input(depth: int, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        # A layer that the model calls several times over (ALBERT) is entered at the first call.
        states.setdefault(depth, read((args, kwargs), _entry(stack, layer, args, kwargs)))

    def keep_output(depth: int, layer: nn.Module, args: tuple, output: Any) -> None:
        states[depth] = read(output, _exit(stack, layer, output))

    handles = [
        stack.layers[depth].register_forward_pre_hook(partial(keep_input, depth), with_kwargs=True)
        if depth < len(stack)
        else stack.layers[-1].register_forward_hook(partial(keep_output, depth))
        for depth in depths
    ]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def record_extras(stack: LayerStack) -> Iterator[Extras]:
    """Record, during a clean forward, what the layers return besides their hidden states, for `enter_at`."""
    extras: Extras = {}

    def keep(index: int, layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        place = _exit(stack, layer, output)
        before, after = read((args, kwargs), _entry(stack, layer, args, kwargs)), read(output, place)
        changed = before.shape[1:] != after.shape[1:] or before.dtype != after.dtype
        form = (tuple(after.shape[1:]), after.dtype) if changed and len(before) == len(after) else None
        if place or form:
            extras[index] = (place, replaced(output, place, None), form)

    handles = [
        layer.register_forward_hook(partial(keep, index), with_kwargs=True) for index, layer in enumerate(stack.layers)
    ]
    try:
        with record_writes(stack.layers) as writes:
            yield extras
        if writes:
            extras[WRITES] = writes
    finally:
        for handle in handles:
            handle.remove()


def take_examples(value: Any, examples: torch.Tensor | None, num_examples: int) -> Any:
    """The entries of some examples, in tensors whose first dimension is that of the batch, however deep they lie.

    Args:
        value: Inputs of a model, or `Extras`.
        examples: Their indices; `None` keeps everything.
        num_examples: Examples in the batch.
    """
    if examples is None:
        return value
    if isinstance(value, torch.Tensor):
        return value[examples] if value.ndim and len(value) == num_examples else value
    if is_dataclass(value):
        taken = {name: take_examples(one, examples, num_examples) for name, one in vars(value).items()}
        return replace(value, **taken)
    if isinstance(value, Mapping):
        return {name: take_examples(one, examples, num_examples) for name, one in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(take_examples(one, examples, num_examples) for one in value)
    return value


def check_examples(inputs: Mapping[str, Any], num_examples: int, setting: str) -> None:
    """Raise a `ValueError` if a tensor of a batch does not have the examples as its first dimension.

    Args:
        inputs: The batch.
        num_examples: Examples in it.
        setting: What needs them to be told apart, for the message.
    """
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor) and (not value.ndim or len(value) != num_examples):
            raise ValueError(
                f"{setting} tells the {num_examples} examples of a batch apart, but `{name}` has the shape "
                f"{tuple(value.shape)}; give every example an entry of its own (no packing into one row, no parts of "
                "images in one list), or leave the setting out."
            )


def has_tensors(value: Any) -> bool:
    """Whether there is a tensor in what layers returned, however deep: what differs from batch to batch."""
    if is_dataclass(value):
        value = vars(value)
    if isinstance(value, Mapping):
        return any(has_tensors(one) for one in value.values())
    if isinstance(value, (tuple, list)):
        return any(has_tensors(one) for one in value)
    return isinstance(value, torch.Tensor)


@contextmanager
def enter_at(
    stack: LayerStack,
    depth: int,
    states: torch.Tensor,
    extras: Extras,
    until: int | None = None,
    recompute: bool = False,
) -> Iterator[None]:
    """Make the model's forward, run inside the context, start at layer `depth` from `states`.

    Args:
        stack: The stack of the model that will run.
        depth: First layer that is computed; 0 keeps all layers, the depth of the stack skips them all.
        states: What enters that layer, in the shape that the model itself would hand to it, e.g. (B, T, D).
        extras: From `record_extras` around a clean forward on the same inputs.
        until: Layers from here on are skipped as well; default: none are.
        recompute: Whether the layers that are computed keep their inputs alone for backward; they must be in eval mode.
    """
    depth_of_stack = len(stack)
    until = depth_of_stack if until is None else until

    def pass_through(index: int, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        hidden = read((args, kwargs), _entry(stack, layer, args, kwargs))
        place, output, form = extras.get(index, ((), None, None))
        if form is not None:
            # Nobody reads the values, but a model may handle them as it does those of its own layer (PVT v2).
            hidden = hidden.new_zeros((), dtype=form[1]).expand(len(hidden), *form[0])
        if depth == depth_of_stack and index == depth - 1:
            hidden = states.to(hidden)
        return replaced(output, place, hidden)

    entered = False

    def inject(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        nonlocal entered
        if entered:
            return None
        entered = True
        place = _entry(stack, layer, args, kwargs)
        own = read((args, kwargs), place)
        # Foreign states take on the dtype and the device of those that they replace, wherever the layer is given those
        # (Funnel hands them over as queries, keys and values).
        foreign = states.to(own)
        args, kwargs = replaced((args, kwargs), place, foreign)
        return (
            tuple(foreign if one is own else one for one in args),
            {name: foreign if one is own else one for name, one in kwargs.items()},
        )

    skipped = [index for index in range(depth_of_stack) if not depth <= index < until]
    with ExitStack() as changes:
        for index, layer in enumerate(stack.layers):
            if index in skipped:
                changes.enter_context(replaced_forward(layer, partial(pass_through, index, layer)))
            elif recompute:
                changes.enter_context(recomputed(layer))
        if depth < depth_of_stack:
            handle = stack.layers[depth].register_forward_pre_hook(inject, with_kwargs=True)
            changes.callback(handle.remove)
        changes.enter_context(replay_writes(stack.layers, skipped, extras.get(WRITES, {})))
        yield


def _entry(stack: LayerStack, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Place:
    """Place of the hidden states in `(args, kwargs)`, however the model hands them to the layer."""
    argument, *inside = stack.entry
    if isinstance(argument, int) and argument < len(args):
        return (0, argument, *inside)
    if argument in kwargs:
        return (1, argument, *inside)
    names = list(inspect.signature(type(layer).forward).parameters)[1:]  # after `self`
    if isinstance(argument, int) and argument < len(names) and names[argument] in kwargs:
        return (1, names[argument], *inside)
    if argument in names and names.index(argument) < len(args):
        return (0, names.index(argument), *inside)
    raise UnsupportedArchitectureError(
        f"The model hands {type(layer).__name__} no argument {argument!r}, where the hidden states should be (it takes "
        f"{', '.join(names)}); correct the `entry` of its registered Architecture."
    )


def _exit(stack: LayerStack, layer: nn.Module, output: Any) -> Place:
    """Place of the hidden states in what a layer returned."""
    place = first_tensor(output) if stack.exit is None else stack.exit
    try:
        found = None if place is None else read(output, place)
    except (AttributeError, IndexError, KeyError, TypeError):
        found = None
    if not isinstance(found, torch.Tensor):
        raise UnsupportedArchitectureError(
            f"{type(layer).__name__} returns a {type(output).__name__} without hidden states at "
            f"{'any place' if stack.exit is None else stack.exit}; register an Architecture with the right `exit`."
        )
    return place


@dataclass(frozen=True)
class RoutingReport:
    """What `check_routing` found.

    Attributes:
        layers_path: Dotted name of the stack.
        num_layers: Its depth.
        technique: How states are routed; `"own forward"` is the only one.
        max_abs_error: Largest absolute difference to the model's own outputs, over all entry depths `0..num_layers`.
        worst_depth: The entry depth at which it was seen.
    """

    layers_path: str
    num_layers: int
    technique: str
    max_abs_error: float
    worst_depth: int


def check_routing(
    model: PreTrainedModel,
    inputs: Mapping[str, torch.Tensor] | None = None,
    layers_path: str | None = None,
) -> RoutingReport:
    """Test whether a model entered at each depth, from its own states, gives its own logits.

    Args:
        model: A model with a head; it is run in eval mode, without gradients, and put back into its mode.
        inputs: Keyword arguments of its forward; `None` makes dummy inputs from the config. Caches and router
            logits, which a teacher does without in training, are left out.
        layers_path: Dotted name of the stack where `find_layer_stack` should not search.

    Returns:
        A report; `max_abs_error` is 0.0 where routing is exact.

    Raises:
        UnsupportedArchitectureError: If the model has no stack to route through.
        ValueError: If no dummy input can be made for it, or it does not run on that.

    Example:
        ```python
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from hf_blockkd import check_routing
        >>> check_routing(GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=99))).max_abs_error
        0.0

        ```
    """
    stack = find_layer_stack(model, layers_path)
    was_training = model.training
    model.eval()
    try:
        with only_logits(model):
            inputs = _working_dummy_inputs(model) if inputs is None else inputs
            errors = routing_errors(model, stack, inputs, range(len(stack) + 1))
    finally:
        model.train(was_training)
    worst_depth = max(errors, key=errors.__getitem__)
    return RoutingReport(stack.path, len(stack), "own forward", errors[worst_depth], worst_depth)


@torch.no_grad()
def _working_dummy_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    inputs = dummy_inputs(model)
    try:
        model(**inputs)
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} does not run on made-up {' and '.join(inputs)} "
            f"({' '.join(str(error).split()).rstrip('.')}); correct its config, or pass `inputs` of your own."
        ) from error
    return inputs


@torch.no_grad()
def routing_errors(
    model: PreTrainedModel,
    stack: LayerStack,
    inputs: Mapping[str, Any],
    depths: Collection[int],
    examples: torch.Tensor | None = None,
) -> dict[int, float]:
    """Largest absolute difference between the outputs of a clean forward and of one entered at each of `depths`.

    With `examples`, they alone enter, and theirs are the outputs that are compared.
    """
    with capture_states(stack, depths) as states, record_extras(stack) as extras, record_calls(stack) as calls:
        clean = main_outputs(model(**inputs))
    check_calls(model, stack, calls, depths)
    num_examples = len(clean[0])
    if examples is not None and any(len(one) != num_examples for one in states.values()):
        raise UnsupportedArchitectureError(
            f"The states of {type(model).__name__} have the shape {tuple(next(iter(states.values())).shape)} for "
            f"{num_examples} examples, which so cannot be shared out among stepping stones; set `stepping_stones` to "
            "'sample' and `stone_fraction` to 1."
        )
    clean, states, extras, inputs = (
        take_examples(value, examples, num_examples) for value in (clean, states, extras, inputs)
    )
    errors = {}
    for depth in depths:
        with enter_at(stack, depth, states[depth], extras):
            routed = main_outputs(model(**inputs))
        errors[depth] = max(_difference(a, b) for a, b in zip(clean, routed, strict=True))
    if len(stack) in errors:
        with enter_at(stack, len(stack), torch.zeros_like(states[len(stack)]), extras):
            blind = main_outputs(model(**inputs))
        if all(torch.equal(a, b) for a, b in zip(clean, blind, strict=True)):
            raise UnsupportedArchitectureError(
                f"The outputs of {type(model).__name__} do not depend on the hidden states that leave the last layer "
                f"of {stack.path!r}; name another stack, or register an Architecture whose layers hand on all that "
                "its head reads."
            )
    return errors


def main_outputs(outputs: ModelOutput | tuple) -> tuple[torch.Tensor, ...]:
    """The logits of a forward: one tensor, two for question answering, the first output of a model without a head."""
    if isinstance(outputs, tuple):
        return (outputs[0],)
    if "start_logits" in outputs:
        return (outputs["start_logits"], outputs["end_logits"])
    if "logits" in outputs:
        return (outputs["logits"],)
    return (next(value for value in outputs.values() if isinstance(value, torch.Tensor)),)


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    # Equal infinities (masked logits) are no difference; anything beside a NaN is an infinite one.
    difference = torch.where(a == b, 0.0, (a.float() - b.float()).abs())
    return difference.nan_to_num(nan=float("inf"), posinf=float("inf")).max().item()
