"""What the decoder of an encoder-decoder reads, made of the labels: `decoder_ids`."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from ..losses.rows import IGNORED
from ..routing.forwards import forward_parameters

START = "decoder_start_token_id"


def makes_decoder_ids(model: PreTrainedModel) -> bool:
    """Whether a model, given labels alone, makes the ids of its decoder of them."""
    takes_ids = "decoder_input_ids" in forward_parameters(model)
    generates = model.config.is_encoder_decoder and model.get_output_embeddings() is not None
    return hasattr(model, "prepare_decoder_input_ids_from_labels") or (takes_ids and generates)


def decoder_ids(model: PreTrainedModel, labels: torch.Tensor) -> torch.Tensor:
    """The labels, each a place later, after the token that begins every text.

    Args:
        model: The model, whose own way it is where it says so.
        labels: (B, T); ignored ones become padding.

    Raises:
        ValueError: If its config does not name that token.
    """
    own = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if own is not None:
        try:
            return own(labels)
        except AttributeError:  # of T5, whose config may have no such field at all
            if hasattr(model.config, START):
                raise
    config = model.config
    start = getattr(config, START, None)
    if start is None:
        raise ValueError(
            f"`decoder_input_ids` missing from the batch, and `{START}` of {type(model).__name__} is "
            "None, so that they cannot be made of the labels; set that field in its config, or add them in the "
            "collator."
        )
    padding = start if config.pad_token_id is None else config.pad_token_id
    ids = labels.roll(1, dims=-1)
    ids[..., 0] = start
    return ids.masked_fill(ids == IGNORED, padding)
