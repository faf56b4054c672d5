"""Which positions of the last layer's states a model's head reads: `head_positions`."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from .dummy_inputs import dummy_inputs
from .entering import capture_states, enter_at, record_extras
from .forwards import in_eval_mode
from .layers import LayerStack
from .logits import main_outputs

LAST = -1
"""The last position of the model's inputs that is no padding."""


def head_positions(model: PreTrainedModel, stack: LayerStack) -> int | None:
    """Which positions of its last layer's states (B, T, D) a model's outputs depend on, by their gradient.

    Args:
        model: A model with one output row per example, such as a classifier of images or texts.
        stack: Its layers.

    Returns:
        How many from the first on, `LAST` for the last alone, `None` for all of them, where there are no positions, and
        where nothing is known of them.

    Example:
        ```python
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> from hf_blockkd.routing.head_positions import head_positions
        >>> from hf_blockkd.routing.layers import find_layer_stack
        >>> config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
        >>> model = BertForSequenceClassification(config)
        >>> head_positions(model, find_layer_stack(model))  # its pooler takes the first token
        1

        ```
    """
    inputs, depth = dummy_inputs(model), len(stack)
    with in_eval_mode(model):
        with torch.no_grad(), capture_states(stack, [depth]) as captured, record_extras(stack) as extras:
            model(**inputs)
        states = captured[depth].detach().requires_grad_()
        if states.ndim != 3:
            return None
        with torch.enable_grad(), enter_at(stack, depth, states, extras):
            outputs = main_outputs(model(**inputs))
            # A sum would say nothing of what a norm has centred.
            total = sum((torch.linspace(1, 2, one.numel(), device=one.device) * one.flatten()).sum() for one in outputs)
        # Of a head whose products have no gradient, such as those of torch's own quantization, nothing is known.
        (gradient,) = torch.autograd.grad(total, states, allow_unused=True) if total.requires_grad else (None,)
    if gradient is None:
        return None
    reads = gradient.ne(0).any(-1).any(0)
    count = int(reads.sum())
    if reads[:count].all() and count < len(reads):
        return count or None
    return LAST if count == 1 and reads[-1] else None


def read_by_head(positions: int | None, real: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Those of a batch's positions that `head_positions` names.

    Args:
        positions: What it gave.
        real: (B, T), which are no padding.
        mask: The same of what the model reads, where that is known: a decoder whose inputs are those of the encoder
            shifted by one has a position more, but its head reads where the inputs end.

    Returns:
        (B, T), of the same type.
    """
    if positions is None:
        return real
    places = torch.arange(real.shape[1], device=real.device)
    if positions == LAST:
        given = real if mask is None or mask.numel() != real.numel() else mask.reshape(real.shape).to(real)
        last = torch.where(given > 0, places, -1).amax(1, keepdim=True)
        return real * (places == last)
    return (places < positions).to(real).expand_as(real)  # a padded one, too: a head takes what stands there
