"""The logits of a forward, and forwards that compute nothing beside them: `main_outputs`, `only_logits`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from .forwards import forward_parameters

THE_REST = ("use_cache", "output_router_logits")
"""Fields that ask for more: for a cache, with which packed documents are no longer told apart, and for the router's
logits of every layer, which layers that are skipped do not have."""


def turn_off_the_rest(model: PreTrainedModel) -> None:
    """Make the forwards of a frozen model compute nothing beside its logits, for good."""
    for config, name in _fields(model):
        setattr(config, name, False)


def without_the_rest(model: PreTrainedModel) -> dict[str, bool]:
    """Keyword arguments with which a forward computes nothing beside its logits, whatever its config asks for."""
    parameters = forward_parameters(model)
    takes_more = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return {name: False for _, name in _fields(model) if takes_more or name in parameters}


@contextmanager
def only_logits(model: PreTrainedModel) -> Iterator[None]:
    """Make the forwards of a model compute nothing beside its logits inside the context."""
    before = [getattr(config, name) for config, name in _fields(model)]
    turn_off_the_rest(model)
    try:
        yield
    finally:
        for (config, name), value in zip(_fields(model), before, strict=True):
            setattr(config, name, value)


def _fields(model: PreTrainedModel) -> list[tuple[PreTrainedConfig, str]]:
    """The fields, with their configs: a model that reads images, too, has them in the config of its text model."""
    parts = [model.config, *(getattr(model.config, name, None) for name in model.config.sub_configs)]
    configs = [part for part in parts if isinstance(part, PreTrainedConfig)]
    return [(config, name) for config in configs for name in THE_REST if hasattr(config, name)]


def main_outputs(outputs: ModelOutput | tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
    """The logits of a forward: one tensor, two for question answering, the first output of a model without a head."""
    if isinstance(outputs, tuple):
        return (outputs[0],)
    if "start_logits" in outputs:
        return (outputs["start_logits"], outputs["end_logits"])
    if "logits" in outputs:
        return (outputs["logits"],)
    tensors = (value for name, value in outputs.items() if isinstance(value, torch.Tensor) and name != "loss")
    return (next(tensors),)
