"""Where connectors begin: drawn from how they were made to what brings the student's states near the teacher's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..connectors.bridges import BridgedConnector
from ..connectors.least_squares import LeastSquares
from ..connectors.maps import features_and_map, is_fixed_identity
from ..data.calibration import NUM_EXAMPLES
from ..models.heads import without_logits
from ..pairing.pair import Pair
from ..routing.entering import capture_states
from ..routing.forwards import in_eval_mode

MAX_POSITIONS = 64
"""Of an example, in the mean; as many rows as fit connectors of a few thousand inputs."""
RIDGE = 1.0
"""Penalty on changed weights, as much as a standardised input varies: what a fresh student's states say faintly leaves
connectors as they were made, and so free to ask for other states."""


def stones_to_fit(pair: Pair, connector_start: str, rows: Callable[[], Sized], teacher_is_base: bool) -> list[int]:
    """Stones whose connectors a run fits before it begins, or has fitted where it is resumed.

    None that is to stay the identity; and none at all where there are fewer than 256 examples to fit them to, or the
    teacher is the student's own base, whose states are the same.

    Args:
        pair: The models.
        connector_start: As in the configuration.
        rows: Gives the examples that they are fitted to, which are read where they are asked for; those of the first
            process count.
        teacher_is_base: Whether the teacher is the student's own base.
    """
    if connector_start != "least_squares" or teacher_is_base:
        return []
    # What is to stay the identity is not brought nearer to anything.
    stones = [i for i in pair.trained_stones if not is_fixed_identity(pair.connectors[i - 1])]
    return stones if stones and broadcast_object_list([len(rows())])[0] >= NUM_EXAMPLES else []


def fit_connectors(
    pair: Pair, model: nn.Module, batches: Iterable[Mapping[str, Any]], accelerator: Accelerator
) -> None:
    """Fit the connectors of `fitted_stones`, and those back to the student's width, on some batches in eval mode.

    An untrained map would feed the teacher's layers states of a scale and a direction that they have never seen, and
    what stepping stones teach would be lost until it has been learned. The least squares are those of a correction to
    the map as it was made, so that equal states leave an identity one, to the bit. Every process fits all by itself.

    Args:
        pair: The models.
        model: The student with all that is around it, not yet sharded.
        batches: From `calibration_batches`, on the device.
        accelerator: Of the run.
    """
    maps = [(pair.connectors[i - 1], i, "S", "T") for i in pair.fitted_stones]
    maps += [(connector, i, "T", "S") for i, connector in enumerate(pair.back, start=1)]
    fit_maps(pair, model, maps, batches, accelerator)


def fit_maps(
    pair: Pair,
    model: nn.Module,
    maps: Sequence[tuple[nn.Module, int, str, str]],
    batches: Iterable[Mapping[str, Any]],
    accelerator: Accelerator,
) -> None:
    """Fit maps between the states of both models at the ends of blocks, as `fit_connectors` does.

    Args:
        pair: The models.
        model: The student with all that is around it, not yet sharded.
        maps: Each with the index of its block, the owner of the states that it takes, `"S"` or `"T"`, and of those that
            it should give.
        batches: From `calibration_batches`, on the device.
        accelerator: Of the run.
    """
    device = accelerator.device
    fits = [LeastSquares("cpu" if device.type == "mps" else device) for _ in maps]
    models = {"S": (pair.student, pair.stones.student_stack), "T": (pair.teacher, pair.stones.teacher_stack)}
    ends = {"S": pair.block_map.student, "T": pair.block_map.teacher}
    roles = {"S": "student", "T": "teacher"}
    with torch.no_grad(), in_eval_mode(model):
        for norm in model.modules():
            # One that has seen no batch knows no statistics yet: in eval mode its states are not those of training.
            if isinstance(norm, _BatchNorm) and norm.running_mean is not None and not norm.running_mean.any():
                norm.train()
        for batch in batches:
            pair.check_batch(batch)
            states = {}
            for owner, (own, stack) in models.items():
                head = getattr(pair, f"{roles[owner]}_head")
                with without_logits(head), accelerator.autocast(), capture_states(stack, ends[owner]) as states[owner]:
                    own(**pair.inputs_for(roles[owner], batch))
            for fit, (connector, index, source, target) in zip(fits, maps, strict=True):
                ours, theirs = (states[owner][ends[owner][index - 1]] for owner in (source, target))
                fit.add(*_rows(connector, ours, theirs, pair, batch))
        for fit, (connector, *_) in zip(fits, maps, strict=True):
            weight, bias = fit.solve(RIDGE)
            if torch.isfinite(weight).all() and torch.isfinite(bias).all():  # else the first step says what is wrong
                _, last = features_and_map(_width(connector))
                last.weight.copy_(broadcast(last.weight + weight.to(last.weight)))
                last.bias.copy_(broadcast(last.bias + bias.to(last.bias)))


def _width(connector: nn.Module) -> nn.Module:
    """What maps the width, without a bridge."""
    return connector.width if isinstance(connector, BridgedConnector) else connector


def _rows(
    connector: nn.Module, ours: torch.Tensor, theirs: torch.Tensor, pair: Pair, batch: Mapping[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """What enters the last map of a connector, and what it lacks yet: a row for each position that is no padding."""
    features, last = features_and_map(_width(connector))
    x, y = features(ours.to(last.weight.dtype)), theirs
    if isinstance(connector, BridgedConnector):
        # Bridges mix places and the last map mixes features: which comes first makes no difference.
        target = connector.bridge.target
        x, y = target.tokens(connector.bridge(ours.to(last.weight.dtype), features)), target.tokens(theirs)
    y = y.to(x.dtype) - last(x)
    num_examples = len(x)
    mask = pair.position_mask(batch, x) if x.ndim == 3 else None
    x, y = x.flatten(0, -2), y.flatten(0, -2)
    if mask is not None:
        real = mask.flatten().bool()
        x, y = x[real], y[real]
    if len(x) > MAX_POSITIONS * num_examples:
        places = torch.linspace(0, len(x) - 1, MAX_POSITIONS * num_examples, device=x.device).long()
        x, y = x[places], y[places]
    return x, y
