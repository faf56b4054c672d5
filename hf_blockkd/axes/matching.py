"""Which leaves of one model's axes another model, of the same class but narrower, has fewer entries of: `matches`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from .axis import Axis, find, flat, total


def matches(wide: Axis, narrow: Axis) -> list[dict[Axis, int]]:
    """Sizes that the leaves of an axis may have in the narrower model, where both are made alike.

    Args:
        wide: Axis of a dimension of the wider model.
        narrow: That of the same dimension in the narrower one.

    Returns:
        Each way to match them, leaf of `wide` -> its size there, from those that keep most sizes; none if the axes are
        not made alike. There are several where a part of one entry leaves no trace: of 2 groups of 2 queries, 2 may be
        one group, or one query of each.

    Example:
        ```python
        >>> from hf_blockkd.axes.axis import Axis, split
        >>> from hf_blockkd.axes.matching import matches
        >>> wide, narrow = Axis(12), Axis(6)
        >>> (heads, within), _ = split(wide, 4, 3), split(narrow, 2, 3)
        >>> matches(wide, narrow) == [{heads: 2, within: 3}]
        True

        ```
    """
    wide, narrow = find(wide), find(narrow)
    if wide.kind == "leaf":
        return [{wide: narrow.size}] if narrow.kind == "leaf" or wide.size == narrow.size else []
    ours, theirs = (flat(axis) if axis.kind == wide.kind else [axis] for axis in (wide, narrow))
    if wide.kind == "sum":
        return [sizes for parts in _runs(theirs, len(ours)) for sizes in _together(ours, parts)]
    # One head, or one group, leaves no trace in a product.
    theirs = [part for part in theirs if part.size != 1]
    ways = itertools.combinations(range(len(ours)), len(theirs)) if len(theirs) <= len(ours) else ()
    found: list[dict[Axis, int]] = []
    for places in ways:
        parts = [Axis(1)] * len(ours)
        for place, part in zip(places, theirs, strict=True):
            parts[place] = part
        if all(part.size <= one.size for one, part in zip(ours, parts, strict=True)):
            found += [sizes for sizes in _together(ours, parts) if sizes not in found]
    return sorted(found, key=lambda sizes: -sum(leaf.size == size for leaf, size in sizes.items()))


def _runs(parts: list[Axis], number: int) -> Iterator[list[Axis]]:
    """The ways to see parts as so many runs of them: the parts of one head stand in a sum as if it were none."""
    for cuts in itertools.combinations(range(1, len(parts)), number - 1):
        yield [total(parts[start:end]) for start, end in itertools.pairwise([0, *cuts, len(parts)])]


def _together(ours: list[Axis], theirs: list[Axis]) -> list[dict[Axis, int]]:
    found: list[dict[Axis, int]] = [{}]
    for one, other in zip(ours, theirs, strict=True):
        found = [
            {**sizes, **own}
            for sizes in found
            for own in matches(one, other)
            if all(sizes.get(leaf, size) == size for leaf, size in own.items())
        ]
    return found
