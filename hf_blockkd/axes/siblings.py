"""Axes of modules that a forward did not reach, such as experts that got no token: those of their siblings."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping

from .axis import Axis, find, leaves

Dims = tuple[Axis, ...]


def as_siblings(
    tensors: Mapping[str, Dims], unread: Collection[str], others: Iterable[Dims] = ()
) -> Iterator[tuple[str, Dims]]:
    """Find a sibling that was read of each module that was not, and give it the same axes.

    Siblings have one name but for a number, and tensors of the same names and shapes. What only the one that was read
    has, as the neurons inside of it, the other has of its own; what others share with it, as the states, it shares.

    Args:
        tensors: Name of each tensor of a model -> the axes of its dimensions.
        unread: Names of those of which nothing is known.
        others: Axes of tensors beside these.

    Returns:
        Name and axes of each tensor of which something is known now.

    Example:
        ```python
        >>> from hf_blockkd.axes.axis import Axis
        >>> from hf_blockkd.axes.siblings import as_siblings
        >>> states, neurons = Axis(4), Axis(8)
        >>> tensors = {"norm": (states,), "experts.0.up": (neurons, states), "experts.1.up": (Axis(8), Axis(4))}
        >>> ((name, (own, shared)),) = as_siblings(tensors, {"experts.1.up"})
        >>> name, own is neurons, shared is states
        ('experts.1.up', False, True)

        ```
    """
    places: dict[Axis, set[str]] = {}
    for name, dims in [*tensors.items(), *(("", dims) for dims in others)]:
        for axis in dims:
            for leaf in leaves(axis):
                places.setdefault(leaf, set()).add(name)
    by_module: dict[str, dict[str, Dims]] = {}
    for name, dims in tensors.items():
        for number in re.finditer(r"\d+(?=\.)", name):
            by_module.setdefault(name[: number.end()], {})[name[number.end() :]] = dims
    found: set[str] = set()
    # Outer modules first, so that what is inside of one that was not reached stays together.
    for module, own in sorted(by_module.items(), key=lambda one: len(one[0])):
        names = {f"{module}{rest}" for rest in own}
        sibling = _sibling(module, by_module, unread) if names <= set(unread) - found else None
        if sibling is not None:
            inside = {f"{sibling}{rest}" for rest in own}
            copies = {leaf: Axis(leaf.size, fixed=leaf.fixed) for leaf, users in places.items() if users <= inside}
            yield from ((f"{module}{rest}", _copies(by_module[sibling][rest], copies)) for rest in own)
            found |= names


def _sibling(module: str, by_module: Mapping[str, Mapping[str, Dims]], unread: Collection[str]) -> str | None:
    """The first module of the same name but for the number, with the same tensors, all of which were read."""

    def shapes(one: str) -> dict[str, list[int]]:
        return {rest: [axis.size for axis in dims] for rest, dims in by_module[one].items()}

    name = module.rstrip("0123456789")
    for other, own in by_module.items():
        was_read = not any(f"{other}{rest}" in unread for rest in own)
        if other.rstrip("0123456789") == name and was_read and shapes(other) == shapes(module):
            return other
    return None


def _copies(axes: Iterable[Axis], copies: Mapping[Axis, Axis]) -> Dims:
    """Axes in which some leaves are exchanged for others."""

    def copied(axis: Axis) -> Axis:
        axis = find(axis)
        if not any(leaf in copies for leaf in leaves(axis)):
            return axis
        return copies.get(axis) or Axis(axis.size, axis.kind, [copied(part) for part in axis.parts])

    return tuple(map(copied, axes))
