"""How pictures are drawn: panels of one look, whose labels stand where nothing else does.

Everything is told without colour, too: lines differ in dashes and markers, and have their names beside their ends.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation

# Okabe and Ito's colours, which stay apart for colour-blind readers.
BLACK, BLUE, VERMILION, GREEN, PURPLE, SKY, ORANGE = (
    "#000000",
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#E69F00",
)
TEACHER_COLOR, STUDENT_COLOR = BLACK, VERMILION
MARKERS = "os^DvPX<>h"
DASHES = ("-", "--", "-.", ":")
PANEL_WIDTH = 4.3
"""Inches: what is legible both on a page and across a phone."""
DOTS = 150
"""Dots an inch."""
MOST_MARKERS = 20
AT_END = "at end"
"""Mark of the names beside the ends of lines, which are moved apart before a figure is saved."""
GAP = 11.5
"""Points between the baselines of two labels."""


@dataclass(frozen=True)
class Panel:
    """One drawing with axes of its own.

    Attributes:
        title: Above it.
        draw: Fills the axes.
        height: In inches.
        terms: Names of the logged values that it shows.
        note: What else is to be said of it.
    """

    title: str
    draw: Callable[[Axes], None]
    height: float = 3.2
    terms: tuple[str, ...] = ()
    note: str = ""


def save_panels(panels: Sequence[Panel], path: str | Path) -> Path:
    """Draw panels side by side into a PNG.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    figure = _figure(PANEL_WIDTH * len(panels), max(panel.height for panel in panels))
    for axis, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        panel.draw(axis)
        axis.set_title(panel.title, fontsize=11)
    _save(figure, path)
    return Path(path)


