"""What a comparison finds: a line of `results.jsonl` for each model when it is finished, one table, one picture."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState

from hf_blockkd.commands.report.drawing import draw_rows

TEACHER = "teacher"
Run = dict[str, Any]


@dataclass
class Metric:
    """The figure that is compared.

    Attributes:
        name: For table and picture.
        of: Reads it from the metrics of an evaluation with a prefix such as `eval` or `eval_stone_1`.
        style: Format of one value.
        lower_is_better: Whether it is an error.
    """

    name: str
    of: Callable[[dict[str, float], str], float]
    style: str = ".2%"
    lower_is_better: bool = False

    def show(self, value: float) -> str:
        return format(value, self.style)


class Results:
    """The finished models of an output folder, from this call and from earlier ones of the same settings.

    Args:
        folder: Holds `results.jsonl` and `settings.json`, or will.
        settings: What all models of a comparison have in common.
        variants: Name of a variant -> the fields in which it differs.

    Attributes:
        runs: A dictionary for each finished model.
        is_repeated: Whether the folder holds a comparison that was begun before.

    Raises:
        ValueError: If that had other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], variants: dict[str, dict[str, Any]]) -> None:
        self.folder, self._settings = folder, folder / "settings.json"
        self._lines = folder / "results.jsonl"
        self._common = json.loads(json.dumps({"settings": settings, "variants": variants}, default=str))
        self.is_repeated = self._settings.is_file()
        self.runs: list[Run] = []
        if self.is_repeated:
            before = json.loads(self._settings.read_text(encoding="utf-8"))
            for part, values in self._common.items():
                self._check_same(before[part], values)
            self._common["variants"] = before["variants"] | self._common["variants"]
            lines = self._lines.read_text(encoding="utf-8").splitlines() if self._lines.is_file() else []
            self.runs = [json.loads(line) for line in lines]

    def _check_same(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        for name in before.keys() & now.keys():
            if before[name] != now[name]:
                raise ValueError(
                    f"`{name}` is {now[name]!r}, but {before[name]!r} in the comparison that {self.folder} holds; give "
                    "another `output_dir`, or delete that one."
                )

    def begin(self) -> None:
        """Note the settings, from which on the folder belongs to them."""
        PartialState().wait_for_everyone()  # until all have read what was there
        if PartialState().is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._settings.write_text(json.dumps(self._common, indent=2) + "\n", encoding="utf-8")

    def has(self, model: str, seed: int | None) -> bool:
        return any((run["model"], run["seed"]) == (model, seed) for run in self.runs)

    def add(self, run: Run) -> None:
        """Keep a finished model, in the file as well."""
        self.runs.append(run)
        if PartialState().is_main_process:
            with self._lines.open("a", encoding="utf-8") as file:
                file.write(json.dumps(run) + "\n")


def table(runs: list[Run], metric: Metric) -> str:
    """A line for each model, with mean and standard deviation over seeds where there are several."""
    has_f1 = any("f1" in run for run in runs)
    heads = f"{'model':<28}{'seeds':>6}{metric.name:>20}" + f"{'F1':>20}" * has_f1
    lines = [f"{heads}{'parameters':>13}{'training':>12}"]
    for model, same in _by_model(runs).items():
        line = f"{model:<28}{len(same):>6}{_mean(same, metric.name, metric.style):>20}"
        line += f"{_mean(same, 'f1', '.2%'):>20}" * has_f1
        timed = [run["seconds"] for run in same if run["seconds"] is not None]
        seconds = f"{statistics.mean(timed):.0f} s" if timed else "-"
        lines.append(f"{line}{same[0]['parameters']:>13,}{seconds:>12}")
    return "\n".join(lines)


def class_table(runs: list[Run]) -> str:
    """F1 of each class and model, in the mean over seeds, where runs have them; a line for each class."""
    models = {model: same for model, same in _by_model(runs).items() if all("classes" in run for run in same)}
    if not models:
        return ""
    widths = {model: max(len(model), 8) + 2 for model in models}
    lines = [f"{'F1 of class':<28}" + "".join(f"{model:>{width}}" for model, width in widths.items())]
    for name in next(iter(models.values()))[0]["classes"]:
        values = {m: statistics.mean(run["classes"][name]["f1"] for run in same) for m, same in models.items()}
        lines.append(f"{name:<28}" + "".join(f"{value:>{widths[model]}.2%}" for model, value in values.items()))
    return "\n".join(["", *lines, ""])


def _by_model(runs: list[Run]) -> dict[str, list[Run]]:
    models: dict[str, list[Run]] = {}
    for run in runs:
        models.setdefault(run["model"], []).append(run)
    return models


def _mean(runs: list[Run], name: str, style: str) -> str:
    values = [run[name] for run in runs if name in run]
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):{style}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{style}}{spread}"


def draw(runs: list[Run], metric: Metric, path: Path) -> None:
    """A picture of the learning curves, and of the metric from teacher to student where a run knows it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    colours: dict[str, str] = {}
    for run in runs:
        if run.get("curve"):
            label = None if run["model"] in colours else run["model"]
            colour = colours.setdefault(run["model"], f"C{len(colours)}")
            left.plot(*zip(*run["curve"], strict=True), marker=".", color=colour, label=label)
    for run in runs:
        if run["model"] == TEACHER:
            left.axhline(run[metric.name], color="grey", linestyle="--", label=TEACHER)
    left.set(xlabel="epoch", ylabel=metric.name, title="Learning curves")
    left.legend()
    stepping = [run for run in runs if run.get("path")][-1:]
    for run in stepping:
        draw_rows(right, {name: [value] for name, value in run["path"].items()}, metric.style, is_path=True)
    right.set(xlabel=metric.name, title="From teacher to student, by stepping stone")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
    plt.close(figure)
