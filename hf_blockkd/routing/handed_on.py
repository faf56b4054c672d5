"""What layers hand on to later ones beside what they return: `record_writes` and `replay_writes`.

Gemma 3n and Gemma 4 give all layers one dictionary; some put keys and values into it, and later ones attend to those.
Where a layer is skipped, what it wrote on the clean pass stands there all the same.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

Writes = dict[str, dict[Any, Any]]
"""Argument that holds a dictionary -> its entries that a layer wrote."""


@contextmanager
def record_writes(layers: nn.ModuleList) -> Iterator[dict[int, Writes]]:
    """Record what the layers write into dictionaries that they are given, during a forward inside the context.

    Yields:
        A dictionary that the forward fills: index of a layer -> what it wrote; absent where that is nothing.
    """
    writes: dict[int, Writes] = {}
    before: dict[int, dict[str, dict[Any, Any]]] = {}

    def look(index: int, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        before[index] = {name: dict(value) for name, value in _dictionaries(kwargs)}

    def keep(index: int, layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        for name, value in _dictionaries(kwargs):
            old = before[index][name]
            written = {key: one for key, one in value.items() if key not in old or old[key] is not one}
            if written:
                writes.setdefault(index, {})[name] = written

    handles = [layer.register_forward_pre_hook(partial(look, i), with_kwargs=True) for i, layer in enumerate(layers)]
    handles += [layer.register_forward_hook(partial(keep, i), with_kwargs=True) for i, layer in enumerate(layers)]
    try:
        yield writes
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replay_writes(layers: nn.ModuleList, skipped: Collection[int], writes: Mapping[int, Writes]) -> Iterator[None]:
    """Make the skipped layers write what `record_writes` saw them write.

    Args:
        layers: The stack.
        skipped: Indices of the layers whose own forward does not run.
        writes: From `record_writes`.
    """

    def write(index: int, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        for name, entries in writes[index].items():
            kwargs[name].update(entries)

    handles = [
        layers[index].register_forward_pre_hook(partial(write, index), with_kwargs=True)
        for index in skipped
        if index in writes
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _dictionaries(arguments: Mapping[str, Any]) -> Iterator[tuple[str, MutableMapping]]:
    return ((name, value) for name, value in arguments.items() if isinstance(value, MutableMapping))
