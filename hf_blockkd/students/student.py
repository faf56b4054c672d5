"""A smaller model of the teacher's own kind, started from the teacher's weights: `make_student`."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from ..models.adapters import base_of, has_adapters, merged_base
from ..models.loading import load_model
from ..models.quantized import packed_weights
from ..routing.layers import find_layer_stack
from .carrying import carry_over, compute_buffers, main_dtype
from .config_changes import student_config
from .layer_scores import choose_layers, whole_number


def make_student(
    teacher: PreTrainedModel | str | os.PathLike,
    num_layers: int | None = None,
    hidden_size: int | None = None,
    layers: str | Sequence[int] = "even",
    layers_path: str | None = None,
    dtype: torch.dtype | None = None,
    **config_overrides: Any,
) -> PreTrainedModel:
    """Make a shallower, and if wanted narrower, model of the teacher's class.

    At the teacher's width, embeddings, norms, head and the chosen layers are exact copies, buffers included, each in
    the dtype that the teacher has it in: a student with all layers gives the teacher's logits. A narrower student is
    newly initialised, except for the tensors whose shapes did not change; a warning counts what is new.

    Args:
        teacher: The model to take after, or its name or folder. It is not changed. Of a `PeftModel`, the student gets
            the base's weights with the adapter merged into them.
        num_layers: Depth of the student, from 1 to the teacher's; default: as many as `layers` names, or all.
        hidden_size: Width; default: the teacher's. Heads keep their size, so it must be a multiple of that; the inner
            width of the MLPs shrinks alike.
        layers: Which teacher layers are kept: `"even"` spreads them from first to last, `"outer"` takes the first and
            the last ones, and a rising list of indices names them.
        layers_path: Dotted name of the stack where `find_layer_stack` should not search.
        dtype: Of the student's weights, but for those that transformers keeps in float32 beside it. Default: the
            teacher's, but float32 for a float16 teacher, since weights in float16 cannot be trained: small updates
            vanish in them, and gradient scalers refuse them.
        **config_overrides: More fields of the student's config, e.g. `intermediate_size=256`; of a config with parts,
            a field of the part that the layers are built from is meant first.

    Returns:
        The student, in the teacher's train/eval mode, on the CPU or wherever the teacher is. All its weights require
        gradients, but for those that its class freezes itself.

    Raises:
        ValueError: If depth, width, layer indices or overrides do not fit the teacher or each other, its config has no
            field for the depth, or `teacher` is no model, is quantized, or has an adapter that cannot be merged.

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
    teacher = _plain_model(teacher)
    stack = find_layer_stack(teacher, layers_path)
    chosen = choose_layers(teacher, stack, num_layers, layers)
    hidden_size = None if hidden_size is None else whole_number("hidden_size", hidden_size)
    config = student_config(teacher, stack, chosen, hidden_size, config_overrides)
    dtype = _choose_dtype(main_dtype(teacher), dtype)

    device = torch.device("cpu") if teacher.device.type == "meta" else teacher.device
    # Built in the dtype of its weights, as `from_pretrained` does it, so that a reload builds the same buffers.
    student = compute_buffers(type(teacher)._from_config(config, dtype=dtype)).to(device)
    carry_over(teacher, student, stack.path, chosen, same_fields=hidden_size is None and not config_overrides)
    if teacher.can_generate():
        student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.train(teacher.training)


def _plain_model(teacher: Any) -> PreTrainedModel:
    """The teacher as a transformers model whose tensors are weights as they are multiplied."""
    teacher = load_model(os.fspath(teacher)) if isinstance(teacher, (str, os.PathLike)) else teacher
    base = base_of(teacher)
    if not isinstance(base, PreTrainedModel):
        raise ValueError(
            f"`teacher` is of type {type(base).__name__}, but must be a transformers model, its name or its folder."
        )
    packed = packed_weights(base)
    if packed:
        raise ValueError(
            f"The teacher's weights are quantized, e.g. {packed[0]!r}, and a student cannot be trained from those; "
            "load the teacher without `quantization_config`, or call its `dequantize()`."
        )
    return merged_base(teacher) if has_adapters(teacher) else teacher


def _choose_dtype(theirs: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    if dtype is None:
        return torch.float32 if theirs == torch.float16 else theirs
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        raise ValueError(f"`dtype` is {dtype!r}, but must be a dtype that trains, e.g. torch.float32.")
    return dtype
