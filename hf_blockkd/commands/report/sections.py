"""What a page says of runs, part by part: `overview_parts`, `ladder_part` and `run_parts`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from .block_costs import cost_panel, cost_rows, read_costs
from .comparison import Group, comparison_panel, gap_closed, teacher_value
from .curves import block_panels, loss_panels, other_panels, path_panels
from .drawing import Panel, save_panels, written
from .ladder import COSTS, Rung, ladder_panels, ladder_rows
from .page import Part, Picture, Table
from .runs import Run, logged_terms, series, stones_of
from .settings import changed_settings, weights_of
from .structure import block_panel, block_rows, cut_rows


class Pictures:
    """Draws what can be drawn, and keeps what could not be."""

    def __init__(self) -> None:
        self.drawn: list[Path] = []
        self.missing: list[str] = []

    def draw(self, path: Path, make: Callable[[], list[Panel]]) -> tuple[list[Panel], str]:
        """The panels, which are saved as one PNG, or a sentence that says why there are none."""
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            panels = make()
        except ValueError as error:
            self.missing.append(f"{path} is not drawn: {error}")
            return [], str(error)
        self.drawn.append(save_panels(panels, path))
        return panels, ""


def overview_parts(
    groups: Sequence[Group], metric: str, folders: Sequence[Path], output: Path, pictures: Pictures
) -> Iterator[Part]:
    """What the runs came to, those that differ in their seeds together."""
    teacher = teacher_value(groups, metric, folders)
    gaps = gap_closed(groups, metric, teacher)
    heads = ["run", "seeds", metric, *["gap closed"] * bool(gaps), "parameters", "training"]
    rows = []
    for group in groups:
        seconds, values = group.values("train_runtime"), group.values(f"eval_{metric}")
        gap = gaps.get(group.name)
        rows.append([group.name, len(group.runs), written(values, ".4f") if values else "-"])
        rows[-1] += [f"{gap:.0%}" if gap is not None else "-"] * bool(gaps)
        rows[-1] += [_count(group.runs[0].parameters), f"{statistics.mean(seconds):.0f} s" if seconds else "-"]
    lines = [f"The last evaluation of each run; mean ± standard deviation over seeds. Metric: {metric}."]
    if teacher is not None:
        lines.append(f"The teacher has {teacher:.4f}.")
    if gaps:
        lines.append("Gap closed: 0 % is the student trained alone, 100 % the teacher.")
    else:
        lines.append(
            "For the gap closed, compare with a run of objective='alone' that is worse than the teacher, and set "
            "eval_stepping_stones=True."
        )
    panel, path, shown = None, output / "comparison.png", []
    if sum(bool(group.values(f"eval_{metric}")) for group in groups) + (teacher is not None) > 1:
        panel = comparison_panel(groups, metric, teacher)
        pictures.drawn.append(save_panels([panel], path))
        shown = [Picture.of(panel)]
    yield Part("Comparison", lines, [Table(heads, rows, range(1, len(heads)))], shown)


def ladder_parts(rungs: Sequence[Rung], output: Path, pictures: Pictures) -> Iterator[Part]:
    """The ladders of each metric."""
    metrics = list(dict.fromkeys(rung.get("metric", "test") for rung in rungs))
    for metric in metrics:
        same = [rung for rung in rungs if rung.get("metric", "test") == metric]
        path = output / ("ladder.png" if len(metrics) == 1 else f"ladder_{metric}.png")
        panels, _ = pictures.draw(path, partial(ladder_panels, same))
        table = Table(["ladder", "rung", metric, *COSTS], ladder_rows(same), range(2, 3 + len(COSTS)))
        lines = [
            "Every model between student and teacher, on the test rows. Costs in the table are shares of the teacher's."
        ]
        yield Part("From student to teacher", lines, [table], [Picture.of(panel) for panel in panels])


def run_parts(run: Run, output: Path, metric: str, pictures: Pictures) -> Iterator[Part]:
    """All that is to be said of one run."""
    losses = pictures.draw(output / "losses.png", lambda: loss_panels(run.log, weights_of(run)))
    shows_stones = run.args.get("eval_stepping_stones") or stones_of(run.log, r"eval_stone_(\d+)_")
    # What a run was not asked for is not missing.
    path = pictures.draw(output / "path.png", lambda: path_panels(run.log, metric)) if shows_stones else ([], "")
    blocks = pictures.draw(output / "blocks.png", lambda: block_panels(run.log)) if run.args else ([], "")
    costs = read_costs(run.log, metric)
    hurting = pictures.draw(output / "costs.png", lambda: [cost_panel(costs, metric)]) if costs else ([], "")
    yield from _settings_parts(run)
    yield from _cut_parts(run, output, pictures)
    drawn = {"From teacher to student": path, "Losses": losses, "Blocks over training": blocks}
    for title, (panels, why) in drawn.items():
        if panels or why:
            lines = [f"Not drawn: {why}"] if why else []
            yield Part(title, lines, pictures=[Picture.of(panel) for panel in panels], is_soft=bool(why))
    if costs:
        heads = ["block", f"{metric} of the teacher", "with the student's block", "cost"]
        lines = [
            "The teacher with one block of the student's at a time, its states led through maps into the student's "
            "before it. Where a block is dear, more layers would help: see `hf-blockkd plan --rebalance`."
        ]
        table = Table(heads, cost_rows(costs), range(1, 4))
        yield Part("Which block hurts", lines, [table], [Picture.of(panel) for panel in hurting[0]])
    others = other_panels(run.log, [panel for panels, _ in (*drawn.values(), hurting) for panel in panels])
    if others:
        yield Part("All other curves", pictures=[Picture.of(panel) for panel in others])
    yield _cost_part(run)
    if terms := logged_terms(run.log):
        rows = []
        for term in terms:
            values = [value for _, value in series(run.log, term)]
            rows.append(
                [term, len(values), *(f"{value:.4g}" for value in (values[0], values[-1], min(values), max(values)))]
            )
        yield Part(
            "Every logged value",
            tables=[Table(["name", "times", "first", "last", "lowest", "highest"], rows, range(1, 6))],
            is_folded=True,
        )


def _settings_parts(run: Run) -> Iterator[Part]:
    if not run.args:
        yield Part("Settings", ["There is no `training_args.json`: another trainer wrote this folder."], is_soft=True)
        return
    changed = {**changed_settings(run.args), "Left to the run": run.resolved}
    tables = [
        Table([kind, "value"], [[name, _plainly(value)] for name, value in fields.items()])
        for kind, fields in changed.items()
        if fields
    ]
    yield Part("Settings", ["What differs from the defaults." if tables else "All as by default."], tables)


def _cut_parts(run: Run, output: Path, pictures: Pictures) -> Iterator[Part]:
    """The models: what the student keeps of the teacher, and which blocks answer each other."""
    lines = [f"The student has {run.parameters:,} parameters."] if run.parameters else []
    tables, shown = [], []
    if run.cut is not None:
        rows = [[name, kept, size, f"{kept / size:.0%}"] for name, kept, size in cut_rows(run.cut)]
        tables.append(Table(["kept of the teacher", "entries", "of", "share"], rows, (1, 2, 3)))
    elif run.args:
        lines.append("The student was not cut out of its teacher.")
    if run.block_map is not None:
        panels, _ = pictures.draw(output / "map.png", lambda: [block_panel(run.block_map, run.cut)])
        shown = [Picture.of(panel) for panel in panels]
        heads = ["block", "student layers", "teacher layers", "stepping stone"]
        tables.append(Table(heads, block_rows(run.block_map)))
    if lines or tables:
        yield Part("Models", lines, tables, shown)


def _cost_part(run: Run) -> Part:
    """Time and memory, as far as they were logged."""
    last = {key: value for entry in run.log for key, value in entry.items()}
    names = {
        "train_runtime": ("training", "{:,.1f} s"),
        "train_samples_per_second": ("examples a second", "{:,.1f}"),
        "train_steps_per_second": ("steps a second", "{:,.2f}"),
        "eval_runtime": ("an evaluation of the student", "{:,.2f} s"),
        "eval_teacher_runtime": ("an evaluation of the teacher", "{:,.2f} s"),
    }
    rows = [[text, style.format(last[key])] for key, (text, style) in names.items() if key in last]
    memory = {key: value for key, value in last.items() if "_mem_" in key}
    rows += [[key, f"{value / 2**20:,.1f} MiB"] for key, value in memory.items()]
    lines = []
    if "train_runtime" not in last:
        lines.append("The time of training is known from its end on; call `trainer.save_state()` after it.")
    if not memory:
        lines.append("Memory was not measured; train with `skip_memory_metrics=False`.")
    return Part("Time and memory", lines, [Table(["what", "measured"], rows, (1,))] if rows else [], is_soft=True)


def _count(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"


def _plainly(value: object) -> str:
    return json.dumps(value) if isinstance(value, (dict, list, bool)) else str(value)
