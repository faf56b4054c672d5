"""What a model between student and teacher costs: `model_costs`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.trainer_pt_utils import find_batch_size

from ..models.flops import forward_flops
from ..routing.forwards import in_eval_mode

ROUNDS = 7
"""Forwards that are timed, after one that is not."""


@torch.no_grad()
def model_costs(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> dict[str, float]:
    """FLOPs of an example, parameters, and the median seconds of a batch.

    Args:
        model: On any device.
        inputs: A batch without labels, as keyword arguments of its forward, there, too.
        precision: An autocast, entered anew for each forward: it keeps the casts of weights that train until it is
            left, and of frozen ones none.

    Returns:
        `flops`, those of the batch in the mean over its examples; `parameters`; and `time`.

    Example:
        ```python
        >>> import torch
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from hf_blockkd.ladder.costs import model_costs
        >>> model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=1, vocab_size=99))
        >>> sorted(model_costs(model, {"input_ids": torch.ones(2, 8, dtype=torch.long)}))
        ['flops', 'parameters', 'time']

        ```
    """
    seconds = []
    with in_eval_mode(model):
        for _ in range(1 + ROUNDS):
            _wait(model.device)
            start = time.perf_counter()
            with precision():
                model(**inputs)
            _wait(model.device)
            seconds.append(time.perf_counter() - start)
    with precision():
        flops = forward_flops(model, inputs) / find_batch_size(inputs)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"flops": flops, "parameters": parameters, "time": statistics.median(seconds[1:])}


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
