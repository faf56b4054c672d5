"""One dimension of a tensor, as far as it is known: `Axis`, and how two of them become one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(eq=False)
class Axis:
    """A dimension, which may turn out to be the same as another one, or to be made of smaller ones.

    Attributes:
        size: Its length.
        kind: `"leaf"`; or `"product"`, of parts from the outermost, as heads and what is in each; or `"sum"`, of parts
            one after the other, as queries, keys and values in one matrix.
        parts: What it is made of.
        same: The axis that it has turned out to be.
        fixed: Why its entries must all stay where they are, if they must.

    Example:
        ```python
        >>> from hf_blockkd.axes.axis import Axis, cut, split, unify
        >>> queries_and_keys, states = Axis(12), Axis(6)
        >>> unify(cut(queries_and_keys, 0, 6), states)
        >>> heads, within = split(cut(queries_and_keys, 6, 6), 3, 2)
        >>> print(queries_and_keys)
        (6 + 3*2)

        ```
    """

    size: int
    kind: str = "leaf"
    parts: list[Axis] = field(default_factory=list)
    same: Axis | None = None
    fixed: str | None = None

    def __str__(self) -> str:
        axis = find(self)
        inner = ("*" if axis.kind == "product" else " + ").join(map(str, flat(axis))) or str(axis.size)
        return f"({inner})" if axis.kind == "sum" else inner


def find(axis: Axis) -> Axis:
    """The axis that stands for all that it is the same as."""
    while axis.same is not None:
        if axis.same.same is not None:
            axis.same = axis.same.same
        axis = axis.same
    return axis


def leaves(axis: Axis) -> Iterator[Axis]:
    """The smallest parts of an axis, from the outermost or first."""
    axis = find(axis)
    if axis.kind == "leaf":
        yield axis
    for part in axis.parts:
        yield from leaves(part)


def fix(axis: Axis, reason: str) -> None:
    """Say that the entries of an axis must stay where they are; the first reason counts."""
    for leaf in leaves(axis):
        leaf.fixed = leaf.fixed or reason


def product(axes: Iterable[Axis]) -> Axis:
    """What a view makes of neighbouring dimensions, from the outermost."""
    axes = [axis for axis in axes if axis.size != 1]
    if len(axes) == 1:
        return axes[0]
    return Axis(math.prod(axis.size for axis in axes), "product" if axes else "leaf", axes)


def total(axes: Iterable[Axis]) -> Axis:
    """Axes one after the other."""
    axes = [axis for axis in axes if axis.size != 0]
    return axes[0] if len(axes) == 1 else Axis(sum(axis.size for axis in axes), "sum" if axes else "leaf", axes)


def unify(a: Axis, b: Axis) -> None:
    """Note that two axes are one, whose entries match one by one; where their parts do not, all of them are fixed."""
    a, b = find(a), find(b)
    if a is b:
        return
    if a.size != b.size:
        _give_up(a, b)
    elif a.kind == "leaf" or b.kind == "leaf":
        leaf, other = (a, b) if a.kind == "leaf" else (b, a)
        leaf.same = other
        if leaf.fixed:
            fix(other, leaf.fixed)
    elif a.kind == b.kind == "sum":
        _unify_sums(a, b)
    else:
        _unify_products(a, b)


def _unify_sums(a: Axis, b: Axis) -> None:
    ends = sorted({end for axis in (a, b) for end in _ends(axis)})
    pairs = [[cut(axis, start, end - start) for axis in (a, b)] for start, end in itertools.pairwise([0, *ends])]
    a.same = b
    for ours, theirs in pairs:
        unify(ours, theirs)


def _unify_products(a: Axis, b: Axis) -> None:
    """Two products, or a product and a sum of what repeats the product's inner part."""
    if b.kind == "sum":
        a, b = b, a
    *_, inner = _factors(b)
    if a.kind == "product":
        inner = min(inner, _factors(a)[-1], key=lambda axis: axis.size)
    ours, theirs = (split(axis, axis.size // inner.size, inner.size) for axis in (a, b))
    if find(a) is not find(b):
        find(a).same = find(b)
    for one, other in zip(ours, theirs, strict=True):
        unify(one, other)


def split(axis: Axis, outer: int, inner: int) -> tuple[Axis, Axis]:
    """See an axis as `outer` times `inner` entries."""
    axis = find(axis)
    if axis.size != outer * inner:
        raise ValueError(f"An axis of {axis.size} is not {outer} times {inner}.")
    if outer == 1 or inner == 1:
        return (Axis(1), axis) if outer == 1 else (axis, Axis(1))
    if axis.kind == "leaf":
        parts = [Axis(outer, fixed=axis.fixed), Axis(inner, fixed=axis.fixed)]
        axis.kind, axis.parts = "product", parts
        return parts[0], parts[1]
    if axis.kind == "sum":
        if any(find(part).size % inner for part in axis.parts):
            return _unknown(axis, outer, inner)
        pairs = [split(part, find(part).size // inner, inner) for part in axis.parts]
        first, *others = (within for _, within in pairs)
        for other in others:
            unify(first, other)
        above = total(one for one, _ in pairs)
        axis.kind, axis.parts = "product", [above, first]
        return above, first
    factors, below, within = _factors(axis), [], 1
    while within < inner:
        factor = factors.pop()
        share = inner // within
        if factor.size > share:
            if inner % within or factor.size % share:
                return _unknown(axis, outer, inner)
            above, factor = split(factor, factor.size // share, share)
            factors.append(above)
        elif inner % (within * factor.size):
            return _unknown(axis, outer, inner)
        below.insert(0, factor)
        within *= factor.size
    return product(factors), product(below)


def cut(axis: Axis, start: int, length: int) -> Axis:
    """The part of an axis from one entry on."""
    axis = find(axis)
    if length == axis.size:
        return axis
    if length == 0:
        return Axis(0)
    if axis.kind == "leaf":
        sizes = [size for size in (start, length, axis.size - start - length) if size]
        axis.kind, axis.parts = "sum", [Axis(size, fixed=axis.fixed) for size in sizes]
        return axis.parts[1 if start else 0]
    if axis.kind == "product":
        outer, *others = _factors(axis)
        inner = axis.size // outer.size
        if start % inner or length % inner:
            (unknown,) = _unknown(axis, length)
            return unknown
        return product([cut(outer, start // inner, length // inner), *others])
    found, position = [], 0
    for part in map(find, axis.parts):
        first, last = max(start, position), min(start + length, position + part.size)
        if first < last:
            found.append(cut(part, first - position, last - first))
        position += part.size
    return total(found)


def regroup(axes: Sequence[Axis], shape: Sequence[int]) -> list[Axis]:
    """The axes of a view of a tensor of `axes` in another shape."""
    return [made for own, sizes in _rearranged(axes, shape) for made in _regroup(own, sizes)]


def _rearranged(axes: Sequence[Axis], shape: Sequence[int]) -> Iterator[tuple[Sequence[Axis], Sequence[int]]]:
    """The runs of dimensions that a view rearranges among themselves, the shortest that there are."""
    if not all(axis.size for axis in axes):
        yield axes, shape
        return
    first, second = 0, 0
    while first < len(axes) or second < len(shape):
        start, other, ours, theirs = first, second, 1, 1
        while ours != theirs or (first, second) == (start, other):
            if first < len(axes) and ours <= theirs:
                ours *= axes[first].size
                first += 1
            else:
                theirs *= shape[second]
                second += 1
        yield axes[start:first], shape[other:second]


def _regroup(axes: Sequence[Axis], shape: Sequence[int]) -> list[Axis]:
    given, made = list(axes), []
    for size in shape:
        below: list[Axis] = []
        length = 1
        while length < size and given:
            axis = given.pop(0)
            if size % (length * axis.size) == 0:
                below.append(axis)
                length *= axis.size
            elif axis.size % (size // length) == 0 and size % length == 0:
                first, rest = split(axis, size // length, axis.size * length // size)
                below.append(first)
                given.insert(0, rest)
                length = size
            else:
                return list(_unknown(product([*axes]), *shape))
        made.append(product(below))
    return made


def entries(axis: Axis, chosen: Mapping[Axis, Sequence[int]]) -> list[int]:
    """The entries of an axis, of whose leaves some keep a choice of theirs, in its order.

    Args:
        axis: The axis.
        chosen: Leaf -> its entries that are kept; all are of leaves that are not named.

    Example:
        ```python
        >>> from hf_blockkd.axes.axis import Axis, entries, split
        >>> axis = Axis(6)
        >>> heads, within = split(axis, 3, 2)
        >>> entries(axis, {heads: [0, 2]})
        [0, 1, 4, 5]

        ```
    """
    axis = find(axis)
    if axis.kind == "leaf":
        return list(chosen.get(axis, range(axis.size)))
    found: list[int] = [] if axis.kind == "sum" else [0]
    position = 0
    for part in axis.parts:
        own = entries(part, chosen)
        if axis.kind == "sum":
            found += [position + entry for entry in own]
            position += part.size
        else:
            found = [part.size * outer + inner for outer in found for inner in own]
    return found


def places(axis: Axis) -> dict[Axis, list[int]]:
    """For each leaf of an axis, which of its entries each entry of the axis is; -1 where it is none.

    Example:
        ```python
        >>> from hf_blockkd.axes.axis import Axis, places, split
        >>> heads, within = split(axis := Axis(6), 3, 2)
        >>> places(axis)[heads]
        [0, 0, 1, 1, 2, 2]

        ```
    """
    axis = find(axis)
    if axis.kind == "leaf":
        return {axis: list(range(axis.size))}
    found: dict[Axis, list[int]] = {}
    outer, start = 1, 0
    for part in axis.parts:
        inner = axis.size // (outer * part.size)
        for leaf, own in places(part).items():
            if axis.kind == "product":
                found[leaf] = [place for place in own for _ in range(inner)] * outer
            else:
                row = found.setdefault(leaf, [-1] * axis.size)
                row[start : start + part.size] = own
        outer *= part.size if axis.kind == "product" else 1
        start += part.size
    return found


def _factors(axis: Axis) -> list[Axis]:
    axis = find(axis)
    return flat(axis) if axis.kind == "product" else [axis]


def flat(axis: Axis) -> list[Axis]:
    """The parts of an axis, and for those that are made in the same way theirs."""
    parts = [find(part) for part in axis.parts]
    return [inner for part in parts for inner in (flat(part) if part.kind == axis.kind else [part])]


def _ends(axis: Axis) -> Iterator[int]:
    position = 0
    for part in axis.parts:
        position += part.size
        yield position


def _give_up(*axes: Axis) -> None:
    for axis in axes:
        fix(axis, "its parts are read in ways that do not go together")


def _unknown(axis: Axis, *sizes: int) -> tuple[Axis, ...]:
    """New axes for what no parts of an axis stand for."""
    _give_up(axis)
    made = tuple(Axis(size) for size in sizes)
    _give_up(*made)
    return made
