"""Where a model keeps its layers: `find_layer_stack`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from .errors import UnsupportedArchitectureError


@dataclass(frozen=True)
class LayerStack:
    """The list of layers that a model runs one after the other.

    Attributes:
        path: Dotted name of the `nn.ModuleList` inside the model, e.g. `"vit.encoder.layer"`.
        layers: The list itself, in the order in which the model calls it.
    """

    path: str
    layers: nn.ModuleList

    def __len__(self) -> int:
        return len(self.layers)


def find_layer_stack(model: PreTrainedModel, layers_path: str | None = None) -> LayerStack:
    """Find the stack of layers of a transformers model.

    The stack is found by structure, not from a list of families: it is the outermost `nn.ModuleList` whose
    entries are transformer layers (`GradientCheckpointingLayer`), or else of one and the same class with
    parameters. Among several, a decoder wins in an encoder-decoder model, and then the one with most parameters.

    Args:
        model: Any transformers model, PEFT-wrapped ones included.
        layers_path: Dotted name of the `nn.ModuleList`, which skips the search.

    Returns:
        The stack, with its path in `model`.

    Raises:
        UnsupportedArchitectureError: If `layers_path` names no non-empty `nn.ModuleList`, or nothing is found.

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
    if layers_path is not None:
        try:
            layers = model.get_submodule(layers_path)
        except AttributeError:
            layers = None
        if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
            found = "nothing" if layers is None else f"a {type(layers).__name__}"
            raise UnsupportedArchitectureError(
                f"The layers path {layers_path!r} of {name} names {found} instead of a non-empty nn.ModuleList; "
                f"the ModuleLists of this model are {_module_list_paths(model) or 'none'}."
            )
        return LayerStack(layers_path, layers)

    candidates = _outermost_stacks(model)
    if not candidates:
        raise UnsupportedArchitectureError(
            f"{name} has no nn.ModuleList of layers of one kind to route hidden states through; "
            "name it with `student_layers_path`, `teacher_layers_path` or `layers_path` if it keeps one elsewhere."
        )
    is_encoder_decoder = getattr(model.config, "is_encoder_decoder", False)

    def preference(stack: LayerStack) -> tuple[bool, bool, int]:
        in_decoder = "decoder" in stack.path.split(".")
        return (
            _are_transformer_layers(stack.layers),
            is_encoder_decoder and in_decoder,
            sum(parameter.numel() for parameter in stack.layers.parameters()),
        )

    return max(candidates, key=preference)


def _are_transformer_layers(layers: nn.ModuleList) -> bool:
    return all(isinstance(layer, GradientCheckpointingLayer) for layer in layers)


def _is_stack(module: nn.Module) -> bool:
    if not isinstance(module, nn.ModuleList) or len(module) == 0:
        return False
    one_class = len({type(layer) for layer in module}) == 1 and type(module[0]).__module__ != nn.Linear.__module__
    return _are_transformer_layers(module) or (one_class and any(True for _ in module[0].parameters()))


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
