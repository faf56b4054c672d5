"""How much each channel, head or neuron of a teacher matters: `activation_scores`, `weight_scores`, `random_scores`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..axes.axis import Axis, places
from ..axes.following import ModelAxes
from ..models.loading import weights_of
from ..pairing.positions import rows_without_padding
from ..routing.forwards import in_eval_mode
from ..routing.logits import only_logits
from .progress import bar

Scores = dict[Axis, torch.Tensor]
"""Leaf of the teacher's axes -> a number for each of its entries, of which the largest are kept."""

READERS: dict[type, int] = {nn.Linear: 1, Conv1D: 0, nn.Conv1d: 1, nn.Conv2d: 1}
"""Modules that multiply what they are given by a matrix -> the dimension of it that meets the input."""


def weight_scores(model: PreTrainedModel, axes: ModelAxes) -> Scores:
    """The share of an entry's weights in the squared norm of each tensor that has them, added up."""
    scores: Scores = {}
    weights = weights_of(model)
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            continue  # a bias says little, and offsets of norms are no sizes
        squares = weights[name].detach().float().square()
        for dim, axis in enumerate(axes.tensors[name]):
            _add(scores, axis, squares.sum([other for other in range(squares.ndim) if other != dim]))
    return scores


def random_scores(axes: ModelAxes, seed: int) -> Scores:
    """For comparison: entries drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    leaves = {leaf: None for dims in axes.tensors.values() for axis in dims for leaf in places(axis)}
    return {leaf: torch.rand(leaf.size, generator=generator) for leaf in leaves}


def activation_scores(model: PreTrainedModel, axes: ModelAxes, batches: Iterable[Mapping[str, Any]]) -> Scores:
    """The share of an entry in what the linear maps that read it compute, added up.

    That of entry i in a map W is the mean of x_i^2 over examples and positions, padding apart, times the squared norm
    of W's column i (the criterion of Wanda, arXiv 2306.11695, for whole columns): what is lost if it is left out, were
    the entries independent. What no linear map reads is scored by its weights.

    Args:
        model: The teacher.
        axes: Its axes.
        batches: Inputs of its forward.

    Returns:
        Scores of all its axes.
    """
    readers = [(name, module) for name, module in model.named_modules() if _reads(module)]
    squares: dict[str, torch.Tensor] = {}
    batch: Mapping[str, Any] = {}

    def keep(name: str, module: nn.Module, args: tuple) -> None:
        x = args[0].detach()
        x = x.movedim(1, -1) if isinstance(module, (nn.Conv1d, nn.Conv2d)) else x
        (rows,) = rows_without_padding(model, name, batch, x)
        own = rows.float().square().sum(0)
        squares[name] = squares[name] + own if name in squares else own

    with ExitStack() as hooks, torch.no_grad(), in_eval_mode(model), only_logits(model):
        for name, module in readers:
            handle = module.register_forward_pre_hook(lambda module, args, name=name: keep(name, module, args))
            hooks.callback(handle.remove)
        for batch in bar(batches, "Batches by which channels are chosen"):
            model(**batch)
    scores: Scores = {}
    weights = weights_of(model)
    for name, module in readers:
        if name not in squares:
            continue
        dim = _reads(module)[1]
        weight = weights[f"{name}.weight"].detach().float()
        norms = weight.square().sum([other for other in range(weight.ndim) if other != dim])
        _add(scores, axes.tensors[f"{name}.weight"][dim], squares[name].to(norms.device) * norms)
    return {**weight_scores(model, axes), **scores}


def _reads(module: nn.Module) -> tuple[type, int] | None:
    found = next(((kind, dim) for kind, dim in READERS.items() if isinstance(module, kind)), None)
    return None if found is None or getattr(module, "groups", 1) != 1 else found


def _add(scores: Scores, axis: Axis, values: torch.Tensor) -> None:
    """Add the shares of an axis' entries to the scores of its leaves."""
    values = (values / values.sum().clamp(min=torch.finfo(values.dtype).tiny)).double().cpu()
    for leaf, rows in places(axis).items():
        index = torch.tensor(rows, dtype=torch.long)
        own = torch.zeros(leaf.size, dtype=values.dtype).index_add_(0, index[index >= 0], values[index >= 0])
        scores[leaf] = scores[leaf] + own if leaf in scores else own
