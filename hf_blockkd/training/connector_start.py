"""Where connectors begin: drawn from how they were made to what brings the student's states near the teacher's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Subset

from ..connectors.geometry import BridgedConnector
from ..connectors.maps import features_and_map
from ..data.seeding import random_states
from ..routing.entering import capture_states
from .evaluation import in_eval_mode

if TYPE_CHECKING:
    from ..trainer import BlockwiseDistillTrainer

NUM_EXAMPLES = 256
"""Training examples that connectors are fitted to."""
BATCH_SIZE = 8
"""Not the run's, so that connectors begin alike however its batches are split."""
MAX_POSITIONS = 64
"""Of an example, in the mean; as many rows as fit connectors of a few thousand inputs."""
RIDGE = 1.0
"""Penalty on changed weights, as much as a standardised input varies: what a fresh student's states say faintly leaves
connectors as they were made, and so free to ask for other states."""


class LeastSquares:
    """The affine map from rows of x to rows of y with the least squared error, from the moments of both.

    Args:
        device: Where the moments are summed, in float64.

    Example:
        ```python
        >>> import torch
        >>> from hf_blockkd.training.connector_start import LeastSquares
        >>> x = torch.tensor([[1.0], [2.0], [4.0]])
        >>> fit = LeastSquares()
        >>> fit.add(x, 3 * x + 1)
        >>> weight, bias = fit.solve(ridge=0.0)
        >>> round(weight.item(), 6), round(bias.item(), 6)
        (3.0, 1.0)

        ```
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = device
        self.moments: torch.Tensor | None = None

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Take in rows: x (N, D) and y (N, D')."""
        x, y = (rows.to(self.device).double() for rows in (x, y))
        with_one = torch.cat([torch.ones_like(x[:, :1]), x], dim=1)
        moments = with_one.T @ torch.cat([with_one, y], dim=1)
        self.moments = moments if self.moments is None else self.moments + moments

    def solve(self, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight (D', D) and bias (D') as of `nn.Linear`, with a penalty on the weights of standardised inputs."""
        width = len(self.moments) - 1
        means = self.moments[0, 1:] / self.moments[0, 0]
        seconds = self.moments[1:, 1:] / self.moments[0, 0]
        covariance = seconds - means[:width, None] * means
        variance, second = covariance.diagonal(), seconds.diagonal()
        # What never changes belongs to the bias.
        scale = torch.where(variance > 1e-10 * second, variance.clamp(min=1e-300).rsqrt(), 0.0)[:, None]
        inputs = scale * covariance[:, :width] * scale.T + ridge * torch.eye(width).to(scale)
        inputs.diagonal()[scale[:, 0] == 0] = 1.0
        weight = scale * torch.linalg.solve(inputs, scale * covariance[:, width:])
        return weight.T, means[width:] - means[:width] @ weight


def stones_to_fit(trainer: BlockwiseDistillTrainer) -> list[int]:
    """Stones whose connectors a run of this trainer fits before it begins, or has fitted where it is resumed.

    None where there are fewer than 256 examples to fit them to, nor where the teacher is the student's own base, whose
    states are the same.
    """
    dataset = trainer.train_dataset
    has_enough = dataset is not None and (_is_stream(dataset) or len(dataset) >= NUM_EXAMPLES)
    is_fitted = trainer.args.connector_start == "least_squares" and has_enough and not trainer.teacher_is_base
    return list(trainer.pair.trained_stones) if is_fitted else []


def fit_connectors(trainer: BlockwiseDistillTrainer) -> None:
    """Fit the connectors of `fitted_stones`, and those back to the student's width, on 256 examples in eval mode.

    An untrained map would feed the teacher's layers states of a scale and a direction that they have never seen, and
    what stepping stones teach would be lost until it has been learned. The least squares are those of a correction to
    the map as it was made, so that equal states leave an identity one, to the bit. Every process fits all by itself.

    Args:
        trainer: Before a run begins, its student not yet wrapped or sharded.
    """
    pair = trainer.pair
    # Connector, index of its block, owner of the states that it takes, and of those that it should give.
    connectors = [(pair.connectors[i - 1], i, "S", "T") for i in pair.fitted_stones]
    back = pair.all_connectors[len(pair.connectors) :]
    connectors += [(connector, i, "T", "S") for i, connector in enumerate(back, start=1)]
    device = trainer.accelerator.device
    fits = [LeastSquares("cpu" if device.type == "mps" else device) for _ in connectors]
    models = {"S": (pair.student, pair.stones.student_stack), "T": (pair.teacher, pair.stones.teacher_stack)}
    ends = {"S": pair.block_map.student, "T": pair.block_map.teacher}
    roles = {"S": "student", "T": "teacher"}
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        trainer.model.to(device)  # which would else follow when it is sharded
    with torch.no_grad(), in_eval_mode(trainer.model):
        for batch in _batches(trainer):
            states = {}
            for owner, (model, stack) in models.items():
                with trainer.accelerator.autocast(), capture_states(stack, ends[owner]) as states[owner]:
                    model(**pair.inputs_for(roles[owner], batch))
            for fit, (connector, index, source, target) in zip(fits, connectors, strict=True):
                ours, theirs = (states[owner][ends[owner][index - 1]] for owner in (source, target))
                fit.add(*_rows(connector, ours, theirs, batch.get("attention_mask")))
        for fit, (connector, *_) in zip(fits, connectors, strict=True):
            weight, bias = fit.solve(RIDGE)
            if torch.isfinite(weight).all() and torch.isfinite(bias).all():  # else the first step says what is wrong
                _, last = features_and_map(_width(connector))
                last.weight.copy_(broadcast(last.weight + weight.to(last.weight)))
                last.bias.copy_(broadcast(last.bias + bias.to(last.bias)))


def _width(connector: nn.Module) -> nn.Module:
    """What maps the width, without a bridge."""
    return connector.width if isinstance(connector, BridgedConnector) else connector


def _is_stream(dataset: Any) -> bool:
    return isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__")


def _batches(trainer: BlockwiseDistillTrainer) -> Iterator[dict[str, Any]]:
    """Some training examples, the same ones on every rank, with random transforms drawn from states of their own."""
    dataset, args = trainer.train_dataset, trainer.args
    seed = args.seed if args.data_seed is None else args.data_seed
    if not _is_stream(dataset):
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
        chosen = order[:NUM_EXAMPLES]
        dataset = dataset.select(chosen) if hasattr(dataset, "select") else Subset(dataset, chosen)
    collator = trainer.data_collator
    if isinstance(dataset, Dataset):
        dataset = trainer._remove_unused_columns(dataset, description="training")
    else:
        collator = trainer._get_collator_with_removed_columns(collator, description="training")
    # Without a generator of its own, a loader draws from the global one.
    batches = iter(DataLoader(dataset, BATCH_SIZE, collate_fn=collator, generator=torch.Generator()))
    for number in range(NUM_EXAMPLES // BATCH_SIZE):
        with random_states(f"connectors {seed} {number}"):
            batch = next(batches, None)
        if batch is None:
            return
        batch = trainer._prepare_inputs(batch)
        trainer.pair.check_batch(batch)
        yield batch


def _rows(
    connector: nn.Module, ours: torch.Tensor, theirs: torch.Tensor, mask: torch.Tensor | None
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
    x, y = x.flatten(0, -2), y.flatten(0, -2)
    if mask is not None and mask.numel() == len(x):
        real = mask.flatten().bool()
        x, y = x[real], y[real]
    if len(x) > MAX_POSITIONS * num_examples:
        places = torch.linspace(0, len(x) - 1, MAX_POSITIONS * num_examples, device=x.device).long()
        x, y = x[places], y[places]
    return x, y
