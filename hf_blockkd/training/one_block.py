"""The teacher with a single block of the student's: `OneBlock`, through maps from `fitted_paths`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers.utils import ModelOutput

from ..connectors.maps import connect
from ..models.heads import without_logits
from ..pairing.gradient_scale import GradientScale
from ..pairing.pair import Pair
from ..pairing.paths import MixedPaths
from ..routing.entering import Extras, capture_states, enter_at, record_extras
from .connector_start import fit_maps


@dataclass(frozen=True)
class OneBlock:
    """A hybrid that tells what one block of the student costs, whatever the others do.

    The teacher computes up to the block, a map leads into the student's states, the student computes its block, and a
    map leads back into the teacher, which computes the rest. The first block has the student's embeddings before it,
    and no map; behind the last one stands the teacher's head. What the maps before a block lose is no fault of the
    block: it is told by the teacher whose states go through both of them, there and back, before its own block. What
    a block's own states do not hold for the map behind it is part of what it costs.

    Attributes:
        paths: From `fitted_paths`.
        index: Of the block, from 1 to n.
        is_entry: Whether the teacher computes the block, too, behind both maps; before the first one there are none.
    """

    paths: MixedPaths
    index: int
    is_entry: bool = False

    def run(
        self, pair: Pair, model: nn.Module, inputs: Mapping[str, Any], teacher_inputs: Mapping[str, Any]
    ) -> ModelOutput:
        """Its outputs on a batch.

        Args:
            pair: The models.
            model: The student with all that is around it.
            inputs: The batch.
            teacher_inputs: What of it goes to the teacher; with labels, the outputs hold its loss, too.
        """
        place = self.index - 1
        states: dict[str, dict[int, torch.Tensor]] = {}
        extras: dict[str, Extras] = {}

        def forward(owner: str) -> None:
            role, own = {"S": ("student", model), "T": ("teacher", pair.teacher)}[owner]
            with without_logits(getattr(pair, f"{role}_head")):
                own(**pair.inputs_for(role, inputs))

        for owner in "T" if self.is_entry else "TS":
            stack, ends = self.paths.stacks[owner], self.paths.ends[owner]
            with capture_states(stack, ends) as states[owner], record_extras(stack) as extras[owner]:
                forward(owner)
        if self.is_entry:
            depth = self.paths.ends["T"][place - 1]
            there, back = (self.paths.connectors[owner][place - 1] for owner in "ST")
            squeezed = connect(back, connect(there, states["T"][depth]))
            with enter_at(self.paths.stacks["T"], depth, squeezed, extras["T"]):
                return pair.teacher(**teacher_inputs)
        # With one entry more than there are blocks, for the head, which is the teacher's.
        path = "T" * place + "S" + "T" * (len(pair.block_map) - place)
        with self.paths.enter(path, states, extras, forward, GradientScale(torch.tensor(1.0))):
            return pair.teacher(**teacher_inputs)


def fitted_paths(
    pair: Pair, model: nn.Module, batches: Iterable[Mapping[str, Any]], accelerator: Accelerator
) -> MixedPaths:
    """Hybrids of any kind, through affine maps that are fitted to the states of both models as they are now.

    They are not the connectors that the run trains, of which it may train a few or none: all are made alike, the
    identity where widths are equal, and corrected by least squares, as connectors begin.

    Args:
        pair: The models.
        model: The student with all that is around it.
        batches: From `calibration_batches`, on the device.
        accelerator: Of the run.
    """
    paths = pair.new_paths()
    maps = [
        (connector.to(accelerator.device), index, source, target)
        for source, target in ("ST", "TS")
        for index, connector in enumerate(paths.connectors[target], start=1)
    ]
    fit_maps(pair, model, maps, batches, accelerator)
    return paths
