"""What the log of a run says of the weights that a trainer holds: `last_evaluation`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

from transformers import TrainerState, TrainingArguments

from ..losses.learners import STUDENT

Table = dict[str, dict[str, dict[str, float]]]
"""Data set -> metric -> whose -> value."""
BESIDE = re.compile(r"(runtime|per_second|preparation_time|compilation_time)$|^block_\d+_")
"""What an evaluation logs that is no metric of a model."""


def last_evaluation(
    state: TrainerState, args: TrainingArguments, names: Iterable[str] = ()
) -> tuple[int | None, Table]:
    """The metrics that were last found for student, teacher and stones.

    Args:
        state: Its `log_history` is read. After training, and before another evaluation, the best step's are meant where
            `load_best_model_at_end` brought back its weights.
        args: Of the run.
        names: Of the data sets, where there are several; longer ones first.

    Returns:
        The step, `None` where nothing was evaluated; and data set (`""` if it has no name) -> metric -> whose
        (`"student"`, `"teacher"`, `"stone_1"`) -> value. Times, and what is not finite, are left out.

    Example:
        ```python
        >>> from transformers import TrainerState, TrainingArguments
        >>> from hf_blockkd.saving.last_evaluation import last_evaluation
        >>> log = [{"step": 2, "eval_accuracy": 0.5}, {"step": 4, "eval_accuracy": 0.6, "eval_teacher_accuracy": 0.7}]
        >>> last_evaluation(TrainerState(log_history=log), TrainingArguments("run", report_to="none"))
        (4, {'': {'accuracy': {'student': 0.6, 'teacher': 0.7}}})

        ```
    """
    log = state.log_history
    evaluations = [entry for entry in log if any(key.startswith("eval_") for key in entry)]
    if not evaluations:
        return None, {}
    ends = [place for place, entry in enumerate(log) if "train_runtime" in entry]
    later = [entry for entry in log[ends[-1] + 1 :] if entry in evaluations] if ends else []
    step = (later or evaluations)[-1]["step"]
    if ends and not later and args.load_best_model_at_end and state.best_global_step:
        step = state.best_global_step
    metrics: dict[str, float] = {}
    for entry in later or evaluations:
        if entry["step"] == step:
            metrics |= {key: value for key, value in entry.items() if key.startswith("eval_")}
    return step, _table(metrics, names)


def _table(metrics: Mapping[str, float], names: Iterable[str]) -> Table:
    table: Table = {}
    for key, value in metrics.items():
        rest = key.removeprefix("eval_")
        name = next((one for one in names if rest.startswith(f"{one}_")), "")
        rest = rest.removeprefix(f"{name}_" * bool(name))
        who, metric = re.fullmatch(r"(?:(teacher|stone_\d+)_)?(.+)", rest).groups()
        is_number = isinstance(value, (int, float)) and math.isfinite(value)
        if is_number and not BESIDE.search(metric):
            table.setdefault(name, {}).setdefault(metric, {})[who or STUDENT] = float(value)
    return table
