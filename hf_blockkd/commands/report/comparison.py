"""Several runs side by side: those of one kind together, their spread over seeds, and what of the gap each closes."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import drawing
from .drawing import Panel
from .runs import Run
from .settings import OF_A_PLACE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SEED = re.compile(r"[/_-]?seed[/_-]?\d+$")
OF_A_SEED = ("seed", "data_seed")


@dataclass
class Group:
    """Runs that differ in their seeds alone.

    Attributes:
        name: That of their folder, without the seed.
        runs: One or more.
    """

    name: str
    runs: list[Run] = field(default_factory=list)

    @property
    def args(self) -> Mapping[str, Any]:
        return self.runs[0].args

    def values(self, key: str) -> list[float]:
        """The last that each run logged."""
        return [value for run in self.runs if (value := run.last(key)) is not None]


def group_runs(runs: Sequence[Run], base: Path) -> list[Group]:
    """Put those together that differ in their seeds alone.

    A student of other layers or another size is of another kind; so is a second run of one seed, which must differ in
    something that is not told, such as its data.

    Args:
        runs: Of any folders.
        base: The folder that names are relative to.
    """
    groups: dict[Any, Group] = {}
    seen: Counter[Any] = Counter()
    for run in runs:
        relative = str(run.folder.relative_to(base))
        name = SEED.sub("", relative if relative != "." else run.folder.resolve().name) or relative
        skipped = (*OF_A_SEED, *OF_A_PLACE)
        args = {key: value for key, value in run.args.items() if not key.startswith(skipped)}
        kind = json.dumps([args or name, run.cut and run.cut.layers, run.parameters], sort_keys=True, default=str)
        seed = run.args.get("seed")
        key = kind, seen[kind, seed]
        seen[kind, seed] += 1
        if key not in groups:
            is_taken = any(group.name == name for group in groups.values())
            groups[key] = Group(relative if is_taken else name)
        groups[key].runs.append(run)
    return list(groups.values())


def teacher_value(groups: Sequence[Group], metric: str, folders: Sequence[Path]) -> float | None:
    """The teacher's metric: as it was evaluated beside stones, or as a comparison of the examples noted it."""
    values = [value for group in groups for value in group.values(f"eval_teacher_{metric}")]
    for folder in folders:
        path = folder / "results.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        values += [line[metric] for line in map(json.loads, lines) if line.get("model") == "teacher" and metric in line]
    return values[-1] if values else None


def gap_closed(groups: Sequence[Group], metric: str, teacher: float | None) -> dict[str, float]:
    """Share of the way from the student alone to the teacher that each group goes.

    Args:
        groups: All that are compared.
        metric: Without `eval_`; one whose name ends in `loss` or `perplexity` is better the lower it is.
        teacher: Its value.

    Returns:
        Name -> share, where the teacher's figure and that of runs with `objective="alone"` are there, and the teacher
        is the better one.
    """
    alone = [value for group in groups if group.args.get("objective") == "alone" for value in _last(group, metric)]
    if teacher is None or not alone:
        return {}
    gap = teacher - sum(alone) / len(alone)
    if (-gap if metric.endswith(("loss", "perplexity")) else gap) <= 0:
        return {}
    means = {group.name: sum(found) / len(found) for group in groups if (found := _last(group, metric))}
    return {name: 1 - (teacher - mean) / gap for name, mean in means.items()}


def comparison_panel(groups: Sequence[Group], metric: str, teacher: float | None) -> Panel:
    """A row for each group, with a ring for each seed and a bar for the mean.

    Raises:
        ValueError: If there are no two figures to compare.
    """
    rows = {group.name: found for group in groups if (found := _last(group, metric))}
    if teacher is not None:
        rows = {"teacher": [teacher], **{name: found for name, found in rows.items() if Path(name).name != "teacher"}}
    if len(rows) < 2:
        raise ValueError(f"there are no two runs that evaluated `{metric}`.")

    def draw(axis: Axes) -> None:
        colors = {"teacher": drawing.TEACHER_COLOR}
        drawing.draw_rows(axis, rows, ".3f", colors)
        drawing.finish(axis, metric, "")

    has_seeds = any(len(found) > 1 for found in rows.values())
    note = "Each ring is a seed, a bar their mean; mean ± standard deviation at the right." if has_seeds else ""
    return Panel(f"Comparison, {metric} at the last evaluation", draw, drawing.rows_height(len(rows)), note=note)


def _last(group: Group, metric: str) -> list[float]:
    return group.values(f"eval_{metric}")
