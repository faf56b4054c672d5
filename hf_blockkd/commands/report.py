"""Pictures of a run: `plot_losses`, `plot_path` and `plot_blocks`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from ..objectives.block_kd import OURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CHECKPOINT = re.compile(rf"\b{PREFIX_CHECKPOINT_DIR}-\d+\b")
LogHistory = Sequence[Mapping[str, Any]]
"""What a trainer logged: `trainer.state.log_history`."""

# Okabe and Ito's colours, which stay apart for colour-blind readers.
TEACHER_COLOR = "#000000"
STUDENT_COLOR = "#D55E00"
LOSS_STYLES = {
    "loss": ("total", "#000000"),
    "loss_task": ("task", "#0072B2"),
    "loss_distill": ("distillation", "#D55E00"),
    "loss_cross": ("cross", "#009E73"),
    "loss_state": ("states", "#CC79A7"),
    "loss_hint": ("hints", "#56B4E9"),
    "loss_router": ("router", "#E69F00"),
}


def find_runs(folder: str | Path) -> list[Path]:
    """The folders of runs that a folder is or holds, at any depth, such as the methods and seeds of a comparison.

    Args:
        folder: The `output_dir` of a run, one of its checkpoints, or a folder above some of them.

    Raises:
        ValueError: If there is none.
    """
    folder = Path(folder)
    if _places(folder):
        return [folder]
    found = [place for place in sorted(folder.rglob("*")) if not CHECKPOINT.search(str(place)) and _places(place)]
    if not found:
        raise ValueError(
            f"{folder}, its checkpoints and folders hold no trainer_state.json; give the `output_dir` of a run that "
            "saved a checkpoint, or call `trainer.save_state()` after training."
        )
    return found


def _places(folder: Path) -> list[Path]:
    """Where a run's state is, the run's own folder before its newest checkpoint."""
    places = [folder]
    if folder.is_dir() and (checkpoint := get_last_checkpoint(str(folder))) is not None:
        places.append(Path(checkpoint))
    return [place for place in places if (place / "trainer_state.json").is_file()]


def read_log_history(folder: str | Path) -> list[dict[str, Any]]:
    """Read what a run logged from its `trainer_state.json`.

    Args:
        folder: The `output_dir` of a run, or one of its checkpoints. Where `output_dir` itself has no
            `trainer_state.json`, that of its newest checkpoint is read.

    Raises:
        ValueError: If there is none, or it holds no log.
    """
    path = _places(find_runs(folder)[0])[0] / "trainer_state.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))["log_history"]
    except (json.JSONDecodeError, KeyError) as error:
        raise ValueError(f"{path} is no state of a trainer ({error!r}); give another folder.") from error


def read_weights(folder: str | Path) -> dict[str, str]:
    """What each part of the loss counts in the total, in words, from a run's `training_args.json`.

    Args:
        folder: As for `read_log_history`.

    Returns:
        Name of the logged part -> its weight; empty where the run has no such file, as those of other trainers.
    """
    paths = [place / "training_args.json" for place in (Path(folder), *_places(Path(folder)))]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        return {}
    args = json.loads(path.read_text(encoding="utf-8"))
    weights = {f"loss_{name}": args.get(f"{name}_weight", 1.0) for name in ("task", "distill", "cross", "hint")}
    words = {name: "" if weight == 1 else f"{weight:g} x " for name, weight in weights.items()}
    state, schedule = args.get("state_weight"), args.get("stone_schedule")
    # They are logged by default only where connectors were fitted, and fall to 0 there.
    falls = schedule == "linear" or (schedule is None and state is None)
    words["loss_state"] = f"{OURS['state_weight'] if state is None else state:g}{' to 0' * falls} x "
    return words | {"loss_router": "router_aux_loss_coef x "}


def plot_losses(log_history: LogHistory, path: str | Path, weights: Mapping[str, str] | None = None) -> Path:
    """Draw the losses over the steps: the total and its parts, and the task and distillation loss of each stone.

    Args:
        log_history: `trainer.state.log_history`.
        path: Where the PNG goes.
        weights: From `read_weights`, for the legend of the total.

    Returns:
        `path`.

    Raises:
        ValueError: If nothing was logged.
        ImportError: If matplotlib is not installed.

    Example:
        ```python
        >>> import tempfile
        >>> from hf_blockkd.commands.report import plot_losses
        >>> log = [{"step": step, "loss": 1 / step, "stone_1/task": 2 / step} for step in (1, 2, 3)]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plot_losses(log, f"{folder}/losses.png").name
        'losses.png'

        ```
    """
    series = {name: _series(log_history, name) for name in LOSS_STYLES}
    # A part that has no weight is logged as 0 throughout.
    series = {name: points for name, points in series.items() if any(value for _, value in points)}
    if not series:
        raise ValueError("the log holds no `loss`; set `logging_steps` to fewer steps than the run has.")
    indices = _stones(log_history, r"stone_(\d+)/")
    stones = {part: {i: _series(log_history, f"stone_{i}/{part}") for i in indices} for part in ("task", "distill")}
    panels = [part for part, lines in stones.items() if any(lines.values())]
    figure = _figure(width=5.6 + 4.2 * len(panels))
    axes = figure.subplots(1, 1 + len(panels), squeeze=False)[0]
    for name, points in series.items():
        label, color = LOSS_STYLES[name]
        if name == "loss" and weights:
            label += " =\n" + "\n+ ".join(weights[part] + LOSS_STYLES[part][0] for part in series if part != "loss")
        _line(axes[0], points, label, color, width=2.2 if name == "loss" else 1.6)
    _finish(axes[0], "Objective and its parts", "step", "loss")
    for axis, part in zip(axes[1:], panels, strict=True):
        for i, color in _stone_colors(indices).items():
            if stones[part][i]:
                _line(axis, stones[part][i], _stone_name(i), color)
        words = {"task": "Task loss of the stones", "distill": "Distillation loss of the stones"}
        _finish(axis, words[part], "step", "loss, unweighted", legend=part == panels[-1])
    return _save(figure, path)


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
        >>> from hf_blockkd.commands.report import plot_path
        >>> log = [{"step": 9, "eval_accuracy": 0.7, "eval_teacher_accuracy": 0.9, "eval_stone_1_accuracy": 0.8}]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plot_path(log, f"{folder}/path.png").name
        'path.png'

        ```
    """
    indices = _stones(log_history, rf"eval_stone_(\d+)_{re.escape(metric)}$")
    if not indices:
        raise ValueError(_why_no_path(log_history, metric))
    models = {
        "teacher": (f"eval_teacher_{metric}", TEACHER_COLOR),
        **{_stone_name(i): (f"eval_stone_{i}_{metric}", color) for i, color in _stone_colors(indices).items()},
        "student": (f"eval_{metric}", STUDENT_COLOR),
    }
    curves = {name: points for name, (key, _) in models.items() if (points := _series(log_history, key))}
    last = max(step for step, _ in curves[_stone_name(indices[0])])
    along = {name: dict(points)[last] for name, points in curves.items() if last in dict(points)}
    several = any(len(points) > 1 for points in curves.values())

    figure = _figure(width=max(4.6, 0.9 * len(along)) + 5.8 * several)
    axes = figure.subplots(1, 1 + several, squeeze=False)[0]
    axes[0].plot(list(along), list(along.values()), color="0.6", linewidth=1.5, zorder=2)
    for name, value in along.items():
        axes[0].plot([name], [value], marker="o", markersize=9, color=models[name][1], zorder=3)
    write_values(axes[0], along, ".3f")
    _finish(axes[0], f"From teacher to student, step {last}", "", metric, legend=False)
    if several:
        for name, points in curves.items():
            _line(axes[1], points, name, models[name][1], dashed=name == "teacher")
        _finish(axes[1], "Over training", "step", metric)
    return _save(figure, path)


