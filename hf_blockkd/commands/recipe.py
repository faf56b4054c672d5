"""What a distillation trains with where nobody says it: `recipe_for`."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import PreTrainedModel

from ..data.calibration import NUM_EXAMPLES
from ..models.classes import is_headless
from ..pairing.tasks import Task
from ..routing.layers import find_layer_stack
from ..training.learning_rate import NUM_STEPS, usual_rate

MOST_EPOCHS = 15
"""After which rows are known by heart."""
NUM_BLOCKS = 4
UNKNOWN_WIDTH = 512
"""Of a student whose config tells none."""
IMAGES = {"per_device_train_batch_size": 64, "temperature": 4.0, "weight_decay": 0.05}
TEXTS = {"per_device_train_batch_size": 32, "temperature": 2.0, "weight_decay": 0.01}
VOCABULARY = {"per_device_train_batch_size": 16, "temperature": 1.0, "weight_decay": 0.05}
"""Of language models. What these say is what the recipes of the benchmarks say for tasks of the kind."""


def recipe_for(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    num_rows: int,
    epochs: float | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
) -> dict[str, Any]:
    """Fields of `BlockwiseDistillConfig`.

    Errors of states are trained on without stepping stones: in all of the benchmarks that is level with the stones, at
    about the price of plain KD. Plain KD it is where there are too few rows to fit connectors to, without which there
    are no such errors, and for models without a head, where states bring nothing besides.

    Args:
        teacher: The teacher.
        student: The student.
        num_rows: Rows to train on.
        epochs: How often; default: as often as makes `NUM_STEPS`, but once at least and `MOST_EPOCHS` at most.
        batch_size: Rows in a step; default: that of the kind of task, or a sixteenth of the rows where they are few.
        learning_rate: The highest; default: `usual_rate`.

    Example:
        ```python
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from hf_blockkd.commands.recipe import recipe_for
        >>> model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=99))
        >>> recipe = recipe_for(model, model, num_rows=3200)
        >>> recipe["num_train_epochs"], recipe["temperature"], recipe["num_blocks"], recipe["learning_rate"]
        (3, 1.0, 2, 0.004)

        ```
    """
    task = Task.of(teacher)
    kind = VOCABULARY if task.over_vocabulary else IMAGES if teacher.main_input_name == "pixel_values" else TEXTS
    size = batch_size or min(kind["per_device_train_batch_size"], max(num_rows // 16, 1))
    with_states = num_rows >= NUM_EXAMPLES and not is_headless(teacher)
    depths = (len(find_layer_stack(model)) for model in (student, teacher))
    width = getattr(student.config.get_text_config(), "hidden_size", None) or UNKNOWN_WIDTH
    epochs = epochs or min(MOST_EPOCHS, max(1, round(NUM_STEPS * size / num_rows)))
    rate = usual_rate(width, with_states, math.ceil(num_rows / size * epochs))
    return {
        **kind,
        "learning_rate": learning_rate or float(f"{rate:.2g}"),
        "per_device_train_batch_size": size,
        "per_device_eval_batch_size": 2 * size,
        "num_train_epochs": epochs,
        "num_blocks": min(NUM_BLOCKS, *depths),
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "objective": "block_kd" if with_states else "kd",
        **precision(),
    }


def precision() -> dict[str, Any]:
    """bfloat16 under autocast where a GPU has it, float32 elsewhere: float16 needs a scaler, and more care."""
    has_gpu = torch.cuda.is_available()
    return {"bf16": has_gpu and torch.cuda.is_bf16_supported(), "dataloader_pin_memory": has_gpu}
