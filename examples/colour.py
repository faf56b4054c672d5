"""Grey models for colour images: pipelines read every image in colour, and no image processor makes one channel."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from task import AS_TRAINED
from transformers import AutoImageProcessor, AutoModelForImageClassification

LUMA = torch.tensor([0.299, 0.587, 0.114])
"""What red, green and blue add to grey, as PIL converts to it."""


def make_colour(folder: str | Path) -> None:
    """Change a saved model of one channel, and its image processor, so that they take images in colour.

    The convolutions that read the image make it grey, too, so that the logits stay those of the grey image.

    The model of one channel goes to a folder of its own there, `as_trained`.

    Args:
        folder: Written by `save_pretrained`; a model of three channels stays as it is.
    """
    grey = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=False)
    if getattr(grey.config, "num_channels", 3) != 1:
        return
    grey.save_pretrained(Path(folder, AS_TRAINED))
    config = copy.deepcopy(grey.config)
    config.num_channels = 3
    colour = type(grey)._from_config(config, dtype=grey.dtype)
    weights = grey.state_dict()
    for name, weight in colour.state_dict().items():
        if weight.shape != weights[name].shape:
            weights[name] = weights[name] * LUMA.to(weight.dtype).view(-1, 1, 1)
    colour.load_state_dict(weights)
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
    processor.image_mean, processor.image_std = list(processor.image_mean) * 3, list(processor.image_std) * 3
    colour.save_pretrained(folder)
    processor.save_pretrained(folder)