def write_values(axis: Axes, values: Mapping[str, float], style: str) -> None:
    """Write the values of a line at its points, on the side where it does not run.

    Args:
        axis: With the line.
        values: Point by point.
        style: Format of a value.
    """
    heights = list(values.values())
    for place, (name, value) in enumerate(values.items()):
        before, after = heights[place - 1] if place else value, heights[min(place + 1, len(heights) - 1)]
        is_valley = before >= value <= after and before + after > 2 * value
        side = "right" if before < value < after else "left" if before > value > after else "center"
        axis.annotate(
            format(value, style),
            xy=(name, value),
            xytext=({"right": -4, "left": 4, "center": 0}[side], -10 if is_valley else 10),
            textcoords="offset points",
            ha=side,
            va="top" if is_valley else "bottom",
            fontsize=9,
        )
    axis.margins(x=0.12, y=0.25)


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
        >>> from hf_blockkd.commands.report import plot_blocks
        >>> log = [{"step": step, "grad_norm/block_1": 1 / step} for step in (1, 2, 3)]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plot_blocks(log, f"{folder}/blocks.png").name
        'blocks.png'

        ```
    """
    panels = {
        "grad_norm/block_{}": ("Gradient of the student's blocks", "norm", "log"),
        "eval_block_{}_cka": ("Alignment of student and teacher", "linear CKA", "linear"),
    }
    drawn = {key: indices for key in panels if (indices := _stones(log_history, key.format(r"(\d+)") + "$"))}
    if not drawn:
        raise ValueError("the log holds neither `grad_norm/block_1` nor `eval_block_1_cka`; the run logged no step.")
    figure = _figure(width=5.6 * len(drawn))
    axes = figure.subplots(1, len(drawn), squeeze=False)[0]
    for axis, (key, indices) in zip(axes, drawn.items(), strict=True):
        title, label, scale = panels[key]
        for i, color in _stone_colors(indices).items():
            _line(axis, _series(log_history, key.format(i)), f"block {i}", color)
        axis.set_yscale(scale)
        _finish(axis, title, "step", label)
    return _save(figure, path)


def _why_no_path(log_history: LogHistory, metric: str) -> str:
    known = {match[1] for entry in log_history for key in entry if (match := re.match(r"eval_stone_\d+_(.+)", key))}
    known = {name for name in known if not name.endswith(("runtime", "_per_second", "preparation_time"))}
    if known:
        return f"`metric` is {metric!r}, which was not evaluated; choose one of {', '.join(sorted(known))}."
    return "the log holds no evaluation of the stepping stones; train with `eval_stepping_stones=True`."


def _series(log_history: LogHistory, key: str) -> list[tuple[int, float]]:
    """(step, value) of every entry that has the key, one per step, the last one where a step has several."""
    return sorted({entry["step"]: entry[key] for entry in log_history if key in entry and "step" in entry}.items())


def _stones(log_history: LogHistory, pattern: str) -> list[int]:
    return sorted({int(match[1]) for entry in log_history for key in entry if (match := re.match(pattern, key))})


def _stone_name(index: int) -> str:
    return f"$N_{{{index}}}$"


def _stone_colors(indices: Sequence[int]) -> dict[int, Any]:
    """From dark to light along the path: an order that needs no hue to be seen."""
    viridis = _matplotlib().colormaps["viridis"]
    return {i: viridis(0.15 + 0.7 * k / max(len(indices) - 1, 1)) for k, i in enumerate(indices)}


def _matplotlib() -> ModuleType:
    try:
        import matplotlib
        import matplotlib.figure
    except ImportError as error:
        raise ImportError("Pictures need matplotlib; install it with `pip install matplotlib`.") from error
    return matplotlib


def _figure(width: float) -> Figure:
    # A figure of its own is drawn with Agg: no window, and nothing of pyplot's global state.
    figure = _matplotlib().figure.Figure(figsize=(width, 3.8), layout="constrained")
    figure.get_layout_engine().set(wspace=0.05)
    return figure


def _line(
    axis: Axes, points: Sequence[tuple[int, float]], label: str, color: Any, width: float = 1.8, dashed: bool = False
) -> None:
    steps, values = zip(*points, strict=True)
    marker = "o" if len(points) <= 20 else None
    axis.plot(
        steps, values, "--" if dashed else "-", label=label, color=color, linewidth=width, marker=marker, markersize=4
    )


def _finish(axis: Axes, title: str, x_label: str, y_label: str, legend: bool = True) -> None:
    axis.set_title(title, fontsize=11)
    axis.set_xlabel(x_label)
    axis.set_ylabel(y_label)
    axis.grid(color="0.9")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    if legend:
        # Beside the panel, where it hides no line however many there are.
        axis.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _save(figure: Figure, path: str | Path) -> Path:
    figure.savefig(path, format="png", dpi=150)
    return Path(path)
