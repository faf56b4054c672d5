"""Students whose weights take few values: a fake quantizer, through which gradients pass as if it were not there."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from hf_blockkd import find_layer_stack

STEPS = {2: 1.596, 3: 1.224, 4: 0.9957, 8: 0.5860, 16: 0.3352}
"""Levels -> distance between them that rounds a normal variable with the least squared error (Max, 1960, table II)."""


class Rounded(nn.Module):
    """Rounds each row of a weight (out, in) to evenly spaced values around 0; the gradient is that of the identity.

    Args:
        levels: How many values a weight has: 3 are ternary, 4 are two bits.
    """

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.levels, self.step = levels, STEPS[levels]

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        step = self.step * weight.detach().square().mean(1, keepdim=True).sqrt()
        largest = (self.levels - 1) / 2
        middle = largest % 1  # an even number of levels lies around 0, an odd one on it
        rounded = ((weight / step - middle).round() + middle).clamp(-largest, largest) * step
        return weight + (rounded - weight).detach()


def quantize(model: PreTrainedModel, levels: int) -> PreTrainedModel:
    """The same model, whose layers' linear maps are rounded in every forward pass; embeddings and head stay whole.

    Args:
        model: Any whose layers are found.
        levels: How many values a weight has: 2, 3, 4, 8 or 16.

    Raises:
        ValueError: If there is no step for so many levels.
    """
    if levels not in STEPS:
        raise ValueError(f"`levels` is {levels}; choose one of {', '.join(map(str, STEPS))}.")
    for module in find_layer_stack(model).layers.modules():
        if isinstance(module, nn.Linear):
            parametrize.register_parametrization(module, "weight", Rounded(levels))
    return model
