"""Hybrids that change between student and teacher wherever a path says so: `MixedPaths`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..connectors.maps import connect
from ..routing.entering import Extras, capture_states, enter_at
from ..routing.layers import LayerStack
from .blocks import BlockMap
from .gradient_scale import GradientScale

BlockStates = Mapping[str, Mapping[int, torch.Tensor]]
"""What left the layers of `"S"` and of `"T"` in their clean passes: owner -> end layer -> states."""


class MixedPaths:
    """Hybrids whose every block is the student's or the teacher's, written as a path: one S or T for each block.

    The embeddings are those of the first block's owner, norm, pooling and head those of the last one's. A connector
    stands wherever the owner changes. `"SST"` is stepping stone 2 of three; `"TSS"` begins with the teacher's first
    block and goes on through the student.

    Args:
        student_stack: The student's layers.
        teacher_stack: The teacher's.
        block_map: The cut of both.
        connectors: From the student's to the teacher's width, after each block.
        back_connectors: From the teacher's to the student's width, after each block but the last.
        recompute: As in `SteppingStones`.
    """

    def __init__(
        self,
        student_stack: LayerStack,
        teacher_stack: LayerStack,
        block_map: BlockMap,
        connectors: nn.ModuleList,
        back_connectors: nn.ModuleList,
        recompute: bool = False,
    ) -> None:
        self.stacks = {"S": student_stack, "T": teacher_stack}
        self.ends = {"S": block_map.student, "T": block_map.teacher}
        # By the owner that is entered.
        self.connectors = {"T": connectors, "S": back_connectors}
        # The student's layers see to themselves.
        self.recompute = {"T": recompute, "S": False}

    @contextmanager
    def enter(
        self,
        path: str,
        states: BlockStates,
        extras: Mapping[str, Extras],
        forward: Callable[[str], Any],
        scale: GradientScale,
    ) -> Iterator[str]:
        """Make the forward of the last block's owner, run inside the context, that of a path.

        Args:
            path: An owner for each block, both of them at least once.
            states: Of clean passes on the same batch, at least at the end of the path's first run of blocks.
            extras: From `record_extras` around the same passes.
            forward: Runs the model of an owner on the batch; it is called for runs of blocks in the midst of a path.
            scale: Of the gradients inside the teacher; what comes out of the teacher must go through its `leave`.

        Yields:
            The owner whose forward is to be run.
        """
        runs = []
        for owner, blocks in itertools.groupby(range(len(path)), key=path.__getitem__):
            blocks = list(blocks)
            runs.append((owner, blocks[0], blocks[-1]))
        (first, _, end), *middle, (last, begin, _) = runs
        hidden = states[first][self.ends[first][end]]
        for owner, start, end in middle:
            depth, until = self.ends[owner][start - 1], self.ends[owner][end]
            hidden = self._connect(owner, start, hidden, scale)
            entered = enter_at(self.stacks[owner], depth, hidden, extras[owner], until, self.recompute[owner])
            with entered, capture_states(self.stacks[owner], [until]) as left:
                forward(owner)
            hidden = scale.leave(left[until]) if owner == "T" else left[until]
        depth = self.ends[last][begin - 1]
        hidden = self._connect(last, begin, hidden, scale)
        with enter_at(self.stacks[last], depth, hidden, extras[last], recompute=self.recompute[last]):
            yield last

    def _connect(self, owner: str, block: int, states: torch.Tensor, scale: GradientScale) -> torch.Tensor:
        """States of the other model after `block` blocks, as `owner` takes them."""
        connected = connect(self.connectors[owner][block - 1], states)
        return scale.enter(connected) if owner == "T" else connected
