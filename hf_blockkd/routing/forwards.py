"""Forwards of modules and modes of models, changed for a while, and what forwards take."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel


def forward_parameters(model: PreTrainedModel) -> dict[str, inspect.Parameter]:
    """What the forward of a model takes, by name, also where a class of the person's own takes any `**kwargs`.

    Those it hands to the class that it descends from, whose parameters count, too, up to transformers' own class.

    Args:
        model: Of any class.
    """
    owners = [base for base in type(model).__mro__ if "forward" in vars(base) and base is not nn.Module]
    # Accelerate's hooks have a forward on the instance.
    forwards = [model.forward, *(owner.forward.__get__(model) for owner in owners[1:])]
    found: dict[str, inspect.Parameter] = {}
    for owner, forward in zip(owners, forwards, strict=True):
        named = {name: one for name, one in found.items() if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)}
        own = inspect.signature(forward).parameters
        found = {**own, **named}
        if owner.__module__.startswith("transformers.") or all(one.kind != one.VAR_KEYWORD for one in own.values()):
            break
    return found


def in_dtype_of(model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs with images and sounds in the dtype of a model's weights, where no autocast brings them to it."""

    def cast(value: Any) -> Any:
        is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.to(model.dtype) if is_float else value

    return {name: cast(value) for name, value in inputs.items()}


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
