"""What the structural search cannot know of a model: `Architecture`, `register_architecture`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from .errors import UnsupportedArchitectureError
from .places import Place


@dataclass(frozen=True)
class Architecture:
    """Where a model keeps its layers, and where these take and return the hidden states.

    Attributes:
        layers: Dotted name of an `nn.ModuleList` or `nn.Sequential`, or a function that takes the model and returns its
            layers in the order in which its forward calls them.
        entry: Argument of a layer that takes the states, by position (default: the first) or by name. A tuple leads
            further in: `(0, "states")` is the entry `"states"` of a dictionary, or the attribute of an object, that
            comes first.
        exit: Where the states lie in what a layer returns, by index, key or attribute, or a tuple of those that leads
            further in; default: the first tensor.

    Example:
        ```python
        >>> from hf_blockkd import Architecture
        >>> Architecture(layers="trunk.blocks", entry=1, exit=(0, "states")).layers
        'trunk.blocks'

        ```
    """

    layers: str | Callable[[PreTrainedModel], Iterable[nn.Module]]
    entry: int | str | Place = 0
    exit: int | str | Place | None = None


def _embeddings_and_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """Layers of models that keep the embeddings of their stages in one list, and the layers of each in another."""
    encoder = model.base_model.encoder
    stages = zip(encoder.patch_embeddings, encoder.block, strict=True)
    return [layer for embeddings, block in stages for layer in (embeddings, *block)]


def _cvt_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Layers inside the stages of CvT, whose last stage hands the class token on beside the states."""
    return [layer for stage in model.base_model.encoder.stages for layer in (stage.embedding, *stage.layers)]


ARCHITECTURES = {
    "cvt": Architecture(layers=_cvt_layers),
    "poolformer": Architecture(layers=_embeddings_and_blocks),
    "pvt": Architecture(layers=_embeddings_and_blocks),
}
"""By model type, as configs name it."""
STEPS_FIRST = frozenset({"fsmt", "xlnet"})
"""Model types whose layers take states (T, B, D); everywhere else they are (B, T, D)."""


def register_architecture(model_type: str, architecture: Architecture) -> None:
    """Tell how states are routed through a model that transformers does not ship, or that keeps its layers elsewhere.

    Everything else (masks, norms, heads) stays the business of the model's own forward. Check the result with
    [`check_routing`]: an error of 0.0 says that the description is right.

    Args:
        model_type: `model_type` of the model's config.
        architecture: Where its layers are; a later registration replaces an earlier one.

    Raises:
        ValueError: If the model type is empty.

    Example:
        ```python
        >>> import torch
        >>> from torch import nn
        >>> from transformers import PreTrainedConfig, PreTrainedModel
        >>> from transformers.modeling_outputs import SequenceClassifierOutput
        >>> from hf_blockkd import Architecture, check_routing, register_architecture
        >>> class RobotConfig(PreTrainedConfig):
        ...     model_type = "robot"
        >>> class RobotLayer(nn.Linear):  # takes its states second, and returns a dictionary
        ...     def forward(self, scale, states):
        ...         return {"scale": scale, "states": states + scale * super().forward(states).relu()}
        >>> class RobotForSequenceClassification(PreTrainedModel):
        ...     config_class = RobotConfig
        ...     main_input_name = "input_ids"
        ...     def __init__(self, config):
        ...         super().__init__(config)
        ...         self.embed, self.head = nn.Embedding(99, 16), nn.Linear(16, 3)
        ...         self.knee, self.hip, self.arm = (RobotLayer(16, 16) for _ in range(3))
        ...     def forward(self, input_ids):
        ...         states, scale = self.embed(input_ids), 1.0
        ...         for layer in (self.knee, self.hip, self.arm):
        ...             states = layer(scale, states)["states"]
        ...         return SequenceClassifierOutput(logits=self.head(states.mean(1)))
        >>> robot = Architecture(layers=lambda model: [model.knee, model.hip, model.arm], entry="states", exit="states")
        >>> register_architecture("robot", robot)
        >>> model = RobotForSequenceClassification(RobotConfig())
        >>> check_routing(model, {"input_ids": torch.tensor([[1, 2, 3]])}).max_abs_error
        0.0

        ```
    """
    if not model_type:
        raise ValueError("`model_type` is empty; give the model's config class a `model_type` of its own, and name it.")
    ARCHITECTURES[model_type] = architecture


def as_place(way: int | str | Place | None) -> Place | None:
    """An `entry` or `exit` as the tuple that it is short for."""
    return way if way is None or isinstance(way, tuple) else (way,)


def registered_layers(model: PreTrainedModel, architecture: Architecture) -> tuple[str, nn.ModuleList | nn.Sequential]:
    """Path and layers of a model that a registered architecture describes.

    Raises:
        UnsupportedArchitectureError: If its function does not return the model's own modules.
    """
    layers = list(architecture.layers(model))
    names = {id(module): name for name, module in model.named_modules()}
    if not layers or any(id(layer) not in names for layer in layers):
        raise UnsupportedArchitectureError(
            f"`layers` of the Architecture registered for {type(model).__name__} (model type "
            f"{model.config.model_type!r}) returns {len(layers)} layers, of which "
            f"{sum(id(layer) not in names for layer in layers)} are no modules of the model; return a list of its own."
        )
    paths = [names[id(layer)] for layer in layers]
    # The list is not the model's, but its entries are.
    return ", ".join(paths if len(paths) < 4 else (*paths[:2], "...", paths[-1])), nn.ModuleList(layers)
