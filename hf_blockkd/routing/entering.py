"""Running a model's upper layers from hidden states that it did not compute itself.

There is one technique, the model's *own forward*: the layers below the entry depth pass their input through, a hook
hands the foreign states to the layer at the entry depth, and everything else (masks, rotary tables, final norm,
pooling, head, soft-capping) stays the business of the model's own code.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from .errors import UnsupportedArchitectureError
from .forwards import recomputed, replaced_forward
from .handed_on import record_writes, replay_writes
from .layers import LayerStack
from .places import Place, first_tensor, read, replaced

Extras = dict[int | str, Any]
"""What each layer returned besides its hidden states (position bias, ...), by layer index: the place of the states, all
else that was returned, and the shape and dtype that the layer gave the states of one example, where it changed them;
absent where it did none of it. Where the head reads levels, all that each layer returned. Under `WRITES`, what the
layers wrote into dictionaries that they share."""
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
        states.setdefault(depth, stack.turned(read((args, kwargs), _entry(stack, layer, args, kwargs))))

    def keep_output(depth: int, layer: nn.Module, args: tuple, output: Any) -> None:
        states[depth] = stack.turned(read(output, _exit(stack, layer, output)))

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
        if stack.are_levels:
            extras[index] = (place, output, None)
        elif place or form:
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


@contextmanager
def enter_at(
    stack: LayerStack,
    depth: int,
    states: torch.Tensor,
    extras: Extras,
    until: int | None = None,
    recompute: bool = False,
    without: Collection[int] = (),
) -> Iterator[None]:
    """Make the model's forward, run inside the context, start at layer `depth` from `states`.

    Args:
        stack: The stack of the model that will run.
        depth: First layer that is computed; 0 keeps all layers, the depth of the stack skips them all.
        states: What enters that layer, as `capture_states` gives it: in the shape that the model itself would hand to
            it, e.g. (B, T, D), examples first.
        extras: From `record_extras` around a clean forward on the same inputs.
        until: Layers from here on are skipped as well; default: none are.
        recompute: Whether the layers that are computed keep their inputs alone for backward; they must be in eval mode.
        without: Layers from `depth` on that hand on what they get, as if the model did not have them; they must be ones
            that keep the shape of the states.
    """
    depth_of_stack, states = len(stack), stack.turned(states)
    until = depth_of_stack if until is None else until

    def pass_through(index: int, layer: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        hidden = read((args, kwargs), _entry(stack, layer, args, kwargs))
        place, output, form = extras.get(index, ((), None, None))
        if form is not None:
            # Nobody reads the values, but a model may handle them as it does those of its own layer (PVT v2).
            hidden = hidden.new_zeros((), dtype=form[1]).expand(len(hidden), *form[0])
        level = read(output, place) if stack.are_levels and index < depth and output is not None else None
        hidden = hidden if level is None else level
        # A level that is handed on otherwise than it is read stays the model's own.
        is_entered = depth == depth_of_stack or (level is not None and level.shape == states.shape)
        if index == depth - 1 and is_entered:
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

    skipped = [index for index in range(depth_of_stack) if not depth <= index < until or index in without]
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
