"""Some examples of a batch, in everything that a model takes and its layers hand on: `take_examples`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import is_dataclass, replace
from typing import Any

import torch


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
    is_each = isinstance(value, list) and len(value) == num_examples and any(isinstance(one, Mapping) for one in value)
    if is_each and all(one is None or isinstance(one, Mapping) for one in value):
        return [value[example] for example in examples.tolist()]  # what is in each image
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


def map_tensors(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same with every tensor in it changed, however deep it lies."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if is_dataclass(value):
        return replace(value, **{name: map_tensors(one, change) for name, one in vars(value).items()})
    if isinstance(value, Mapping):
        return {key: map_tensors(one, change) for key, one in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(one, change) for one in value)
    return value
