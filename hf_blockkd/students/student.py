"""A smaller model of the teacher's own kind, started from the teacher's weights: `make_student`."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..routing.layers import LayerStack, find_layer_stack

logger = logging.get_logger(__name__)

DEPTH_FIELDS = (
    "num_hidden_layers",
    "decoder_layers",
    "num_decoder_layers",
    "encoder_layers",
    "num_encoder_layers",
    "num_layers",
    "n_layer",
    "n_layers",
)


def make_student(
    teacher: PreTrainedModel,
    num_layers: int | None = None,
    hidden_size: int | None = None,
    layers: str | Sequence[int] = "even",
    layers_path: str | None = None,
    **config_overrides: Any,
) -> PreTrainedModel:
    """Make a shallower, and if wanted narrower, model of the teacher's class.

    At the teacher's width, embeddings, norms, head and the chosen layers are exact copies: a student with all layers
    gives the teacher's logits. A narrower student is newly initialised, except for the tensors whose shapes did not
    change; a warning counts what is new.

    Args:
        teacher: The model to take after. It is not changed.
        num_layers: Depth of the student, from 1 to the teacher's; default: as many as `layers` names, or all.
        hidden_size: Width; default: the teacher's. Heads keep their size, so it must be a multiple of that; the inner
            width of the MLPs shrinks alike.
        layers: Which teacher layers are kept: `"even"` spreads them from first to last, `"outer"` takes the first and
            the last ones, and a rising list of indices names them.
        layers_path: Dotted name of the stack where `find_layer_stack` should not search.
        **config_overrides: More fields of the student's config, e.g. `intermediate_size=256`.

    Returns:
        The student, in the teacher's dtype and train/eval mode, on the CPU or wherever the teacher is.

    Raises:
        ValueError: If depth, width or layer indices do not fit the teacher, or its config has no field for the depth.

    Example:
        ```python
        >>> import torch
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from hf_blockkd import make_student
        >>> teacher = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=4, n_head=2, vocab_size=99))
        >>> student = make_student(teacher, num_layers=2)
        >>> torch.equal(student.transformer.h[1].mlp.c_fc.weight, teacher.transformer.h[3].mlp.c_fc.weight)
        True

        ```
    """
    stack = find_layer_stack(teacher, layers_path)
    chosen = _choose_layers(len(stack), num_layers, layers)
    config = copy.deepcopy(teacher.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if hidden_size is not None:
        _narrow(config, hidden_size, teacher.main_input_name)
    _set_depth(config, type(teacher), stack, chosen)
    for name, value in config_overrides.items():
        setattr(config, name, value)

    student = type(teacher)(config).to(device=teacher.device, dtype=teacher.dtype)
    _carry_over(teacher, student, stack.path, chosen)
    if teacher.can_generate():
        student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.train(teacher.training)


def _choose_layers(depth: int, num_layers: int | None, layers: str | Sequence[int]) -> list[int]:
    if not isinstance(layers, str):
        chosen = list(layers)
        rises = all(a < b for a, b in itertools.pairwise(chosen))
        if not chosen or not rises or chosen[0] < 0 or chosen[-1] >= depth:
            raise ValueError(f"`layers` is {chosen}, but must be a rising list of layer indices from 0 to {depth - 1}.")
        if num_layers not in (None, len(chosen)):
            raise ValueError(
                f"`num_layers` is {num_layers}, but `layers` names {len(chosen)} layers; give one of them."
            )
        return chosen
    num_layers = depth if num_layers is None else num_layers
    if not 1 <= num_layers <= depth:
        raise ValueError(f"`num_layers` is {num_layers}, but must be from 1 to the teacher's depth, {depth}.")
    if layers == "even":
        return [round(i * (depth - 1) / max(num_layers - 1, 1)) for i in range(num_layers)]
    if layers == "outer":
        first = (num_layers + 1) // 2
        return [*range(first), *range(depth - (num_layers - first), depth)]
    raise ValueError(f"`layers` is {layers!r}; choose 'even', 'outer' or a list of layer indices.")


def _set_depth(config: PreTrainedConfig, model_class: type, stack: LayerStack, chosen: list[int]) -> None:
    """Set the field that governs the depth of `stack`, and thin out per-layer lists such as `layer_types`."""
    depth = len(stack)
    if len(chosen) == depth:
        return
    for part in (config, config.get_text_config(), getattr(config, "vision_config", None)):
        for field in DEPTH_FIELDS:
            if part is None or getattr(part, field, None) != depth:
                continue
            before = copy.deepcopy(vars(part))
            setattr(part, field, len(chosen))
            for name, value in before.items():
                if isinstance(value, (list, tuple)) and len(value) == depth:
                    setattr(part, name, type(value)(value[i] for i in chosen))
            with torch.device("meta"):
                if len(find_layer_stack(model_class(config), stack.path)) == len(chosen):
                    return
            vars(part).update(before)
    raise ValueError(
        f"The config of {model_class.__name__} has no field that sets the depth of {stack.path!r} (tried "
        f"{', '.join(DEPTH_FIELDS)}); build the student from a config of your own."
    )


def _narrow(config: PreTrainedConfig, hidden_size: int, main_input: str) -> None:
    """Set the width, keeping the size of a head and the ratio of the MLPs."""
    part = config
    if not hasattr(config, "hidden_size"):
        part = config.vision_config if main_input == "pixel_values" else config.get_text_config()
    width, heads = part.hidden_size, part.num_attention_heads
    # A config with `head_dim` of its own keeps it; else a head is its share of the width.
    head_dim = width // heads
    if hidden_size < head_dim or hidden_size % head_dim or hidden_size > width:
        raise ValueError(
            f"`hidden_size` is {hidden_size}, but must be a multiple of the teacher's head size, {head_dim}, and at "
            f"most its width, {width}."
        )
    part.hidden_size = hidden_size
    part.num_attention_heads = hidden_size // head_dim
    groups = getattr(part, "num_key_value_heads", None)
    if groups is not None:
        part.num_key_value_heads = max(1, groups * hidden_size // width)
        while part.num_attention_heads % part.num_key_value_heads:
            part.num_key_value_heads -= 1
    for field in ("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "n_inner", "hidden_dim"):
        inner = getattr(part, field, None)
        if isinstance(inner, int):
            setattr(part, field, inner * hidden_size // width)


@torch.no_grad()
def _carry_over(teacher: PreTrainedModel, student: PreTrainedModel, path: str, chosen: list[int]) -> None:
    source = teacher.state_dict()
    new, carried = [], set()
    for name, tensor in student.state_dict().items():
        origin = name
        if name.startswith(f"{path}."):
            index, _, rest = name.removeprefix(f"{path}.").partition(".")
            origin = f"{path}.{chosen[int(index)]}.{rest}"
            if origin not in source:
                origin = name  # what the first layer alone has, such as the position bias of T5
        if origin in source and source[origin].shape == tensor.shape:
            tensor.copy_(source[origin])
        else:
            new.append(name)
        carried.add(origin)
    if new:
        logger.warning(
            f"{len(new)} of the student's {len(student.state_dict())} tensors have other shapes than the teacher's and "
            f"are newly initialised, e.g. {new[0]}."
        )
    kept = tuple(f"{path}.{index}." for index in chosen)
    lost = [name for name in source if name.startswith(kept) and name not in carried]
    if lost:
        logger.warning(
            f"The student has no place for {len(lost)} of the tensors in the layers {chosen}, e.g. {lost[0]}; its own "
            "layers there are built in another way."
        )
