"""Which positions of hidden states are no padding: `position_mask`, `rows_without_padding`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from ..losses.rows import IGNORED
from ..routing.architectures import STEPS_FIRST


def position_mask(
    model: PreTrainedModel, path: str, inputs: Mapping[str, Any], states: torch.Tensor
) -> torch.Tensor | None:
    """Which positions of hidden states (B, T, D) are no padding, (B, T); `None` where nothing is known of them.

    Encoder-decoders are entered in their decoder, whose padding is not that of what the encoder reads: it stands in
    a mask of its own, follows from the labels, or is that of the inputs shifted by one, of which models that
    classify make their decoder's.

    Args:
        model: The model.
        path: Dotted name of the layers that the states stand between; empty for what the model returns.
        inputs: A batch; its labels are used where there are any.
        states: Of that batch.

    Example:
        ```python
        >>> import torch
        >>> from transformers import BertConfig, BertModel
        >>> from hf_blockkd.pairing.positions import position_mask
        >>> model = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9))
        >>> batch = {"attention_mask": torch.tensor([[1, 1, 0]])}
        >>> position_mask(model, "encoder.layer", batch, torch.zeros(1, 3, 8)).tolist()
        [[1, 1, 0]]

        ```
    """
    # OmniASR calls it by another name.
    mask, labels = inputs.get("attention_mask", inputs.get("padding_mask")), inputs.get("labels")
    shape = states.shape[:2]
    if mask is not None and mask.ndim == 2 and mask.shape[1] != shape[1]:
        mask = _of_frames(model, mask, shape[1])
    if model.config.is_encoder_decoder and "encoder" not in path.split("."):
        own = inputs.get("decoder_attention_mask")
        over_vocabulary = model.get_output_embeddings() is not None
        if own is None and over_vocabulary and labels is not None and labels.shape == shape:
            own = labels != IGNORED
        if own is None and mask is not None and inputs.get("decoder_input_ids") is None:
            own = torch.cat([mask[..., :1], mask[..., :-1]], dim=-1)
        mask = own
    return mask.reshape(shape) if mask is not None and mask.numel() == shape.numel() else None


def _of_frames(model: PreTrainedModel, mask: torch.Tensor, frames: int) -> torch.Tensor:
    """The mask of a sound's frames, of which there are fewer than of what the model reads, by the model's own rule."""
    mask = mask.long()  # what is no padding is counted
    for module in model.modules():
        if hasattr(module, "_get_feature_vector_attention_mask"):
            return module._get_feature_vector_attention_mask(frames, mask)
        if hasattr(module, "_get_output_attention_mask"):
            return module._get_output_attention_mask(mask, target_length=frames)
    return mask


def rows_without_padding(
    model: PreTrainedModel, path: str, inputs: Mapping[str, Any], *tensors: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """What stands in the last dimension of tensors of the same positions, (N, D), without those of padding.

    Args:
        model: The model.
        path: Dotted name of the module that reads or writes the tensors.
        inputs: A batch.
        tensors: Of that batch, as the module has them: (B, T, D), or (T, B, D) in layers that take steps first
            (`STEPS_FIRST`); in others, nothing is known of padding.

    Example:
        ```python
        >>> import torch
        >>> from transformers import BertConfig, BertModel
        >>> from hf_blockkd.pairing.positions import rows_without_padding
        >>> model = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9))
        >>> batch = {"attention_mask": torch.tensor([[1, 1, 0]])}
        >>> (rows,) = rows_without_padding(model, "encoder.layer", batch, torch.zeros(1, 3, 8))
        >>> tuple(rows.shape)
        (2, 8)

        ```
    """
    # Heads get states example by example.
    if model.config.model_type in STEPS_FIRST and any(part.isdigit() for part in path.split(".")):
        tensors = tuple(one.transpose(0, 1) for one in tensors)
    mask = position_mask(model, path, inputs, tensors[0]) if tensors[0].ndim == 3 else None
    rows = (tensor.flatten(0, -2) for tensor in tensors)
    return tuple(rows) if mask is None else tuple(own[mask.flatten().bool().to(own.device)] for own in rows)
