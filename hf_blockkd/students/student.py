"""A smaller model of the teacher's own kind, started from the teacher's weights: `make_student`."""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ..axes.following import ModelAxes
from ..data.calibration import batches_for
from ..models.adapters import base_of, has_adapters, merged_base
from ..models.cut import Cut
from ..models.loading import load_model, weights_of
from ..models.pooling import Pooling
from ..models.quantized import packed_weights
from ..routing.dummy_inputs import dummy_inputs
from ..routing.errors import UnsupportedArchitectureError
from ..routing.layers import find_layer_stack
from .budget import distance, sizes_within
from .carrying import carry_over, compute_buffers, main_dtype, origin_of
from .config_changes import student_config
from .layer_scores import choose_layers, whole_number
from .narrowing import find_narrowing, read_otherwise
from .refitting import BATCH_SIZE, NUM_EXAMPLES, refit
from .width_scores import Scores, activation_scores, random_scores, weight_scores

logger = logging.get_logger(__name__)

CHANNEL_CHOICES = ("activations", "weights", "random")


def make_student(
    teacher: PreTrainedModel | str | os.PathLike,
    num_layers: int | None = None,
    hidden_size: int | None = None,
    layers: str | Sequence[int] = "even",
    layers_path: str | None = None,
    dtype: torch.dtype | None = None,
    data: Any = None,
    data_collator: Callable[[list[Any]], Mapping[str, Any]] | None = None,
    parameters: float | None = None,
    candidates: int = 1,
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
            is kept of the depth as of the width.
        candidates: How many of the most balanced sizes within the budget are cut, of which the one is returned whose
            outputs are nearest to the teacher's on other examples of `data`. What is best before training need not be
            best after it.
        channels: What channels, heads and neurons are chosen by: `"activations"` (their part in what linear maps
            compute on `data`, which is the default with `data`), `"weights"` (default without), or `"random"`, for
            comparison (`hf_blockkd.students.width_scores`).
        fit: Whether linear maps are fitted where there is `data` (`hf_blockkd.students.refitting`).
        **config_overrides: More fields of the student's config, e.g. `intermediate_size=256`; of a config with parts,
            a field of the part that the layers are built from is meant first.

    Returns:
        The student, in the teacher's train/eval mode, on the CPU or wherever the teacher is. All its weights require
        gradients, but for those that its class freezes itself. Its attribute `cut` says what was kept
        (`hf_blockkd.models.cut.Cut`); `pooling`, where the teacher has that, is the teacher's.

    Raises:
        ValueError: If depth, width, layer indices or overrides do not fit the teacher or each other, its config has no
            field for the depth, no size meets the budget, there are too few examples, or `teacher` is no model, is
            quantized, or has an adapter that cannot be merged.
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
    _check_choices(channels, candidates, parameters)
    data = list(itertools.islice(data, NUM_EXAMPLES)) if isinstance(data, Iterator) else data
    batches = None if data is None else list(batches_for(teacher, data, data_collator))
    if parameters is not None:
        if not isinstance(layers, str):
            num_layers = len(choose_layers(teacher, stack, num_layers, layers))
        sizes = sizes_within(teacher, stack, parameters, num_layers, hidden_size, config_overrides)[:candidates]
        if len(sizes) > 1 and data is None:
            raise ValueError(
                f"`candidates` is {candidates}, which needs `data` to compare them on; give some examples."
            )
        options = {"layers": layers, "layers_path": layers_path, "dtype": dtype, "channels": channels, "fit": fit}
        students = (
            make_student(teacher, *size, data=data, data_collator=data_collator, **options, **config_overrides)
            for size in sizes
        )
        if len(sizes) == 1:
            return next(students)
        others = list(batches_for(teacher, data, data_collator, seed=1))
        return min(students, key=lambda student: distance(teacher, student, others))
    chosen = choose_layers(teacher, stack, num_layers, layers, batches)
    config = student_config(teacher, stack, chosen, hidden_size, config_overrides)
    dtype = _choose_dtype(main_dtype(teacher), dtype)
    _warn_of_a_random(teacher)

    device = torch.device("cpu") if teacher.device.type == "meta" else teacher.device
    # Built in the dtype of its weights, as `from_pretrained` does it, so that a reload builds the same buffers.
    student = compute_buffers(type(teacher)._from_config(config, dtype=dtype)).to(device)
    names = weights_of(teacher).keys()
    inputs = None if batches is None else _few_of(batches[0], teacher)

    def origin(name: str) -> str:
        return origin_of(name, stack.path, chosen, names)

    narrowing = find_narrowing(teacher, student, stack, chosen, origin, inputs)
    if narrowing is None and config_overrides and (other := read_otherwise(teacher, student, origin, inputs)):
        logger.warning(
            f"The student reads {other}, so that the weights which it begins with do not mean what they did; leave the "
            "number of heads as it is, or give their size, too (`head_dim`, where the config has it)."
        )
    if narrowing is not None and narrowing.sizes:
        narrowing.choose(_scores(teacher, narrowing.axes, channels, batches))
    same_fields = hidden_size is None and not config_overrides
    carry_over(teacher, student, stack.path, chosen, same_fields, narrowing)
    if fit and batches is not None and (narrowing is not None or len(chosen) < len(stack)):
        stacks = stack, find_layer_stack(student, stack.search_path)
        batches = batches_for(teacher, data, data_collator, num_examples=NUM_EXAMPLES, batch_size=BATCH_SIZE)
        try:
            refit(teacher, student, stacks, chosen, narrowing, batches)
        except UnsupportedArchitectureError as error:
            logger.warning(f"Nothing of the student is fitted to what the teacher computes. {error}")
    if teacher.can_generate():
        student.generation_config = copy.deepcopy(teacher.generation_config)
    if isinstance(getattr(teacher, "pooling", None), Pooling):
        student.pooling = teacher.pooling
    student.cut = Cut(chosen, len(stack)) if narrowing is None else narrowing.record(chosen, len(stack))
    return student.train(teacher.training)


def _check_choices(channels: str | None, candidates: int, parameters: float | None) -> None:
    if channels is not None and channels not in CHANNEL_CHOICES:
        raise ValueError(f"`channels` is {channels!r}; choose {', '.join(map(repr, CHANNEL_CHOICES))}.")
    if whole_number("candidates", candidates) < 1:
        raise ValueError(f"`candidates` is {candidates}, but must be at least 1.")
    if candidates > 1 and parameters is None:
        raise ValueError(f"`candidates` is {candidates}, but without `parameters` there is one size; give a budget.")


def _few_of(batch: Mapping[str, Any], teacher: PreTrainedModel) -> dict[str, Any] | None:
    """Two rows of a batch, where it holds inputs of more kinds than are made up from a config: images beside a text."""
    made_up = {*dummy_inputs(teacher), "attention_mask", "token_type_ids", "position_ids"}
    tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor) and value.ndim}
    if tensors.keys() <= made_up or len({len(tensor) for tensor in tensors.values()}) != 1:
        return None
    return {**batch, **{name: tensor[:2] for name, tensor in tensors.items()}}


def _scores(
    teacher: PreTrainedModel, axes: ModelAxes, channels: str | None, batches: list[dict[str, Any]] | None
) -> Scores:
    channels = channels or ("weights" if batches is None else "activations")
    if channels == "random":
        return random_scores(axes, seed=0)
    if channels == "weights":
        if batches is None:
            logger.warning(
                "Without `data`, the narrower student's channels are chosen by the size of their weights, and nothing "
                "is fitted to what the teacher computes; give some training examples for a much better start."
            )
        return weight_scores(teacher, axes)
    if batches is None:
        raise ValueError(
            "`channels` is 'activations', which needs `data` to measure them on; give some training examples, or "
            "choose 'weights'."
        )
    return activation_scores(teacher, axes, batches)


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


def _choose_dtype(theirs: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    if dtype is None:
        return torch.float32 if theirs == torch.float16 else theirs
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        raise ValueError(f"`dtype` is {dtype!r}, but must be a dtype that trains, e.g. torch.float32.")
    return dtype
