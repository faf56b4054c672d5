"""From folders of runs to a page and pictures: `report`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ...version import __version__
from .comparison import group_runs
from .ladder import find_ladders, read_ladders
from .page import Section, render
from .runs import Run, choose_metric, find_runs
from .sections import Pictures, ladder_parts, overview_parts, run_parts

PAGE_NAME = "report.html"


class Report(NamedTuple):
    """What was written.

    Attributes:
        page: The page; `None` where there was nothing to draw.
        pictures: PNGs beside it, or beside each run.
        missing: A sentence for each picture that could not be drawn.
    """

    page: Path | None
    pictures: list[Path]
    missing: list[str]


def report(
    folders: Sequence[str | Path] | str | Path, output: str | Path | None = None, metric: str | None = None
) -> Report:
    """Write a page about runs, and their pictures as PNGs.

    Each run has `losses.png`, `blocks.png`, `path.png` where its stones were evaluated, `costs.png` where its blocks
    were, and `map.png` where it was saved how its models are cut: in its own folder, or in one of the same name under
    `output`. Beside the page, `report.html`, are `comparison.png`, where there are several runs, and `ladder.png`,
    where `trainer.evaluate_ladder` has measured one (`ladder_<metric>.png`, where several by different metrics).

    Args:
        folders: Of runs, of one of their checkpoints, or above some of them.
        output: Folder for page and pictures; default: that which is given, of several the one above all of them.
        metric: Of the evaluation, such as `"f1"`; default: accuracy where there is one, else the loss.

    Returns:
        What was written; no page where there was nothing to draw.

    Raises:
        ValueError: If a folder holds no run, a file is not what it should be, or several folders have none in common
            and there is no `output`.
        ImportError: If matplotlib is not installed.

    Example:
        ```python
        >>> import json, tempfile
        >>> from pathlib import Path
        >>> from hf_blockkd.commands.report import report
        >>> folder = Path(tempfile.mkdtemp())
        >>> log = [{"step": step, "loss": 1 / step} for step in (1, 2, 3)]
        >>> _ = (folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))
        >>> report(folder).page.name
        'report.html'

        ```
    """
    folders = [Path(folders)] if isinstance(folders, (str, Path)) else [Path(folder) for folder in folders]
    if len(folders) > 1:
        folders = list(dict.fromkeys(folder.resolve() for folder in folders))
    base = folders[0] if len(folders) == 1 else Path(os.path.commonpath(folders))
    if output is None and len(folders) > 1 and base == base.parent:
        raise ValueError(
            f"{folders[0]} and {folders[-1]} have no folder in common; name one for the page with `output`."
        )
    ladders = list(dict.fromkeys(path for folder in folders for path in find_ladders(folder)))
    places = [place for folder in folders for place in _runs_or_ladders(folder)]
    runs = [Run.read(place) for place in dict.fromkeys(places)]
    output = base if output is None else Path(output)
    pictures = Pictures()
    metric = choose_metric([run.log for run in runs]) if metric is None else metric

    sections = []
    for run in runs:
        relative = run.folder.relative_to(base)
        title = "The run" if len(runs) == 1 else str(relative)
        sections.append(Section(title, list(run_parts(run, output / relative, metric, pictures)), len(runs) > 1))
    before, groups = [], group_runs(runs, base)
    if len(runs) > 1:
        before.append(Section("Runs", list(overview_parts(groups, metric, folders, output, pictures))))
    if ladders:
        names = {run.folder.resolve(): group.name for group in groups for run in group.runs}
        rungs = read_ladders({path: names.get(path.parent.resolve(), _relative(path, base)) for path in ladders})
        before.append(Section("Ladder", list(ladder_parts(rungs, output, pictures))))
    if not pictures.drawn:
        return Report(None, [], pictures.missing)
    page = output / PAGE_NAME
    counts = [
        f"{len(found)} {what}{'s' * (len(found) != 1)}" for what, found in (("run", runs), ("ladder", ladders)) if found
    ]
    subtitle = f"{' and '.join(counts)}, drawn by hf_blockkd {__version__}."
    html = render(f"Run report: {base.resolve().name}", subtitle, [*before, *sections])
    page.write_text(html, encoding="utf-8")
    return Report(page, pictures.drawn, pictures.missing)


def _relative(path: Path, base: Path) -> str:
    return os.path.relpath(path.parent.resolve(), base.resolve())


def _runs_or_ladders(folder: Path) -> list[Path]:
    """The runs of a folder, which needs none where it holds a ladder."""
    try:
        return find_runs(folder)
    except ValueError:
        if find_ladders(folder):
            return []
        raise
