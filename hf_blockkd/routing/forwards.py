"""Other forwards and modes for modules of a model, for a while: `replaced_forward`, `recomputed`, `in_eval_mode`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Give a module another forward inside the context; its hooks run as ever."""
    # Accelerate's hooks and compiled layers, too, have a forward of their own on the instance: put back what was there.
    shadowed = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if shadowed is None:
            vars(module).pop("forward", None)
        else:
            module.forward = shadowed


@contextmanager
def recomputed(layer: nn.Module) -> Iterator[None]:
    """Make a layer that runs inside the context keep nothing but its inputs, and run once more in backward.

    It is the activation checkpointing of transformers, which does nothing in eval mode, for a frozen teacher.

    Args:
        layer: In eval mode, so that it gives the same again.
    """
    again = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    with replaced_forward(layer, again):
        yield


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """A model in eval mode for a while; afterwards each of its modules is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def untracked(model: nn.Module) -> Iterator[None]:
    """Keep the running statistics of a model's batch norms as they are, whatever passes through them in train mode."""
    norms = [module for module in model.modules() if getattr(module, "track_running_stats", False)]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
