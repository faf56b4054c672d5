"""Does the routing hold on the data at hand: `self_test`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..losses.divergences import LEFT_OUT
from ..models.heads import without_logits
from ..models.quantized import is_quantized, swallowed_gradients
from ..pairing.pair import Pair
from ..pairing.tasks import Task
from ..routing.checking import routing_errors
from ..routing.entering import Extras
from ..routing.errors import UnsupportedArchitectureError
from ..routing.examples import check_examples, take_examples
from ..routing.logits import main_outputs

ROUTING_TOLERANCE = 1e-3
"""Largest routing error that is still rounding, relative to the largest logit; a wrong route errs by far more."""
NUM_EXAMPLES = 3
"""As many as it takes to leave one out; all logits of all examples at once might not fit."""


def first_examples(inputs: Mapping[str, Any], task: Task) -> Mapping[str, Any]:
    """The first examples of a batch, where they can be told apart; else all of it."""
    num_examples = len(inputs[task.label_names[0]])
    if all(isinstance(value, torch.Tensor) and value.ndim and len(value) == num_examples for value in inputs.values()):
        return take_examples(inputs, torch.arange(min(NUM_EXAMPLES, num_examples)), num_examples)
    return inputs


def self_test(pair: Pair, inputs: Mapping[str, Any], sharing: str | None, stones: Sequence[int]) -> Extras:
    """Enter the teacher at every depth that the stones of a run enter it, and find the prefix that both models share.

    Args:
        pair: The models of the run.
        inputs: Its first batch, with labels, or the first examples of it.
        sharing: The setting by which stones run on some of the examples only, which is tested likewise then.
        stones: Indices of those that run, rising, whose gradients pass through the teacher.

    Returns:
        What the teacher's layers handed on besides hidden states.

    Raises:
        ValueError: If the examples of the batch cannot be told apart, but are to be shared out.
        UnsupportedArchitectureError: If the teacher does not give its own logits, naming the depth and the error, or
            its quantized layers pass no gradients on.
    """
    num_examples = len(inputs[pair.task.label_names[0]])
    teacher_inputs = pair.inputs_for("teacher", inputs)
    if sharing is not None:
        check_examples(teacher_inputs, num_examples, sharing)
    some = None if sharing is None else torch.arange(0, num_examples, 2)
    # Over vocabularies, what enters the head is compared: logits of whole texts might not fit.
    head, stack = pair.teacher_head, pair.stones.teacher_stack
    run = (lambda batch: main_outputs(pair.teacher(**batch))) if head is None else head.final_states
    with torch.no_grad(), pair.stones.record() as extras:
        outputs = run(teacher_inputs)
    pair.task.check_rows(outputs, inputs, type(pair.teacher).__name__)
    # Without classes that are left out, whose least numbers would make any difference small.
    largest = max(one.masked_fill(one <= LEFT_OUT, 0.0).abs().max().item() for one in outputs)
    del outputs
    errors = routing_errors(pair.teacher, stack, teacher_inputs, pair.block_map.teacher, some, run)
    depth, error = max(errors.items(), key=lambda item: item[1])
    # Logits that are not finite are reported as such by the step itself.
    if math.isfinite(largest) and error > ROUTING_TOLERANCE * largest:
        raise UnsupportedArchitectureError(
            f"{type(pair.teacher).__name__} entered at layer {depth} from its own hidden states gives "
            f"{'logits' if head is None else 'final states'} that differ from its own by {error:.3g} (the largest is "
            f"{largest:.3g}), so it cannot be a teacher here; "
            "check it with `hf-blockkd check`, or name another stack with `teacher_layers_path`."
        )
    if stones and is_quantized(pair.teacher):
        depth = pair.block_map.teacher[stones[0] - 1]
        with without_logits(head):
            swallowed = swallowed_gradients(pair.teacher, stack, teacher_inputs, extras, depth)
        if swallowed:
            raise UnsupportedArchitectureError(
                f"No gradient passes through {len(swallowed)} quantized modules of the teacher, e.g. {swallowed[0]!r}, "
                "so stepping stones would learn next to nothing; quantize the weights alone and not the activations, "
                "load 4-bit weights of bitsandbytes anew if they ran on a CPU before, or do not quantize the teacher."
            )
    with without_logits(pair.student_head, head):
        pair.prefix.find(pair.inputs_for("student", inputs), teacher_inputs)
    return extras
