"""Inputs that a model accepts, made from its config alone: `dummy_inputs`."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

SEQUENCE_LENGTH = 8


def dummy_inputs(model: PreTrainedModel, batch_size: int = 2) -> dict[str, torch.Tensor]:
    """Make a small random batch for `model`, without labels.

    Args:
        model: A model that takes `pixel_values` or `input_ids`; one that takes both gets its main input only.
        batch_size: Number of rows.

    Returns:
        Keyword arguments for `model.forward`: images of shape (B, C, H, W) with values in [-1, 1], token ids of shape
        (B, 8), or (B, 2, 8) for multiple choice. Token ids avoid the config's special tokens, and each row ends with
        the end-of-sequence token where the config has one. Models of documents get empty boxes, too, and models that
        take images as lists of patches get those. The same batch comes out every time; the global random state stays
        as it was.

    Raises:
        ValueError: If the model takes inputs of another kind.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    generator = torch.Generator().manual_seed(0)
    parameters = inspect.signature(model.forward).parameters
    inputs: dict[str, torch.Tensor] = {}
    if model.main_input_name != "pixel_values" and "input_ids" in parameters:
        inputs["input_ids"] = _token_ids(model, batch_size, generator)
        if "attention_mask" in parameters:
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if "bbox" in parameters:
            inputs["bbox"] = torch.zeros(*inputs["input_ids"].shape, 4, dtype=torch.long)
        if model.config.is_encoder_decoder and "decoder_input_ids" in parameters:
            inputs["decoder_input_ids"] = inputs["input_ids"].clone()
    elif "spatial_shapes" in parameters:
        inputs |= _patches(model.config, batch_size, generator)
    elif "pixel_values" in parameters:
        inputs["pixel_values"] = _images(model.config, batch_size, generator)
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
    height, width = image_size(config) or (224, 224)
    channels = _first(vision, "num_channels", "in_channels", "in_chans", default=3)
    return torch.rand(batch_size, channels, height, width, generator=generator) * 2 - 1


def image_size(config: PreTrainedConfig) -> tuple[int, int] | None:
    """Height and width of the images that a config names."""
    size = _first(getattr(config, "vision_config", config), "image_size", "input_size", default=None)
    if size is None or isinstance(size, int):
        return size and (size, size)
    return (size["height"], size["width"]) if isinstance(size, Mapping) else tuple(size)[-2:]


def _patches(config: PreTrainedConfig, batch_size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Images of any size, as SigLIP 2 takes them: a list of patches, and how many there are in each direction."""
    vision = getattr(config, "vision_config", config)
    side = math.isqrt(vision.num_patches)
    width = vision.num_channels * vision.patch_size**2
    return {
        "pixel_values": torch.rand(batch_size, side**2, width, generator=generator) * 2 - 1,
        "pixel_attention_mask": torch.ones(batch_size, side**2, dtype=torch.long),
        "spatial_shapes": torch.full((batch_size, 2), side),
    }


def _token_ids(model: PreTrainedModel, batch_size: int, generator: torch.Generator) -> torch.Tensor:
    config = model.config.get_text_config()
    # Placeholders of images and sounds among them: each would ask for an image.
    special = {
        token
        for fields in (vars(model.config), vars(config))
        for name, value in fields.items()
        if name.endswith(("token_id", "token_index"))
        for token in _as_list(value)
    }
    # Models of characters have no vocabulary and take any number.
    size = _first(config, "vocab_size", default=100)
    vocabulary = torch.tensor([token for token in range(size) if token not in special])
    shape = (batch_size, SEQUENCE_LENGTH)
    if type(model).__name__.endswith("ForMultipleChoice"):
        shape = (batch_size, 2, SEQUENCE_LENGTH)
    token_ids = vocabulary[torch.randint(len(vocabulary), shape, generator=generator)]
    end = _as_list(getattr(config, "eos_token_id", None))
    if end and end[0] < size:
        token_ids[..., -1] = end[0]
    return token_ids


def _first(config: PreTrainedConfig, *names: str, default: Any) -> Any:
    return next((getattr(config, name) for name in names if getattr(config, name, None) is not None), default)


def _as_list(value: Any) -> list[int]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]
