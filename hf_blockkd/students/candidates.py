"""Of several students within a budget the one that is nearest to its teacher: `best_within`."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import logging

from ..data.calibration import batches_for
from ..routing.errors import UnsupportedArchitectureError
from .budget import Budget, sizes_within
from .cutting import Cutter
from .healing import heal
from .likeness import distance

logger = logging.get_logger(__name__)


def best_within(
    cutter: Cutter,
    budget: Budget,
    num_layers: int | None,
    hidden_size: int | None,
    config_overrides: Mapping[str, Any],
    held_out: Any,
    candidates: int,
    heal_steps: int,
) -> PreTrainedModel:
    """Cut the most balanced sizes within a budget, heal them, and compare them.

    Where a model cannot be cut in heads, heads are made smaller, or neurons or layers alone are left out. Where the
    student is more than a tenth smaller than the budget allows, a warning says so, and why.

    Args:
        cutter: Cuts them.
        budget: The budget.
        num_layers: As in `make_student`.
        hidden_size: As there.
        config_overrides: As there.
        held_out: Examples to compare on, which the students were not cut by; not needed for one candidate.
        candidates: How many are compared.
        heal_steps: How many steps each of them is healed.

    Raises:
        ValueError: If no size meets the budget.
        UnsupportedArchitectureError: If the teacher cannot be cut in any way that does.
    """
    batches = [] if candidates == 1 else list(batches_for(cutter.teacher, held_out, cutter.data_collator))
    refusal: UnsupportedArchitectureError | None = None
    stack = cutter.stack
    for way in sizes_within(cutter.teacher, stack, budget, num_layers, hidden_size, config_overrides):
        best, nearest, chosen = None, float("inf"), None
        for fit in itertools.islice(way, candidates):
            try:
                student = cutter.cut(**{**config_overrides, **fit.sizes})
            except UnsupportedArchitectureError as error:
                refusal = refusal or error
                continue
            if heal_steps:
                heal(cutter.teacher, student, cutter.fitted_batches, heal_steps)
            change = distance(cutter.teacher, student, batches) if batches else 0.0
            if best is None or change < nearest:
                best, nearest, chosen = student, change, fit
        if best is not None:
            if refusal is not None:
                logger.warning(f"The most balanced sizes within `{budget.name}` are none to cut to. {refusal}")
            if shortfall := chosen.shortfall(budget):
                logger.warning(shortfall)
            return best
    raise refusal
