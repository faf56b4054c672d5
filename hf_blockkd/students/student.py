"""A smaller model of the teacher's own kind, started from the teacher's weights: `make_student`."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ..data.calibration import NUM_EXAMPLES as NUM_HELD_OUT
from ..data.calibration import held_out
from ..models.adapters import base_of, has_adapters, merged_base
from ..models.loading import load_model
from ..models.quantized import packed_weights
from ..routing.layers import find_layer_stack
from .budget import Budget
from .candidates import best_within
from .choices import CHANNEL_CHOICES
from .cutting import Cutter, dtype_of_students
from .healing import heal
from .layer_scores import choose_layers, whole_number
from .refitting import NUM_EXAMPLES

logger = logging.get_logger(__name__)


def make_student(
    teacher: PreTrainedModel | str | os.PathLike[str],
    num_layers: int | None = None,
    hidden_size: int | None = None,
    layers: str | Sequence[int] = "even",
    layers_path: str | None = None,
    dtype: torch.dtype | None = None,
    data: Any = None,
    data_collator: Callable[[list[Any]], Mapping[str, Any]] | None = None,
    parameters: float | None = None,
    flops: float | None = None,
    candidates: int = 1,
    heal_steps: int = 0,
    channels: str | None = None,
    fit: bool = True,
    **config_overrides: Any,
) -> PreTrainedModel:
    """Cut a shallower, and if wanted narrower, model out of the teacher.

    Embeddings, norms, head and the chosen layers are the teacher's own, buffers included, each in the dtype that the
    teacher has it in: a student with all layers gives the teacher's logits. Of a narrower student, they are the parts
    of the teacher's tensors that belong to the channels, heads and neurons that are kept; which these parts are is
    found by following every dimension through the forward, and proved (`hf_blockkd.axes`). With `data`, what is kept is
    chosen by what it does there, and the linear maps are fitted to what the teacher's write.

    Args:
        teacher: The model to cut, or its name or folder. It is not changed. Of a `PeftModel`, the student gets the
            base's weights with the adapter merged into them.
        num_layers: Depth of the student, from 1 to the teacher's; default: as many as `layers` names, or all.
        hidden_size: Width; default: the teacher's. Heads keep their size, so it must be a multiple of that, unless
            `num_attention_heads` is given, too; the inner width of the MLPs shrinks alike.
        layers: Which teacher layers are kept: `"even"` spreads them from first to last, `"outer"` takes the first and
            the last ones, `"kl"` those without which the logits change most, `"influence"` those that turn the states
            most (`hf_blockkd.students.layer_scores`), and a rising list of indices names them.
        layers_path: Dotted name of the stack where `find_layer_stack` should not search.
        dtype: Of the student's weights, but for those that transformers keeps in float32 beside it. Default: the
            teacher's, but float32 for a float16 teacher, since weights in float16 cannot be trained: small updates
            vanish in them, and gradient scalers refuse them.
        data: Training examples, a data set or a list of rows: 256 to measure on, and up to 1,024 to fit to; labels are
            not used.
        data_collator: Makes a batch of these rows, as in `Trainer`.
        parameters: A budget in place of sizes: a share of the teacher's parameters, or a number of them. About as much
            is kept of the depth as of the width, and of the neurons where whole heads would leave much of it; where
            heads cannot go, heads become smaller, or neurons or layers alone go. A warning says why, where the student
            is more than a tenth smaller.
        flops: Likewise a budget, of the FLOPs of a forward on one example of `data`, or on one made up from the config:
            a multiplication and an addition are two.
        candidates: How many of the most balanced sizes within the budget are cut, of which the one is returned whose
            outputs are nearest to the teacher's on examples of `data` that are held out. What is best before training
            need not be best after it, hence `heal_steps`.
        heal_steps: So many steps of 32 examples the student, or each candidate before they are compared, is trained on
            the teacher's outputs (`hf_blockkd.students.healing`): a few dozen are enough to compare.
        channels: What channels, heads and neurons are chosen by: `"activations"` (their part in what linear maps
            compute on `data`, which is the default with `data`), `"weights"` (default without), or `"random"`, for
            comparison (`hf_blockkd.students.width_scores`).
        fit: Whether linear maps are fitted where there is `data` (`hf_blockkd.students.refitting`).
        **config_overrides: More fields of the student's config, e.g. `intermediate_size=256`; of a config with parts,
            a field of the part that the layers are built from is meant first.

    Returns:
        The student, in the teacher's train/eval mode, on the CPU or wherever the teacher is. All its weights require
        gradients, but for those that its class freezes itself. Its attribute `cut` says what was kept
        (`hf_blockkd.models.cut.Cut`); `pooling`, where the teacher has that, is the teacher's. The trainer writes the
        cut beside the student, from which connectors begin; `student.save_pretrained(folder)` alone does not, call
        `student.cut.save(folder)` after it.

    Raises:
        ValueError: If depth, width, layer indices or overrides do not fit the teacher or each other, its config has no
            field for the depth, no size meets the budget, there are too few examples, or none where they are needed, or
            `teacher` is no model, is quantized, or has an adapter that cannot be merged.
        UnsupportedArchitectureError: If the teacher cannot be cut in width.

    Example:
        ```python
        >>> import torch
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from hf_blockkd import make_student
        >>> teacher = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=4, n_head=2, vocab_size=99))
        >>> student = make_student(teacher, num_layers=2)
        >>> torch.equal(student.transformer.h[1].mlp.c_fc.weight, teacher.transformer.h[3].mlp.c_fc.weight)
        True
        >>> rows = [{"input_ids": torch.randint(99, (8,))} for _ in range(16)]
        >>> student = make_student(teacher, num_layers=2, hidden_size=16, data=rows)
        >>> student.cut.layers, len(student.cut.channels)
        ([0, 3], 16)

        ```
    """
    teacher = _plain_model(teacher)
    stack = find_layer_stack(teacher, layers_path)
    hidden_size = None if hidden_size is None else whole_number("hidden_size", hidden_size)
    _check_choices(channels, candidates, heal_steps, parameters, flops, data)
    dtype = dtype_of_students(teacher, dtype)
    _warn_of_a_random(teacher)
    others = None
    if isinstance(data, Iterator):
        data = list(itertools.islice(data, NUM_EXAMPLES if candidates == 1 else NUM_EXAMPLES + NUM_HELD_OUT))
    if candidates > 1:
        data, others = held_out(data, NUM_EXAMPLES, NUM_HELD_OUT)
    cutter = Cutter(teacher, stack, layers, data, data_collator, channels, fit, dtype)
    if parameters is None and flops is None:
        student = cutter.cut(num_layers, hidden_size, **config_overrides)
        if heal_steps:
            heal(teacher, student, cutter.fitted_batches, heal_steps)
        return student
    if not isinstance(layers, str):
        num_layers = len(choose_layers(teacher, stack, num_layers, layers))
    budget = Budget.of_parameters(parameters) if flops is None else Budget.of_flops(flops, cutter.example)
    return best_within(cutter, budget, num_layers, hidden_size, config_overrides, others, candidates, heal_steps)


def _check_choices(
    channels: str | None,
    candidates: int,
    heal_steps: int,
    parameters: float | None,
    flops: float | None,
    data: Any,
) -> None:
    if channels is not None and channels not in CHANNEL_CHOICES:
        raise ValueError(f"`channels` is {channels!r}; choose {', '.join(map(repr, CHANNEL_CHOICES))}.")
    if whole_number("candidates", candidates) < 1:
        raise ValueError(f"`candidates` is {candidates}, but must be at least 1.")
    if whole_number("heal_steps", heal_steps) < 0:
        raise ValueError(f"`heal_steps` is {heal_steps}, but must be at least 0.")
    if parameters is not None and flops is not None:
        raise ValueError(f"`parameters` is {parameters!r} and `flops` is {flops!r}; give one of them.")
    if candidates > 1 and parameters is None and flops is None:
        raise ValueError(
            f"`candidates` is {candidates}, but without `parameters` or `flops` there is one size; give a budget."
        )
    if data is None and candidates > 1:
        raise ValueError(f"`candidates` is {candidates}, which needs `data` to compare them on; give some examples.")
    if data is None and heal_steps > 0:
        raise ValueError(f"`heal_steps` is {heal_steps}, which needs `data` to heal on; give some examples.")


def _warn_of_a_random(teacher: PreTrainedModel) -> None:
    """Norms and biases begin as ones and zeros, which training leaves nowhere."""
    vectors = [own for own in teacher.parameters() if own.ndim == 1 and not own.is_meta]
    if vectors and all(torch.all(vector == vector[0]) for vector in vectors):
        logger.warning(
            f"The weights of the teacher, {type(teacher).__name__}, look as if they were never trained: a student that "
            "is cut out of them begins at random, too; load or train the teacher first."
        )


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
