"""A small spiking convolutional network as a transformers model: LIF neurons of snntorch, rates at the ends of blocks.

    pip install snntorch

Importing this file makes `AutoModelForImageClassification` know the model type `spiking`. Each of its layers hands on
the rates at which its neurons fire, maps of (B, C, H, W), and the spikes themselves, of which the next layer is made:
so an ordinary connector maps rates into a teacher's remaining layers, as arXiv 2503.16572 does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel, initialization
from transformers.modeling_outputs import ImageClassifierOutput


class SpikingConfig(PreTrainedConfig):
    """Shape of a spiking network.

    Attributes:
        hidden_sizes: Channels of each layer.
        strides: By which each layer shrinks its maps.
        patch_size: Side of the patches of which the first currents are made.
        time_steps: How often neurons may fire for an image, which is shown at every step.
        leak: Share of a membrane's potential that is left after a step.
        num_channels: Of the images.
        image_size: Their side, or height and width.
    """

    model_type = "spiking"

    def __init__(
        self,
        hidden_sizes: tuple[int, ...] = (32, 64, 64),
        strides: tuple[int, ...] = (1, 2, 1),
        patch_size: int = 4,
        time_steps: int = 4,
        leak: float = 0.5,
        num_channels: int = 3,
        image_size: int | tuple[int, int] = 32,
        **kwargs: Any,
    ) -> None:
        self.hidden_sizes, self.strides, self.patch_size = hidden_sizes, strides, patch_size
        self.time_steps, self.leak = time_steps, leak
        self.num_channels, self.image_size = num_channels, image_size
        super().__init__(**kwargs)


class Neurons(nn.Module):
    """Leaky integrate-and-fire neurons of a norm of currents (T, B, C, H, W); returns their spikes, of that shape."""

    def __init__(self, channels: int, leak: float) -> None:
        from snntorch import Leaky, surrogate

        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.membrane = Leaky(leak, spike_grad=surrogate.atan())

    def forward(self, currents: torch.Tensor) -> torch.Tensor:
        currents = self.norm(currents.flatten(0, 1)).unflatten(0, currents.shape[:2])
        potential, spikes = torch.zeros_like(currents[0]), []
        for current in currents:
            spike, potential = self.membrane(current, potential)
            spikes.append(spike)
        self.membrane.reset_mem()  # else it keeps the graph of the step
        return torch.stack(spikes)


class SpikingLayer(nn.Module):
    """Two convolutions with neurons, around which the spikes that came in are added to the second's currents."""

    def __init__(self, inside: int, outside: int, stride: int, leak: float) -> None:
        super().__init__()
        self.first = nn.Conv2d(inside, outside, 3, stride, padding=1, bias=False)
        self.second = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        self.around = nn.Conv2d(inside, outside, 1, stride, bias=False)
        self.inner, self.outer = Neurons(outside, leak), Neurons(outside, leak)

    def forward(self, rates: torch.Tensor, spikes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        inner = self.inner(_at_each_step(self.first, spikes))
        spikes = self.outer(_at_each_step(self.second, inner) + _at_each_step(self.around, spikes))
        return spikes.mean(0), spikes


def _at_each_step(convolution: nn.Conv2d, spikes: torch.Tensor) -> torch.Tensor:
    return convolution(spikes.flatten(0, 1)).unflatten(0, spikes.shape[:2])


class SpikingForImageClassification(PreTrainedModel):
    """Patches, spiking layers, and a linear head on the mean rates."""

    config_class = SpikingConfig
    main_input_name = "pixel_values"

    def __init__(self, config: SpikingConfig) -> None:
        super().__init__(config)
        sizes = config.hidden_sizes
        self.patches = nn.Conv2d(config.num_channels, sizes[0], config.patch_size, config.patch_size, bias=False)
        self.neurons = Neurons(sizes[0], config.leak)
        shapes = zip((sizes[0], *sizes), sizes, config.strides, strict=False)
        self.layers = nn.ModuleList(SpikingLayer(*shape, config.leak) for shape in shapes)
        self.classifier = nn.Linear(sizes[-1], config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d):
            initialization.kaiming_normal_(module.weight)  # neurons that never fire have no rates to fit connectors to

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> ImageClassifierOutput:
        currents = self.patches(pixel_values)
        spikes = self.neurons(currents.expand(self.config.time_steps, *currents.shape))
        rates = spikes.mean(0)
        for layer in self.layers:
            rates, spikes = layer(rates, spikes)
        logits = self.classifier(rates.mean((2, 3)))
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return ImageClassifierOutput(loss=loss, logits=logits)


AutoConfig.register("spiking", SpikingConfig)
AutoModelForImageClassification.register(SpikingConfig, SpikingForImageClassification)
