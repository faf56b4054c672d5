"""Finding and replacing one value inside what a layer takes or returns: tuples, dictionaries, dataclasses."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

Place = tuple[int | str, ...]
"""Way to a value: an index, a key or the name of an attribute at each step; () is the value itself."""


def first_tensor(value: Any) -> Place | None:
    """Place of the first tensor in a value, however deep it lies; `None` where there is none.

    Example:
        ```python
        >>> import torch
        >>> from hf_blockkd.routing.places import first_tensor
        >>> first_tensor((None, {"states": torch.zeros(2)}))
        (1, 'states')

        ```
    """
    if isinstance(value, torch.Tensor):
        return ()
    for key, inner in _items(value):
        place = first_tensor(inner)
        if place is not None:
            return (key, *place)
    return None


def read(value: Any, place: Place) -> Any:
    """What lies at a place."""
    for key in place:
        value = _step(value, key)
    return value


def replaced(value: Any, place: Place, new: Any) -> Any:
    """A copy of a value with something else at a place; what lies beside it is shared with the original."""
    if not place:
        return new
    key, *rest = place
    new = replaced(_step(value, key), tuple(rest), new)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return value._replace(**{value._fields[key]: new})
    if isinstance(value, (tuple, list)):
        return type(value)(new if index == key else item for index, item in enumerate(value))
    if isinstance(value, Mapping):
        value = copy.copy(value)
        value[key] = new
        return value
    if dataclasses.is_dataclass(value):
        return dataclasses.replace(value, **{key: new})
    value = copy.copy(value)
    setattr(value, key, new)
    return value


def _step(value: Any, key: int | str) -> Any:
    return value[key] if isinstance(value, (tuple, list, Mapping)) else getattr(value, key)


def _items(value: Any) -> list[tuple[int | str, Any]]:
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, (tuple, list)):
        return list(enumerate(value))
    return list(vars(value).items()) if dataclasses.is_dataclass(value) else []
