"""A few steps of training that show what a cut student recovers to: `heal`."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel, get_linear_schedule_with_warmup

from ..routing.forwards import in_dtype_of, in_eval_mode
from ..routing.logits import only_logits
from .layer_scores import changes_of_rows
from .progress import bar

LEARNING_RATE = 2e-4
"""Of AdamW, at its highest: five times as much makes a fitted student worse in 30 steps."""
WARMUP_STEPS = 5
"""In which it rises to that, and then falls to none with the last step."""
LARGEST_NORM = 1.0
"""To which gradients are clipped: the first ones of a cut student are large."""


@torch.enable_grad()
def heal(
    teacher: PreTrainedModel, student: PreTrainedModel, batches: Iterable[Mapping[str, Any]], num_steps: int
) -> None:
    """Train a student on its teacher's outputs for some steps: on the forward KL divergence, or the squared error.

    Both models run in eval mode, so that nothing is drawn at random.

    Args:
        teacher: It is not changed.
        student: Of the same class; its weights are trained in place.
        batches: Inputs for both, one for a step, from the beginning again where there are fewer.
        num_steps: How many steps.

    Example:
        ```python
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from hf_blockkd import make_student
        >>> from hf_blockkd.routing.dummy_inputs import dummy_inputs
        >>> from hf_blockkd.students.healing import heal
        >>> from hf_blockkd.students.likeness import distance
        >>> teacher = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=99))
        >>> student, batches = make_student(teacher, num_layers=1), [dummy_inputs(teacher)]
        >>> before = distance(teacher, student, batches)
        >>> heal(teacher, student, batches, num_steps=4)
        >>> distance(teacher, student, batches) < before
        True

        ```
    """
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE)
    schedule = get_linear_schedule_with_warmup(optimizer, min(WARMUP_STEPS, num_steps // 2), num_steps)
    with in_eval_mode(teacher), in_eval_mode(student), only_logits(teacher), only_logits(student):
        for batch in bar(itertools.islice(itertools.cycle(batches), num_steps), "Steps of healing", num_steps):
            with torch.no_grad():
                clean = teacher(**batch)
            parts = list(changes_of_rows(teacher, batch, student(**in_dtype_of(student, batch)), clean))
            loss = sum(change for change, _ in parts) / sum(count for _, count in parts)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, LARGEST_NORM)
            optimizer.step()
            torch.clear_autocast_cache()  # of a person's autocast, which would go on with the weights as they were
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
