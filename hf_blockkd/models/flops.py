"""Floating-point operations, a multiplication and an addition counted as two: `flop_counter`, `forward_flops`."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import PreTrainedModel

from ..routing.forwards import in_dtype_of, in_eval_mode
from ..routing.logits import only_logits


def _attention(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(
    gradient: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any
) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""The CPU's attention kernels, which torch's FlopCounterMode does not know and would count as nothing."""


def flop_counter() -> FlopCounterMode:
    """Counts what is computed inside of the context, forwards and backwards."""
    return FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)


@torch.enable_grad()  # without a graph, the counter stumbles over views of parameters (DeBERTa-v2)
def forward_flops(model: PreTrainedModel, inputs: Mapping[str, Any]) -> int:
    """FLOPs of one forward.

    Args:
        model: On any device. On `meta`, nothing is computed where its forward depends on shapes alone; where it looks
            at values, a model of its config runs on the CPU.
        inputs: Keyword arguments of its forward; they are brought to where the model is.

    Example:
        ```python
        >>> import torch
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from hf_blockkd.models.flops import forward_flops
        >>> with torch.device("meta"):
        ...     model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=1, vocab_size=99))
        >>> maps, attention, head = 12 * 32 * 32, 2 * 8 * 32, 99 * 32
        >>> forward_flops(model, {"input_ids": torch.ones(1, 8, dtype=torch.long)}) == 2 * 8 * (maps + attention + head)
        True

        ```
    """
    is_meta = model.device.type == "meta"
    moved = {name: one.to(model.device) if isinstance(one, torch.Tensor) else one for name, one in inputs.items()}
    if is_meta:  # masks are looked at, and change no number of operations
        moved = {name: one for name, one in moved.items() if not name.endswith("attention_mask")}
    try:
        with in_eval_mode(model), only_logits(model), flop_counter() as counter:
            model(**in_dtype_of(model, moved))
    except (NotImplementedError, RuntimeError, TypeError, ValueError):
        if not is_meta:
            raise
        return forward_flops(type(model)(copy.deepcopy(model.config)), inputs)
    return counter.get_total_flops()
