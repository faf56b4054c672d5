"""Inputs that a model accepts, made from its config alone: `dummy_inputs`."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from .forwards import forward_parameters

SEQUENCE_LENGTH = 8
CHANNELS = ("num_channels", "in_channels", "in_chans")


def dummy_inputs(model: PreTrainedModel, batch_size: int = 2) -> dict[str, torch.Tensor]:
    """Make a small random batch for `model`, without labels.

    Args:
        model: A model of texts, images, videos, sounds or series; one of texts and of something else gets texts only.
        batch_size: Number of rows.

    Returns:
        Keyword arguments for `model.forward`: images of shape (B, C, H, W) with values in [-1, 1], token ids of shape
        (B, 8), or (B, 2, 8) for multiple choice, and likewise what else `FORMS` lists. Token ids avoid the config's
        special tokens, and each row ends with the end-of-sequence token where the config has one. Models of documents
        get empty boxes, too, models that take images as lists of patches get those, and decoders get token ids beside
        what the encoder reads. The same batch comes out every time; the global random state stays as it was.

    Raises:
        ValueError: If the model takes inputs of another kind.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    generator = torch.Generator().manual_seed(0)
    parameters = forward_parameters(model)
    inputs: dict[str, torch.Tensor] = {}
    if model.main_input_name != "pixel_values" and "input_ids" in parameters:
        inputs["input_ids"] = _token_ids(model, batch_size, generator)
        if "attention_mask" in parameters:
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if "bbox" in parameters:
            inputs["bbox"] = torch.zeros(*inputs["input_ids"].shape, 4, dtype=torch.long)
    elif "spatial_shapes" in parameters:
        inputs |= _patches(model.config, batch_size, generator)
    else:
        name, shape = _form(model, parameters)
        inputs[name] = torch.rand(batch_size, *shape, generator=generator) * 2 - 1
    if model.config.is_encoder_decoder and "decoder_input_ids" in parameters:
        ids = inputs.get("input_ids")
        inputs["decoder_input_ids"] = _token_ids(model, batch_size, generator) if ids is None else ids.clone()
    # The weights of an offloaded model are nowhere; its hooks move what it gets.
    device = "cpu" if model.device.type == "meta" else model.device
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def _form(model: PreTrainedModel, parameters: Collection[str]) -> tuple[str, tuple[int, ...]]:
    """Name of what a model reads, and the shape of one example of it by the first form whose fields its config has."""
    parts = [part for name in model.config.sub_configs if (part := getattr(model.config, name, None)) is not None]
    names = sorted(
        FORMS.keys() & set(parameters), key=lambda name: (name != model.main_input_name, list(FORMS).index(name))
    )
    for name in names:
        for fields, shape in FORMS[name]:
            for part in (model.config, *parts):
                if all(getattr(part, field, None) is not None for field in fields):
                    return name, shape(part)
        if name == "input_values" and hasattr(model, "_get_feat_extract_output_lengths"):
            return name, _wave_by_frames(model)
    if model.main_input_name not in parameters:
        raise ValueError(
            f"The forward of {type(model).__name__} takes {', '.join(parameters)} and does not name "
            f"{model.main_input_name!r}, so that what the model reads is not known; name its inputs in the signature."
        )
    raise ValueError(
        f"{type(model).__name__} takes {model.main_input_name!r}, of which no example can be made from its config; "
        "hf_blockkd knows models of texts, images, videos and sounds."
    )


def _image(config: PreTrainedConfig) -> tuple[int, ...]:
    return (_first(config, *CHANNELS, default=3), *(image_size(config) or (224, 224)))


def _wave(config: PreTrainedConfig) -> tuple[int, ...]:
    """Samples enough for the convolutions to make some frames of, and for some of these to be masked."""
    length = max(SEQUENCE_LENGTH, 2 * getattr(config, "mask_time_length", 0))
    for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
        length = (length - 1) * stride + kernel
    return (length,)


def _wave_by_frames(model: PreTrainedModel) -> tuple[int, ...]:
    """Samples that a model, whose convolutions its config does not tell, makes enough frames of."""
    length = 1
    while model._get_feat_extract_output_lengths(length) < SEQUENCE_LENGTH:
        length *= 2
    return (length,)


FORMS: dict[str, list[tuple[tuple[str, ...], Callable[[PreTrainedConfig], tuple[int, ...]]]]] = {
    "pixel_values": [
        (("num_frames",), lambda config: (config.num_frames, *_image(config))),
        (("image_size",), _image),
        (("num_channels",), _image),
        ((), _image),
    ],
    "pixel_values_videos": [(("frames_per_clip",), lambda config: (config.frames_per_clip, *_image(config)))],
    "input_values": [
        (("audio_config",), lambda config: (1, *_wave(config.audio_config))),
        (("conv_kernel", "conv_stride"), _wave),
        (("max_length", "num_mel_bins"), lambda config: (config.max_length, config.num_mel_bins)),
    ],
    "input_features": [
        (
            ("input_feat_per_channel", "input_channels"),
            lambda config: (4 * SEQUENCE_LENGTH, config.input_feat_per_channel * config.input_channels),
        ),
        (("feature_projection_input_dim",), lambda config: (2 * SEQUENCE_LENGTH, config.feature_projection_input_dim)),
        (
            ("num_mel_bins", "subsampling_conv_stride"),
            lambda config: (
                SEQUENCE_LENGTH * getattr(config, "subsampling_factor", config.subsampling_conv_stride**2),
                config.num_mel_bins,
            ),
        ),
        # The encoder halves its input.
        (
            ("num_mel_bins", "max_source_positions"),
            lambda config: (config.num_mel_bins, 2 * config.max_source_positions),
        ),
    ],
    "past_values": [
        (("context_length", "num_input_channels"), lambda config: (config.context_length, config.num_input_channels))
    ],
}
"""What a model reads, by the name of the argument -> fields of a config, and the shape of an example that they tell."""


def image_size(config: PreTrainedConfig) -> tuple[int, int] | None:
    """Height and width of the images that a config names."""
    size = _first(_vision(config), "image_size", "input_size", "crop_size", default=None)
    if size is None or isinstance(size, int):
        return size and (size, size)
    return (size["height"], size["width"]) if isinstance(size, Mapping) else tuple(size)[-2:]


def _vision(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of what sees the images."""
    return _first(config, "vision_config", *(["encoder"] if "encoder" in config.sub_configs else []), default=config)


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
    config = model.config.get_text_config(decoder=True)
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
