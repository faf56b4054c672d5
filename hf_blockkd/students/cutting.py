"""Students cut out of one teacher, of which all that does not hang on their sizes is measured once: `Cutter`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ..axes.following import ModelAxes, find_axes
from ..data.calibration import Batches, batches_for
from ..models.cut import Cut
from ..models.loading import weights_of
from ..models.pooling import Pooling
from ..routing.dummy_inputs import dummy_inputs
from ..routing.errors import UnsupportedArchitectureError
from ..routing.layers import LayerStack, find_layer_stack
from .carrying import carry_over, compute_buffers, main_dtype, origin_of
from .config_changes import student_config
from .layer_scores import choose_layers
from .narrowing import find_narrowing, read_otherwise
from .refitting import BATCH_SIZE, NUM_EXAMPLES, refit
from .width_scores import Scores, activation_scores, random_scores, weight_scores

logger = logging.get_logger(__name__)


@dataclass
class Cutter:
    """A teacher, and what its students are cut by.

    Attributes:
        teacher: The teacher.
        stack: Its layers.
        layers: As in `make_student`.
        data: As there.
        data_collator: As there.
        channels: As there.
        fit: As there.
        dtype: That of the student's weights.
    """

    teacher: PreTrainedModel
    stack: LayerStack
    layers: str | Sequence[int]
    data: Any
    data_collator: Callable[[list[Any]], Mapping[str, Any]] | None
    channels: str | None
    fit: bool
    dtype: torch.dtype

    @cached_property
    def batches(self) -> list[dict[str, Any]] | None:
        """What layers and channels are measured on; `None` without data."""
        return None if self.data is None else list(batches_for(self.teacher, self.data, self.data_collator))

    @cached_property
    def fitted_batches(self) -> Batches:
        """What maps are fitted to."""
        return Batches(
            batches_for(self.teacher, self.data, self.data_collator, num_examples=NUM_EXAMPLES, batch_size=BATCH_SIZE)
        )

    @cached_property
    def inputs(self) -> dict[str, Any] | None:
        """Two rows of data where it holds inputs of more kinds than are made up from a config: images beside a text."""
        if self.batches is None:
            return None
        batch = self.batches[0]
        made_up = {*dummy_inputs(self.teacher), "attention_mask", "token_type_ids", "position_ids"}
        tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor) and value.ndim}
        if tensors.keys() <= made_up or len({len(tensor) for tensor in tensors.values()}) != 1:
            return None
        return {**batch, **{name: tensor[:2] for name, tensor in tensors.items()}}

    @property
    def example(self) -> dict[str, Any]:
        """One row of the data, or one that is made up."""
        if self.data is None:
            return dummy_inputs(self.teacher, batch_size=1)
        return next(batches_for(self.teacher, self.data, self.data_collator, batch_size=1))

    @cached_property
    def axes(self) -> ModelAxes:
        """The teacher's."""
        return find_axes(self.teacher, self.inputs, self.stack)

    @cached_property
    def scores(self) -> Scores:
        """Of these axes, by what is asked for."""
        channels = self.channels or ("weights" if self.batches is None else "activations")
        if channels == "random":
            return random_scores(self.axes, seed=0)
        if channels == "weights":
            if self.batches is None:
                logger.warning(
                    "Without `data`, the narrower student's channels are chosen by the size of their weights, and "
                    "nothing is fitted to what the teacher computes; give some training examples for a much better "
                    "start."
                )
            return weight_scores(self.teacher, self.axes)
        if self.batches is None:
            raise ValueError(
                "`channels` is 'activations', which needs `data` to measure them on; give some training examples, or "
                "choose 'weights'."
            )
        return activation_scores(self.teacher, self.axes, self.batches)

    def cut(
        self, num_layers: int | None = None, hidden_size: int | None = None, **config_overrides: Any
    ) -> PreTrainedModel:
        """One student.

        Args:
            num_layers: As in `make_student`.
            hidden_size: As there.
            **config_overrides: As there.
        """
        teacher, stack = self.teacher, self.stack
        chosen = choose_layers(teacher, stack, num_layers, self.layers, self.batches)
        config = student_config(teacher, stack, chosen, hidden_size, config_overrides)
        device = torch.device("cpu") if teacher.device.type == "meta" else teacher.device
        # Built in the dtype of its weights, as `from_pretrained` does it, so that a reload builds the same buffers.
        student = compute_buffers(type(teacher)._from_config(config, dtype=self.dtype)).to(device)
        names = weights_of(teacher).keys()

        def origin(name: str) -> str:
            return origin_of(name, stack.path, chosen, names)

        narrowing = find_narrowing(teacher, student, stack, chosen, origin, self.inputs, lambda: self.axes)
        if narrowing is None and config_overrides:
            other = read_otherwise(student, origin, self.inputs, lambda: self.axes)
            if other:
                logger.warning(
                    f"The student reads {other}, so that the weights which it begins with do not mean what they did; "
                    "leave the number of heads as it is, or give their size, too (`head_dim`, where the config has it)."
                )
        if narrowing is not None and narrowing.sizes:
            narrowing.choose(self.scores)
        same_fields = hidden_size is None and not config_overrides
        carry_over(teacher, student, stack.path, chosen, same_fields, narrowing)
        if self.fit and self.data is not None and (narrowing is not None or len(chosen) < len(stack)):
            stacks = stack, find_layer_stack(student, stack.search_path)
            try:
                refit(teacher, student, stacks, chosen, narrowing, self.fitted_batches)
            except UnsupportedArchitectureError as error:
                logger.warning(f"Nothing of the student is fitted to what the teacher computes. {error}")
        if teacher.can_generate():
            student.generation_config = copy.deepcopy(teacher.generation_config)
        if isinstance(getattr(teacher, "pooling", None), Pooling):
            student.pooling = teacher.pooling
        student.cut = Cut(chosen, len(stack)) if narrowing is None else narrowing.record(chosen, len(stack))
        return student.train(teacher.training)


def dtype_of_students(teacher: PreTrainedModel, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of a student's weights: one that trains.

    Raises:
        ValueError: If `dtype` is none.
    """
    if dtype is None:
        theirs = main_dtype(teacher)
        return torch.float32 if theirs == torch.float16 else theirs
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        raise ValueError(f"`dtype` is {dtype!r}, but must be a dtype that trains, e.g. torch.float32.")
    return dtype
