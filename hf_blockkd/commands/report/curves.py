"""Curves of all that a run logged: `plot_losses`, `plot_path` and `plot_blocks`, and their panels."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import drawing
from .drawing import Panel
from .runs import COST, LogHistory, Points, logged_terms, series, stones_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LOSS_STYLES = {
    "loss": ("total", drawing.BLACK, "-"),
    "loss_task": ("task", drawing.BLUE, "--"),
    "loss_distill": ("distillation", drawing.VERMILION, "-."),
    "loss_cross": ("cross", drawing.GREEN, ":"),
    "loss_state": ("states", drawing.PURPLE, "--"),
    "loss_hint": ("hints", drawing.SKY, "-."),
    "loss_router": ("router", drawing.ORANGE, ":"),
}
TITLES = {
    "task": ("Task loss of the stones", "loss, unweighted"),
    "distill": ("Distillation loss of the stones", "loss, unweighted"),
    "grad_norm_block": ("Gradient of the student's blocks, unclipped", "norm"),
    "eval_block_cka": ("Alignment of student and teacher", "linear CKA"),
    "state_weight": ("What the states count", "weight"),
    "stone_weight": ("What the stones count", "weight"),
    "learning_rate": ("Learning rate", "learning rate"),
    "grad_norm": ("Gradient, unclipped", "norm"),
    "eval_loss": ("Loss in evaluation", "loss"),
    "eval_accuracy": ("Accuracy in evaluation", "accuracy"),
}
"""Family of logged values -> its title, and the name of its axis."""
WHOSE = re.compile(r"(?:teacher|stone_\d+)[_/]|(?<=block)_\d+")
"""What names of logged values say of the model or the block that they are of."""


def loss_panels(log_history: LogHistory, weights: Mapping[str, str] | None = None) -> list[Panel]:
    """The total with its parts, and the task and distillation loss of each stone.

    Args:
        log_history: `trainer.state.log_history`.
        weights: From `weights_of` (`hf_blockkd.commands.report.settings`), for the formula of the total.

    Raises:
        ValueError: If nothing was logged.
    """
    found = {name: series(log_history, name) for name in LOSS_STYLES}
    # A part that has no weight is logged as 0 throughout.
    parts = {name: points for name, points in found.items() if any(value for _, value in points)}
    if not parts:
        whole = series(log_history, "train_loss")[-1:]
        known = "".join(f" ({step} in all, with a mean loss of {value:.4g})" for step, value in whole)
        advice = f"set `logging_steps` to fewer steps than the run has{known}."
        raise ValueError(f"the log holds no `loss`; {advice}")
    total, note = "total", ""
    falling = [name for name in ("state_weight", "stone_weight") if series(log_history, name)]
    if weights and "loss" in parts:
        total += " =\n" + "\n+ ".join(weights[part] + LOSS_STYLES[part][0] for part in parts if part != "loss")
        note = " ".join(total.split())
    if falling:
        note += "; " * bool(note) + f"the total falls with {' and '.join(falling)}, whether anything is learned or not"

    def draw(axis: Axes) -> None:
        for place, (name, points) in enumerate(parts.items()):
            label, color, dashes = LOSS_STYLES[name]
            drawing.draw_line(axis, points, total if name == "loss" else label, color, place, dashes)
        drawing.finish(axis, "step", "loss")

    terms = tuple(name for name, points in found.items() if points)
    families = dict(_families(log_history))
    stones = [_family_panel(log_history, name, families[name]) for name in ("task", "distill") if name in families]
    return [Panel("Objective and its parts", draw, drawing.lines_height(len(parts)), terms, note), *stones]


def path_panels(log_history: LogHistory, metric: str = "accuracy") -> list[Panel]:
    """A metric from the teacher over the stones to the student at the last evaluation; then each over training.

    Args:
        log_history: `trainer.state.log_history` of a run with `eval_stepping_stones=True`.
        metric: Name of the metric, as `compute_metrics` returns it, or `"loss"`.

    Raises:
        ValueError: If the stones were not evaluated, or the metric is not in the log.
    """
    indices = stones_of(log_history, rf"eval_stone_(\d+)_{re.escape(metric)}$")
    if not indices:
        raise ValueError(_why_no_path(log_history, metric))
    keys = ["eval_teacher_" + metric, *(f"eval_stone_{i}_{metric}" for i in indices), "eval_" + metric]
    curves = {key: points for key in keys if (points := series(log_history, key))}
    last = max(step for step, _ in curves[f"eval_stone_{indices[0]}_{metric}"])
    along = {_of(key): [dict(points)[last]] for key, points in curves.items() if last in dict(points)}
    colors = {_of(key): color for key, color in _colors(keys).items()}

    def draw(axis: Axes) -> None:
        drawing.draw_rows(axis, along, ".3f", colors, is_path=True)
        drawing.finish(axis, metric, "")

    title = f"From teacher to student, step {last}"
    panels = [Panel(title, draw, drawing.rows_height(len(along)), tuple(curves))]
    if any(len(points) > 1 for points in curves.values()):
        panels.append(_family_panel(log_history, f"eval_{metric}", list(curves), "Over training"))
    return panels


def block_panels(log_history: LogHistory) -> list[Panel]:
    """The norm of the gradient of each of the student's blocks, and its alignment with the teacher, over training.

    Args:
        log_history: `trainer.state.log_history`; alignments need a run with `eval_stepping_stones=True`.

    Raises:
        ValueError: If neither was logged.
    """
    families = [one for one in _families(log_history) if one[0] in ("grad_norm_block", "eval_block_cka")]
    if not families:
        raise ValueError("the log holds neither `grad_norm_block_1` nor `eval_block_1_cka`; the run logged no step.")
    return [_family_panel(log_history, *one) for one in families]


def other_panels(log_history: LogHistory, drawn: Sequence[Panel]) -> list[Panel]:
    """A panel for all that was logged and that others do not show, those of one kind together."""
    shown = {term for panel in drawn for term in panel.terms}
    return [_family_panel(log_history, *one) for one in _families(log_history) if not shown.issuperset(one[1])]


def plot_losses(log_history: LogHistory, path: str | Path, weights: Mapping[str, str] | None = None) -> Path:
    """Draw the losses over the steps: the total and its parts, and the task and distillation loss of each stone.

    Args:
        log_history: `trainer.state.log_history`.
        path: Where the PNG goes.
        weights: From `weights_of` (`hf_blockkd.commands.report.settings`), for the formula of the total.

    Returns:
        `path`.

    Raises:
        ValueError: If nothing was logged.
        ImportError: If matplotlib is not installed.

    Example:
        ```python
        >>> import tempfile
        >>> from hf_blockkd.commands.report.curves import plot_losses
        >>> log = [{"step": step, "loss": 1 / step, "stone_1/task": 2 / step} for step in (1, 2, 3)]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plot_losses(log, f"{folder}/losses.png").name
        'losses.png'

        ```
    """
    return drawing.save_panels(loss_panels(log_history, weights), path)


def plot_path(log_history: LogHistory, path: str | Path, metric: str = "accuracy") -> Path:
    """Draw a metric along the path from the teacher over the stepping stones to the student.

    The left panel shows the last evaluation; where there are several, a right one shows each of them over training.

    Args:
        log_history: `trainer.state.log_history` of a run with `eval_stepping_stones=True`.
        path: Where the PNG goes.
        metric: Name of the metric, as `compute_metrics` returns it, or `"loss"`.

    Returns:
        `path`.

    Raises:
        ValueError: If the stones were not evaluated, or the metric is not in the log.
        ImportError: If matplotlib is not installed.

    Example:
        ```python
        >>> import tempfile
        >>> from hf_blockkd.commands.report.curves import plot_path
        >>> log = [{"step": 9, "eval_accuracy": 0.7, "eval_teacher_accuracy": 0.9, "eval_stone_1_accuracy": 0.8}]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plot_path(log, f"{folder}/path.png").name
        'path.png'

        ```
    """
    return drawing.save_panels(path_panels(log_history, metric), path)


def plot_blocks(log_history: LogHistory, path: str | Path) -> Path:
    """Draw the norm of the gradient of each of the student's blocks, and its alignment with the teacher, over training.

    Args:
        log_history: `trainer.state.log_history`; alignments need a run with `eval_stepping_stones=True`.
        path: Where the PNG goes.

    Returns:
        `path`.

    Raises:
        ValueError: If neither was logged.
        ImportError: If matplotlib is not installed.

    Example:
        ```python
        >>> import tempfile
        >>> from hf_blockkd.commands.report.curves import plot_blocks
        >>> log = [{"step": step, "grad_norm_block_1": 1 / step} for step in (1, 2, 3)]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plot_blocks(log, f"{folder}/blocks.png").name
        'blocks.png'

        ```
    """
    return drawing.save_panels(block_panels(log_history), path)


def _families(log_history: LogHistory) -> list[tuple[str, list[str]]]:
    """Names of logged values, those together that tell the same of teacher, stones and student, or of all blocks."""
    families: dict[str, list[str]] = {}
    for key in logged_terms(log_history):
        families.setdefault("loss" if key in LOSS_STYLES else WHOSE.sub("", key), []).append(key)
    return [(family, sorted(keys, key=_order)) for family, keys in families.items()]


def _family_panel(log_history: LogHistory, family: str, keys: Sequence[str], title: str | None = None) -> Panel:
    heading, label = TITLES.get(family, (family, family.rpartition("/")[2]))
    curves = {key: points for key in keys if (points := series(log_history, key))}
    colors = _colors(keys)
    steps = {step for points in curves.values() for step, _ in points}
    if len(steps) == 1:  # no curve
        return _row_panel(f"{title or heading}, step {min(steps)}", curves, label, colors)

    def draw(axis: Axes) -> None:
        for place, (key, points) in enumerate(curves.items()):
            name = _of(key) if len(keys) > 1 or _of(key) != "student" else ""
            drawing.draw_line(axis, points, name, colors[key], place, drawing.DASHES[place % len(drawing.DASHES)])
        values = [value for points in curves.values() for _, value in points]
        if family == "grad_norm_block" and min(values) > 0:
            axis.set_yscale("log")
        drawing.finish(axis, "step", label)

    return Panel(title or heading, draw, drawing.lines_height(len(curves)), tuple(keys))


def _row_panel(title: str, curves: Mapping[str, Points], label: str, colors: Mapping[str, Any]) -> Panel:
    """What was logged once."""
    rows = {_of(key): [points[0][1]] for key, points in curves.items()}

    def draw(axis: Axes) -> None:
        drawing.draw_rows(axis, rows, ".4g", {_of(key): color for key, color in colors.items()})
        drawing.finish(axis, label, "")

    return Panel(title, draw, drawing.rows_height(len(rows)), tuple(curves))


def _number(key: str) -> int | None:
    match = re.search(r"(?:stone|block)_(\d+)", key)
    return int(match[1]) if match else None


def _of(key: str) -> str:
    """Of which model or block a logged value is."""
    number = _number(key)
    if number is None:
        return "teacher" if "teacher_" in key else "student"
    return f"block {number}" if "block_" in key else drawing.stone_name(number)


def _order(key: str) -> tuple[int, int]:
    """Teacher, stones in the order of their numbers, student."""
    number = _number(key)
    return (1, number) if number is not None else (0 if "teacher_" in key else 2, 0)


def _colors(keys: Sequence[str]) -> dict[str, Any]:
    by_number = drawing.stone_colors([number for key in keys if (number := _number(key)) is not None])
    others = {"teacher": drawing.TEACHER_COLOR, "student": drawing.STUDENT_COLOR}
    return {key: by_number[_number(key)] if _number(key) is not None else others[_of(key)] for key in keys}


def _why_no_path(log_history: LogHistory, metric: str) -> str:
    known = {match[1] for entry in log_history for key in entry if (match := re.match(r"eval_stone_\d+_(.+)", key))}
    known = {name for name in known if not COST.search(f"_{name}")}
    if known:
        return f"`metric` is {metric!r}, which was not evaluated; choose one of {', '.join(sorted(known))}."
    return "the log holds no evaluation of the stepping stones; train with `eval_stepping_stones=True`, and evaluate."