def panel_png(panel: Panel) -> bytes:
    """A panel by itself as a PNG, without its title, which the page has.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    figure, file = _figure(PANEL_WIDTH, panel.height), io.BytesIO()
    panel.draw(figure.subplots())
    _save(figure, file)
    return file.getvalue()


def draw_line(
    axis: Axes, points: Sequence[tuple[float, float]], label: str, color: Any, place: int = 0, dashes: str = "-"
) -> None:
    """A line over the steps with its name beside its end.

    Args:
        axis: To draw on.
        points: (x, y), rising in x.
        label: Its name.
        color: Of the line.
        place: Among the lines of the panel, which chooses the marker.
        dashes: Of the line, as matplotlib calls them.
    """
    steps, values = zip(*points, strict=True)
    every = math.ceil(len(points) / MOST_MARKERS)
    marker = MARKERS[place % len(MARKERS)]
    axis.plot(steps, values, dashes, label=label, color=color, marker=marker, markersize=4.5, markevery=(0, every))
    finite = [point for point in points if math.isfinite(point[1])]
    if finite:
        axis.annotate(
            label.partition(" =")[0],
            xy=finite[-1],
            xytext=(1.04, 0.5),
            textcoords="axes fraction",
            va="center",
            fontsize=9,
            gid=AT_END,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "linewidth": 0.6, "color": "0.55", "shrinkA": 1, "shrinkB": 3},
        )


def draw_rows(
    axis: Axes,
    values: Mapping[str, Sequence[float]],
    style: str,
    colors: Mapping[str, Any] | None = None,
    is_path: bool = False,
) -> None:
    """A row for each name, from above, with its values along it and their mean written beside it.

    Args:
        axis: To draw on.
        values: Name -> one value, or one for each seed, of which mean and standard deviation are written.
        style: Format of a value.
        colors: Of the rows.
        is_path: Whether rows come one after the other, and a line joins them.
    """
    names = list(values)
    means = [_mean(values[name]) for name in names]
    if is_path:
        axis.plot(means, names, color="0.6", linewidth=1.5, zorder=2)
    for place, (name, mean) in enumerate(zip(names, means, strict=True)):
        color, several = (colors or {}).get(name, BLUE), len(values[name]) > 1
        if several:
            axis.plot(values[name], [name] * len(values[name]), "o", color=color, markersize=7, fillstyle="none")
        axis.plot(
            [mean],
            [name],
            "|" if several else MARKERS[place % len(MARKERS)],
            color=color,
            markersize=14 if several else 8,
            zorder=3,
        )
        axis.annotate(
            written(values[name], style),
            xy=(1.03, name),
            xycoords=axis.get_yaxis_transform(),
            va="center",
            fontsize=9,
            annotation_clip=False,
        )
    axis.invert_yaxis()
    axis.margins(x=0.08, y=0.5 / len(names))


def rows_height(count: int) -> float:
    """Inches that so many rows need."""
    return 1.1 + 0.3 * count


def written(values: Sequence[float], style: str) -> str:
    """The mean of values, with their standard deviation where there are several."""
    mean = _mean(values)
    if len(values) < 2:
        return format(mean, style)
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return f"{mean:{style}} ± {spread:{style}}"


def draw_named_points(axis: Axes, points: Mapping[str, tuple[float, float]]) -> None:
    """Names beside points, where they cover no other name, no point and no line through the points.

    Args:
        axis: That holds the points, and its final limits.
        points: Name -> (x, y).
    """
    for name, point in points.items():
        axis.annotate(name, xy=point, xytext=(0, 8), textcoords="offset points", ha="center", fontsize=9, gid="beside")


def finish(axis: Axes, x_label: str, y_label: str) -> None:
    """Names of the axes, a grid, and no frame."""
    axis.set_xlabel(x_label)
    axis.tick_params(which="both", labelsize=9)
    # No more numbers than stand side by side when each is long.
    axis.xaxis.get_major_locator().set_params(nbins=4, integer=x_label == "step")
    axis.set_ylabel(y_label)
    axis.grid(color="0.9")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def lines_height(count: int) -> float:
    """Inches in which the names of so many lines find place."""
    return max(3.2, 1.0 + count * GAP / 72)


def stone_name(index: int) -> str:
    return f"$N_{{{index}}}$"


def stone_colors(indices: Sequence[int]) -> dict[int, Any]:
    """From dark to light along the path: an order that needs no hue to be seen."""
    viridis = matplotlib().colormaps["viridis"]
    return {i: viridis(0.1 + 0.6 * k / max(len(indices) - 1, 1)) for k, i in enumerate(indices)}


def matplotlib() -> ModuleType:
    """The library, imported where something is drawn.

    Raises:
        ImportError: If it is not installed.
    """
    try:
        import matplotlib
        import matplotlib.figure
        import matplotlib.ticker
    except ImportError as error:
        raise ImportError("Pictures need matplotlib; install it with `pip install matplotlib`.") from error
    return matplotlib


def spread(wanted: Sequence[float], gap: float, top: float) -> list[float]:
    """Places as near as can be to those that are wanted, at least a gap apart, from 0 to `top`.

    Args:
        wanted: Rising.
        gap: Between neighbours.
        top: The highest place.

    Example:
        ```python
        >>> from hf_blockkd.commands.report.drawing import spread
        >>> spread([1.0, 1.0, 9.0], gap=2.0, top=10.0)
        [0.0, 2.0, 9.0]

        ```
    """
    # Without the gaps they need only rise; neighbours that do not are moved to their mean (isotonic regression).
    pools: list[tuple[float, int]] = []
    for place, value in enumerate(wanted):
        pools.append((value - place * gap, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (first, m), (second, n) = pools[-2:]
            pools[-2:] = [((first * m + second * n) / (m + n), m + n)]
    highest = max(top - (len(wanted) - 1) * gap, 0.0)
    places = [min(max(value, 0.0), highest) for value, count in pools for _ in range(count)]
    return [place + k * gap for k, place in enumerate(places)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _figure(width: float, height: float) -> Figure:
    # A figure of its own is drawn with Agg: no window, and nothing of pyplot's global state.
    figure = matplotlib().figure.Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(wspace=0.08)
    return figure


def _save(figure: Figure, file: str | Path | io.BytesIO) -> None:
    figure.draw_without_rendering()
    for axis in figure.axes:
        _spread_names(axis, [text for text in axis.texts if text.get_gid() == AT_END])
        _place_beside(axis, [text for text in axis.texts if text.get_gid() == "beside"])
    figure.savefig(file, format="png", dpi=DOTS)


def _spread_names(axis: Axes, names: Sequence[Annotation]) -> None:
    if not names:
        return
    points = axis.get_window_extent().height * 72 / axis.figure.dpi
    heights = {text: axis.transAxes.inverted().transform(axis.transData.transform(text.xy))[1] for text in names}
    names = sorted(names, key=heights.__getitem__)
    for text, place in zip(names, spread([heights[text] * points for text in names], GAP, points), strict=True):
        text.set_position((1.04, place / points))


def _place_beside(axis: Axes, names: Sequence[Annotation]) -> None:
    """Each name at the first place around its point that is free."""
    if not names:
        return
    from matplotlib.transforms import Bbox

    frame = axis.get_window_extent()
    radius = 6 * axis.figure.dpi / 72
    taken = []
    for line in axis.get_lines():
        corners = axis.transData.transform(line.get_xydata()).tolist()
        along = [(*a, *b) for a, b in itertools.pairwise(corners)]
        steps = [(xa + (xb - xa) * t / 40, ya + (yb - ya) * t / 40) for xa, ya, xb, yb in along for t in range(41)]
        taken += [Bbox.from_bounds(x - radius, y - radius, 2 * radius, 2 * radius) for x, y in corners]
        taken += [Bbox.from_bounds(x - 1, y - 1, 2, 2) for x, y in steps]
    for text in names:
        best = None
        for distance in (9, 20, 32, 46):
            for across, up in ((0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (-1, 1), (1, -1), (-1, -1)):
                text.set_position((across * distance, up * distance))
                text.set_ha(("center", "left", "right")[across])
                text.set_va(("center", "bottom", "top")[up])
                box = text.get_window_extent()
                inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
                if inside and not any(box.overlaps(other) for other in taken):
                    best = box
                    break
            if best is not None:
                break
        taken.append(best or text.get_window_extent())
