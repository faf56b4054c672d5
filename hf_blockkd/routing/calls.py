"""How a forward calls its layers, and whether hidden states can enter there: `record_calls`, `check_calls`."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .errors import UnsupportedArchitectureError
from .layers import LayerStack


@dataclass
class Calls:
    """The calls of one forward.

    Attributes:
        order: Indices of the layers, in the order of their calls.
        streams: Largest number of new tensors of one shape that a layer returned and the next one took.
    """

    order: list[int] = field(default_factory=list)
    streams: int = 0


@contextmanager
def record_calls(stack: LayerStack) -> Iterator[Calls]:
    """Record the calls of the layers during a forward that runs inside the context."""
    calls = Calls()
    returned: list[torch.Tensor] = []

    def enter(index: int, layer: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        calls.order.append(index)
        taken = {id(one): one.shape for one in (*args, *kwargs.values()) if any(one is own for own in returned)}
        shapes = list(taken.values())
        calls.streams = max([calls.streams, *map(shapes.count, shapes)])

    def leave(index: int, layer: nn.Module, args: tuple, kwargs: Mapping[str, Any], output: Any) -> None:
        parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else (output,)
        known = [*args, *kwargs.values()]
        # What the first layer makes for all others (T5's biases), they return as they got it.
        returned[:] = [
            part
            for part in parts
            if index > 0 and isinstance(part, torch.Tensor) and not any(part is one for one in known)
        ]

    layers = list(enumerate(stack.layers))
    handles = [layer.register_forward_pre_hook(partial(enter, index), with_kwargs=True) for index, layer in layers]
    handles += [layer.register_forward_hook(partial(leave, index), with_kwargs=True) for index, layer in layers]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def check_calls(model: PreTrainedModel, stack: LayerStack, calls: Calls, depths: Collection[int]) -> None:
    """Refuse a stack that hidden states do not go through once, from the first layer to the last.

    Args:
        model: The model whose forward was recorded.
        stack: Its layers.
        calls: From `record_calls`.
        depths: Where states are to enter.

    Raises:
        UnsupportedArchitectureError: If a layer at one of `depths` is not called, layers are called again after later
            ones, or they hand on two streams of hidden states.
    """
    name = type(model).__name__
    missing = [depth for depth in (min(depth, len(stack) - 1) for depth in depths) if depth not in calls.order]
    if missing:
        raise UnsupportedArchitectureError(
            f"{name} does not call layer {missing[0]} of {stack.path!r} (as a module, where hooks see it) in its "
            "forward on these inputs, so nothing can be routed through it; name another stack with a layers path."
        )
    # A layer may be called several times in a row (ALBERT): it is entered at the first call.
    back = next(((above, below) for above, below in itertools.pairwise(calls.order) if below < above), None)
    if back is not None:
        raise UnsupportedArchitectureError(
            f"{name} calls layer {back[1]} of {stack.path!r} after layer {back[0]}: its forward goes through the "
            "layers several times, so hidden states that enter once do not replace its own."
        )
    if calls.streams > 1:
        raise UnsupportedArchitectureError(
            f"The layers of {name} in {stack.path!r} hand on {calls.streams} streams of hidden states, of which only "
            "one could be replaced."
        )
