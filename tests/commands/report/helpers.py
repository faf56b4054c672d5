"""Runs written by hand, and which labels of a figure overlap."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib.text import Text


def write_run(folder: Path, *entries: dict[str, Any], **args: Any) -> Path:
    """A folder as a trainer leaves it, with entries of a log and arguments."""
    folder.mkdir(parents=True, exist_ok=True)
    log = [{"step": step, **entry} for step, entry in enumerate(entries, start=1)]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    if args:
        (folder / "training_args.json").write_text(json.dumps(args))
    return folder


def overlapping_labels(figure: Any) -> list[tuple[str, str]]:
    """Pairs of texts of a figure that cover each other, and (text, "edge") for those that are cut off."""
    figure.draw_without_rendering()  # lays everything out
    drawn = [text for text in _shown_texts(figure) if text.get_visible() and text.get_text().strip()]
    # An annotation's own extent holds its arrow, too.
    boxes = [(text.get_text(), Text.get_window_extent(text)) for text in drawn]
    pairs = [
        (a, b) for (a, one), (b, other) in itertools.combinations(boxes, 2) if one.padded(-1).overlaps(other.padded(-1))
    ]
    width, height = figure.bbox.width, figure.bbox.height
    cut_off = [
        (a, "edge") for a, box in boxes if box.x0 < -1 or box.y0 < -1 or box.x1 > width + 1 or box.y1 > height + 1
    ]
    return pairs + cut_off


def _shown_texts(figure: Any) -> Iterator[Text]:
    """Ticks outside the limits of their axis are kept, but not drawn."""
    yield from figure.texts
    for legend in figure.legends:
        yield from legend.get_texts()
    for axes in figure.axes:
        yield from (axes.title, *axes.texts)
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
            yield from (axis.label, axis.offsetText, *(tick.label1 for tick in ticks if low <= tick.get_loc() <= high))
