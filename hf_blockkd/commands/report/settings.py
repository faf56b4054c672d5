"""With what a run was trained: `changed_settings`, and what its losses count, `weights_of`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from transformers import TrainingArguments

from ...config import BlockwiseDistillConfig
from .runs import Run

OF_A_PLACE = ("output_dir", "logging_dir", "run_name", "use_cpu", "local_rank", "disable_tqdm", "log_level", "log_on")
"""How names of fields begin that say where a run ran, and not what it did."""


def changed_settings(args: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Fields that differ from their defaults, ours first.

    Args:
        args: A run's `training_args.json`.

    Returns:
        `"Distillation"` and `"Training"` -> field -> value.
    """
    # As it is written, which is how it is read back.
    defaults = json.loads(BlockwiseDistillConfig("unused", use_cpu=True).to_json_string())
    changed = {
        name: value
        for name, value in args.items()
        if name in defaults and defaults[name] != value and not name.startswith(OF_A_PLACE)
    }
    stock = {field.name for field in dataclasses.fields(TrainingArguments)}
    ours = {name: value for name, value in changed.items() if name not in stock}
    return {"Distillation": ours, "Training": {name: changed[name] for name in changed if name not in ours}}


def weights_of(run: Run) -> dict[str, str]:
    """What each part of the loss counts in the total, in words.

    Args:
        run: The run.

    Returns:
        Name of the logged part -> its weight; empty where the run has no arguments, as those of other trainers.
    """
    if not run.args:
        return {}
    weights = {f"loss_{name}": run.args.get(f"{name}_weight", 1.0) for name in ("task", "distill", "cross", "hint")}
    words = {name: "" if weight == 1 else f"{weight:g} x " for name, weight in weights.items()}
    state = run.resolved.get("state_weight")
    falls = " to 0" if run.resolved.get("stone_schedule") == "linear" else ""
    words["loss_state"] = "state_weight x " if state is None else f"{state:g}{falls} x "
    return words | {"loss_router": "router_aux_loss_coef x "}
