"""Where blocks should end, by what each costs: `rebalance`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..pairing.blocks import BlockMap

LEAST = 0.05
"""What a layer of the teacher's costs at least, as a share of the mean: no measurement says that one is for nothing."""


@dataclass(frozen=True)
class Rebalanced:
    """What `rebalance` proposes, for a student of the same depth.

    Attributes:
        block_map: The student's blocks as they are, and other ends of the teacher's.
        layers: The teacher's layers that a student that is cut out of it should keep, one for each of its own.
    """

    block_map: BlockMap
    layers: list[int]


def rebalance(block_map: BlockMap, costs: Sequence[float]) -> Rebalanced:
    """Share the teacher's layers out so that every layer of the student answers for as much of the cost as any other.

    A block with twice the layers is taken to cost half as much, and its cost to be spread evenly over the teacher's
    layers that it answers for. The ends of the student's blocks stay: it has the same depth, and the same FLOPs, but
    its layers answer for few of the teacher's where a block is dear, and for many where it is cheap. Of those, one
    keeps the layer in the midst of the cost, and the first and the last one those at the ends, as an even cut does.

    Args:
        block_map: Of the run that was measured.
        costs: What each block costs; what costs nothing may be negative.

    Raises:
        ValueError: If there are not as many costs as blocks, one is not finite, none is above 0, or the student has as
            many layers as the teacher, or more, which leaves nothing to share out.

    Example:
        ```python
        >>> from hf_blockkd import BlockMap
        >>> from hf_blockkd.plan.rebalancing import rebalance
        >>> found = rebalance(BlockMap.even(3, 6, 3), [0.06, 0.0, 0.03])
        >>> found.block_map.teacher, found.layers
        ((1, 3, 6), [0, 1, 5])

        ```
    """
    depth, teacher_depth = block_map.student[-1], block_map.teacher[-1]
    if len(costs) != len(block_map):
        raise ValueError(f"There are {len(costs)} costs and {len(block_map)} blocks; give one for each.")
    if not all(map(math.isfinite, costs)):
        raise ValueError(f"The costs are {[*costs]}, which are not all finite; evaluate examples with labels.")
    if depth >= teacher_depth:
        raise ValueError(
            f"The student has {depth} layers and the teacher {teacher_depth}, so that none is left to share out; "
            "rebalance a student with fewer layers."
        )
    if not max(costs) > 0:
        raise ValueError("No block costs anything, so that there is nothing to share out; leave the student as it is.")
    ours, theirs = (list(itertools.pairwise((0, *ends))) for ends in (block_map.student, block_map.teacher))
    # Of each of the teacher's layers: the cost of its block, were it left to one layer of the student.
    work = [
        max(cost, 0.0) * (end - start) / (theirs_end - theirs_start)
        for cost, (start, end), (theirs_start, theirs_end) in zip(costs, ours, theirs, strict=True)
        for _ in range(theirs_start, theirs_end)
    ]
    least = LEAST * sum(work) / teacher_depth
    work = [max(one, least) for one in work]
    done = list(itertools.accumulate(work, initial=0.0))

    def place(share: float) -> float:
        """How deep in the teacher a share of all work is done."""
        wanted = share * done[-1]
        layer = next(layer for layer in range(teacher_depth) if done[layer + 1] >= wanted)
        return layer + (wanted - done[layer]) / work[layer]

    ends: list[int] = []
    for start, end in ours:
        lowest = (ends[-1] if ends else 0) + end - start
        ends.append(min(max(math.floor(place(end / depth) + 0.5), lowest), teacher_depth - (depth - end)))
    ends[-1] = teacher_depth
    layers = []
    for (start, end), (first, last) in zip(ours, itertools.pairwise((0, *ends)), strict=True):
        for own in range(start, end):
            # From the beginning of what the student's first layer answers for to the end of what its last one does.
            share = (own + (own / (depth - 1) if depth > 1 else 0.0)) / depth
            wanted = 0 if own == 0 else math.floor(place(share)) if own < depth - 1 else teacher_depth - 1
            lowest = max(first, layers[-1] + 1 if layers else 0)
            layers.append(min(max(wanted, lowest), last - (end - own)))
    return Rebalanced(BlockMap.from_boundaries(block_map.student, ends), layers)
