"""What stands in for a teacher that is nowhere at hand: `stand_in`, `refuse_to_run`."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from transformers import PreTrainedModel


def stand_in(student: PreTrainedModel) -> PreTrainedModel:
    """A model like the student, of the same memory, for what is said of a teacher that never runs.

    Args:
        student: The student.

    Returns:
        Modules of its own around the student's weights, frozen and in eval mode. Its shapes may be looked at; then
        it is to `refuse_to_run`.

    Example:
        ```python
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from hf_blockkd.models.stand_in import stand_in
        >>> student = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=99))
        >>> teacher = stand_in(student)
        >>> teacher.lm_head.weight.data_ptr() == student.lm_head.weight.data_ptr()
        True
        >>> teacher.lm_head.weight.requires_grad, student.lm_head.weight.requires_grad
        (False, True)

        ```
    """
    # What is in the memo already is not copied.
    weights = {id(weight): nn.Parameter(weight.detach(), requires_grad=False) for weight in student.parameters()}
    return copy.deepcopy(student, weights).eval()


def refuse_to_run(teacher: PreTrainedModel) -> None:
    """Let a stand-in raise a `ValueError` whenever it is run from now on: what it would say is not the teacher's."""

    def refuse(*_: Any) -> None:
        raise ValueError(
            "`teacher_model` is None, and of what the teacher gives there is what `captured_columns` holds alone, so "
            "neither it nor its blocks nor stepping stones can be run; pass a teacher."
        )

    teacher.register_forward_pre_hook(refuse)
