"""Inputs that a model accepts, made from its config alone: `dummy_inputs`."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

SEQUENCE_LENGTH = 8


def dummy_inputs(model: PreTrainedModel, batch_size: int = 2) -> dict[str, torch.Tensor]:
    """Make a small random batch for `model`, without labels.

    Args:
        model: A model whose main input is `pixel_values`, `input_ids` or both.
        batch_size: Number of rows.

    Returns:
        Keyword arguments for `model.forward`: images of shape (B, C, H, W) with values in [-1, 1], token ids of shape
        (B, 8), or (B, 2, 8) for multiple choice. Token ids avoid the config's special tokens, and each row ends with
        the end-of-sequence token where the config has one. The same batch comes out every time; the global random
        state stays as it was.

    Raises:
        ValueError: If the model's main input is of another kind.
    """
    generator = torch.Generator().manual_seed(0)
    parameters = inspect.signature(model.forward).parameters
    inputs: dict[str, torch.Tensor] = {}
    if model.main_input_name == "pixel_values":
        inputs["pixel_values"] = _images(model.config, batch_size, generator)
    elif model.main_input_name == "input_ids":
        inputs["input_ids"] = _token_ids(model, batch_size, generator)
        if "attention_mask" in parameters:
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if model.config.is_encoder_decoder and "decoder_input_ids" in parameters:
            inputs["decoder_input_ids"] = inputs["input_ids"].clone()
    else:
        raise ValueError(
            f"{type(model).__name__} takes {model.main_input_name!r}, for which no dummy input can be made; "
            "pass `inputs` instead."
        )
    # The weights of an offloaded model are nowhere; its hooks move what it gets.
    device = "cpu" if model.device.type == "meta" else model.device
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def _images(config: PreTrainedConfig, batch_size: int, generator: torch.Generator) -> torch.Tensor:
    vision = getattr(config, "vision_config", config)
    size = _first(vision, "image_size", "input_size", default=224)
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    channels = _first(vision, "num_channels", "in_channels", "in_chans", default=3)
    return torch.rand(batch_size, channels, height, width, generator=generator) * 2 - 1


def _token_ids(model: PreTrainedModel, batch_size: int, generator: torch.Generator) -> torch.Tensor:
    config = model.config.get_text_config()
    special = {
        value
        for name in ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "cls_token_id", "unk_token_id")
        for value in _as_list(getattr(config, name, None))
    }
    vocabulary = torch.tensor([token for token in range(config.vocab_size) if token not in special])
    shape = (batch_size, SEQUENCE_LENGTH)
    if type(model).__name__.endswith("ForMultipleChoice"):
        shape = (batch_size, 2, SEQUENCE_LENGTH)
    token_ids = vocabulary[torch.randint(len(vocabulary), shape, generator=generator)]
    end = _as_list(config.eos_token_id)
    if end and end[0] < config.vocab_size:
        token_ids[..., -1] = end[0]
    return token_ids


def _first(config: PreTrainedConfig, *names: str, default: Any) -> Any:
    return next((getattr(config, name) for name in names if getattr(config, name, None) is not None), default)


def _as_list(value: Any) -> list[int]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]
