"""Where a model keeps its layers: `find_layer_stack`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from .architectures import ARCHITECTURES, STEPS_FIRST, as_place, registered_layers
from .errors import UnsupportedArchitectureError
from .places import Place


@dataclass(frozen=True)
class LayerStack:
    """The list of layers that a model runs one after the other.

    Attributes:
        path: Dotted name of the `nn.ModuleList` inside the model, e.g. `"vit.encoder.layer"`; those of the layers where
            a registered architecture lists them one by one.
        layers: The list itself, in the order in which the model calls it.
        entry: Argument of a layer that takes the hidden states, and the way to them inside it.
        exit: Way to the hidden states in what a layer returns; `None` for the first tensor.
        are_levels: Whether the head may read what leaves any layer, as those that make maps of classes do.
        steps_first: Whether the layers take states (T, B, D), which are captured and entered as (B, T, D) all the same.
    """

    path: str
    layers: nn.ModuleList | nn.Sequential
    entry: Place = (0,)
    exit: Place | None = None
    are_levels: bool = False
    steps_first: bool = False

    def turned(self, states: torch.Tensor) -> torch.Tensor:
        """States as the layers take them, from those of one example after the other, or back."""
        return states.transpose(0, 1) if self.steps_first else states

    @property
    def search_path(self) -> str | None:
        """Where to find the same layers in another model of the class; `None` where an architecture lists them."""
        return None if ", " in self.path else self.path

    def __len__(self) -> int:
        return len(self.layers)


def find_layer_stack(model: PreTrainedModel, layers_path: str | None = None) -> LayerStack:
    """Find the stack of layers of a transformers model.

    The stack is found by structure, not from a list of families: it is the outermost `nn.ModuleList` whose
    entries are transformer layers (`GradientCheckpointingLayer`), or else of one and the same class with
    parameters, or else stages: several hold such lists themselves. Among several, those in the decoder
    (`model.get_decoder()`: of encoder-decoders, and the text model of models that read images or sounds, too) win, then
    the outermost, and then the one with most parameters. A model type that `register_architecture` knows is not
    searched.

    Args:
        model: Any transformers model, PEFT-wrapped ones included.
        layers_path: Dotted name of the `nn.ModuleList` or `nn.Sequential` of layers, which skips the search.

    Returns:
        The stack, with its path in `model`.

    Raises:
        UnsupportedArchitectureError: If `layers_path` names no non-empty list, nothing is found, or what is found holds
            no whole layers.

    Example:
        ```python
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> from hf_blockkd import find_layer_stack
        >>> model = ViTForImageClassification(ViTConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=2))
        >>> len(find_layer_stack(model))
        3

        ```
    """
    name = type(model).__name__
    architecture = ARCHITECTURES.get(model.config.model_type)
    ways = {
        "are_levels": model.loss_type == "ForSemanticSegmentation",
        "steps_first": model.config.model_type in STEPS_FIRST,
    }
    if architecture is not None:
        ways |= {"entry": as_place(architecture.entry), "exit": as_place(architecture.exit)}
        if layers_path is None and callable(architecture.layers):
            return LayerStack(*registered_layers(model, architecture), **ways)
        layers_path = layers_path or architecture.layers
    if layers_path is not None:
        try:
            layers = model.get_submodule(layers_path)
        except AttributeError:
            layers = None
        if not isinstance(layers, (nn.ModuleList, nn.Sequential)) or len(layers) == 0:
            found = "nothing" if layers is None else f"a {type(layers).__name__}"
            raise UnsupportedArchitectureError(
                f"The layers path {layers_path!r} of {name} names {found} instead of a non-empty nn.ModuleList; "
                f"the ModuleLists of this model are {_module_list_paths(model) or 'none'}."
            )
        return LayerStack(layers_path, layers, **ways)

    candidates = _outermost_stacks(model)
    if not candidates:
        raise UnsupportedArchitectureError(
            f"{name} has no nn.ModuleList of layers of one kind to route hidden states through; "
            "name it with `student_layers_path`, `teacher_layers_path` or `layers_path` if it keeps one elsewhere, or "
            "describe it with `hf_blockkd.register_architecture`."
        )
    decoder = set(model.get_decoder().modules())

    def preference(stack: LayerStack) -> tuple[bool, bool, int, int]:
        return (
            _are_transformer_layers(stack.layers),
            stack.layers in decoder,
            # Towers for images and sounds lie deeper than the layers that they feed.
            -stack.path.count("."),
            sum(parameter.numel() for parameter in stack.layers.parameters()),
        )

    stack = max(candidates, key=preference)
    _check_that_layers_are_whole(model, stack)
    return replace(stack, **ways)


def _check_that_layers_are_whole(model: PreTrainedModel, stack: LayerStack) -> None:
    """Refuse lists of lists, and lists that hold one part of every layer while their neighbours hold the others."""
    name = type(model).__name__
    parent_path = stack.path.rpartition(".")[0]
    parent = model.get_submodule(parent_path)
    if isinstance(parent, nn.ModuleList) or isinstance(stack.layers[0], nn.ModuleList):
        path = parent_path if isinstance(parent, nn.ModuleList) else stack.path
        raise UnsupportedArchitectureError(
            f"{name} keeps its layers in {path!r}, a list of lists that its forward walks through itself, so there is "
            "no one stack; name one of the inner lists with a layers path to route through it alone."
        )
    if _are_transformer_layers(stack.layers):
        return
    parts = [one for one, module in parent.named_children() if _is_stack(module) and len(module) == len(stack)]
    if len(parts) > 1 and len(stack) > 1:
        raise UnsupportedArchitectureError(
            f"{name} keeps the parts of each layer in lists of their own ({', '.join(parts)}), so no list holds whole "
            "layers to route hidden states through; name another one with a layers path if there is."
        )


def _are_transformer_layers(layers: nn.ModuleList) -> bool:
    return all(isinstance(layer, GradientCheckpointingLayer) for layer in layers)


def _is_stack(module: nn.Module) -> bool:
    if not isinstance(module, nn.ModuleList) or len(module) == 0:
        return False
    one_class = len({type(layer) for layer in module}) == 1 and type(module[0]).__module__ != nn.Linear.__module__
    return (
        _are_transformer_layers(module)
        or (one_class and any(True for _ in module[0].parameters()))
        or _are_stages(module)
    )


def _are_stages(layers: nn.ModuleList) -> bool:
    """Whether several of them hold lists of their own, as stages of different kinds do (MobileViT, SwiftFormer)."""
    called = not any(isinstance(layer, (nn.ModuleList, nn.ModuleDict)) for layer in layers)
    lists = (any(isinstance(inner, nn.ModuleList) and len(inner) for inner in layer.modules()) for layer in layers)
    return called and sum(lists) > 1


def _outermost_stacks(model: nn.Module) -> list[LayerStack]:
    """All stacks that do not lie inside a layer of another stack."""
    stacks: list[LayerStack] = []
    for path, module in model.named_modules():
        if _is_stack(module) and not any(path.startswith(f"{outer.path}.") for outer in stacks):
            stacks.append(LayerStack(path, module))
    return stacks


def _module_list_paths(model: nn.Module) -> str:
    paths = [path for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    return ", ".join(paths[:8]) + (", ..." if len(paths) > 8 else "")
