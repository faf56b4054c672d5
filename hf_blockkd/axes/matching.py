"""Which leaves of one model's axes another model, of the same class but narrower, has fewer entries of: `match`."""

from __future__ import annotations

import itertools

from .axis import Axis, find, flat


def match(wide: Axis, narrow: Axis) -> dict[Axis, int] | None:
    """Sizes that the leaves of an axis have in the narrower model, where both are made alike.

    Args:
        wide: Axis of a dimension of the wider model.
        narrow: That of the same dimension in the narrower one.

    Returns:
        Leaf of `wide` -> its size there; `None` if the axes are not made alike.

    Example:
        ```python
        >>> from hf_blockkd.axes.axis import Axis, split
        >>> from hf_blockkd.axes.matching import match
        >>> wide, narrow = Axis(12), Axis(6)
        >>> (heads, within), _ = split(wide, 4, 3), split(narrow, 2, 3)
        >>> match(wide, narrow) == {heads: 2, within: 3}
        True

        ```
    """
    wide, narrow = find(wide), find(narrow)
    if wide.kind == "leaf":
        return {wide: narrow.size} if narrow.kind == "leaf" or wide.size == narrow.size else None
    ours, theirs = (flat(axis) if axis.kind == wide.kind else [axis] for axis in (wide, narrow))
    if wide.kind == "sum":
        return _together(ours, theirs) if len(ours) == len(theirs) else None
    # One head, or one group, leaves no trace in a product.
    theirs = [part for part in theirs if part.size != 1]
    ways = itertools.combinations(range(len(ours)), len(theirs)) if len(theirs) <= len(ours) else ()
    found = []
    for places in ways:
        parts = [Axis(1)] * len(ours)
        for place, part in zip(places, theirs, strict=True):
            parts[place] = part
        if all(part.size <= one.size for one, part in zip(ours, parts, strict=True)):
            sizes = _together(ours, parts)
            if sizes is not None:
                found.append(sizes)
    # Of several ways, the one in which most parts keep their size.
    return max(found, key=lambda sizes: sum(leaf.size == size for leaf, size in sizes.items()), default=None)


def _together(ours: list[Axis], theirs: list[Axis]) -> dict[Axis, int] | None:
    sizes: dict[Axis, int] = {}
    for one, other in zip(ours, theirs, strict=True):
        found = match(one, other)
        if found is None or any(sizes.get(leaf, size) != size for leaf, size in found.items()):
            return None
        sizes |= found
    return sizes
