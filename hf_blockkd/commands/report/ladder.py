"""The ladder of models between student and teacher: what each rung costs, and how good it is."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...ladder.saving_trainer import LADDER_NAME
from . import drawing
from .drawing import Panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COSTS = {"flops": "FLOPs of an example", "parameters": "parameters", "time": "time of a batch, measured"}
"""What a rung costs, and what its axis is called."""
Rung = dict[str, Any]


def find_ladders(folder: str | Path) -> list[Path]:
    """The files of ladders that a folder holds, at any depth, as `trainer.evaluate_ladder` writes them."""
    return sorted(Path(folder).rglob(LADDER_NAME)) if Path(folder).is_dir() else []


def read_ladder(path: Path) -> list[Rung]:
    """A dictionary for each rung of each run: `objective`, `seed`, `rung`, `test`, and its costs.

    Raises:
        ValueError: If a line is no rung.
    """
    rungs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            rung = json.loads(line)
            missing = [name for name in ("objective", "seed", "rung", "test", *COSTS) if name not in rung]
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} has a line {number} that is no JSON ({error}); delete it.") from error
        if missing:
            raise ValueError(f"{path} has a line {number} without `{missing[0]}`; run the ladder again.")
        rungs.append(rung)
    if not rungs:
        raise ValueError(f"{path} holds no rung; run the ladder again.")
    return rungs


def read_ladders(names: Mapping[Path, str]) -> list[Rung]:
    """The rungs of some files, with the `ladder` that each belongs to: they are means over the seeds of that alone.

    Args:
        names: File -> that of its run, which runs that differ in their seeds alone share. A ladder is named after its
            objective where that tells all of them apart.
    """
    rungs = [rung | {"run": name} for path, name in names.items() for rung in read_ladder(path)]
    ladders = dict.fromkeys((rung["run"], rung["objective"]) for rung in rungs)
    for part in ("objective", "run"):
        if len({rung[part] for rung in rungs}) == len(ladders):
            return [rung | {"ladder": rung[part]} for rung in rungs]
    return [rung | {"ladder": f"{rung['run']}, {rung['objective']}"} for rung in rungs]


def ladder_panels(rungs: Sequence[Rung]) -> list[Panel]:
    """The metric of teacher, stones and student against each of their costs, a line for each ladder.

    Args:
        rungs: From `read_ladders`; the mean over seeds is drawn, and the median of times.
    """
    return [_panel(rungs, cost, label) for cost, label in COSTS.items()]


def ladder_rows(rungs: Sequence[Rung]) -> list[list[str]]:
    """The same as rows of a table, costs as shares of the teacher's."""
    means = _means(rungs)
    rows = []
    for (ladder, name), rung in means.items():
        whole = means.get((ladder, "teacher"))
        shares = [f"{rung[cost] / whole[cost]:.2f}" if whole else f"{rung[cost]:.4g}" for cost in COSTS]
        rows.append([ladder, name, drawing.written(rung["values"], ".4f"), *shares])
    return rows


def _panel(rungs: Sequence[Rung], cost: str, label: str) -> Panel:
    means = _means(rungs)
    ladders = list(dict.fromkeys(ladder for ladder, _ in means))

    def draw(axis: Axes) -> None:
        names: dict[str, tuple[float, float]] = {}
        for place, ladder in enumerate(ladders):
            own = {name: rung for (one, name), rung in means.items() if one == ladder}
            points = [(rung[cost], statistics.mean(rung["values"])) for rung in own.values()]
            color = (drawing.BLUE, drawing.VERMILION, drawing.GREEN, drawing.PURPLE)[place % 4]
            dashes = drawing.DASHES[place % len(drawing.DASHES)]
            marker = drawing.MARKERS[place % len(drawing.MARKERS)]
            axis.plot(*zip(*points, strict=True), dashes, color=color, label=ladder, marker=marker)
            # Rungs of one number are mostly of one size: the first line's names stand for all.
            named = zip(own, points, strict=True)
            names |= {_shown(name): point for name, point in named if not place}
        axis.margins(0.12, 0.18)
        drawing.finish(axis, label, rungs[0].get("metric", "test"))
        axis.xaxis.set_major_formatter(drawing.matplotlib().ticker.EngFormatter("s" if cost == "time" else ""))
        drawing.draw_named_points(axis, names)
        if len(ladders) > 1 and not axis.figure.legends:  # one is enough for panels side by side
            axis.figure.legend(
                *axis.get_legend_handles_labels(), frameon=False, fontsize=9, loc="outside lower center", ncols=2
            )

    return Panel(f"By {label}", draw, 3.4, note=", ".join(ladders))


def _means(rungs: Sequence[Rung]) -> dict[tuple[str, str], dict[str, Any]]:
    """(ladder, rung) -> its values over seeds, and its costs."""
    means = {}
    for key in dict.fromkeys((rung["ladder"], rung["rung"]) for rung in rungs):
        same = [rung for rung in rungs if (rung["ladder"], rung["rung"]) == key]
        costs = {cost: statistics.median(rung[cost] for rung in same) for cost in COSTS}
        means[key] = {"values": [rung["test"] for rung in same], **costs}
    return means


def _shown(name: str) -> str:
    kind, _, number = name.partition(" ")
    return drawing.stone_name(int(number)) if kind == "stone" and number.isdecimal() else name
