"""How two models are fitted together, drawn, and what of the teacher was cut, in words."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ...models.cut import Cut
from ...pairing.blocks import BlockMap
from .drawing import Panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_NUMBERS = 24
"""Layers that are numbered one by one; of more, every so many is."""


def block_panel(block_map: BlockMap, cut: Cut | None = None) -> Panel:
    """Both stacks of layers, which blocks answer each other, and which of the teacher's layers the student was made of.

    Args:
        block_map: The cut into blocks.
        cut: What was kept of the teacher, where the student was cut out of it.
    """
    depths = {"teacher": block_map.teacher[-1], "student": block_map.student[-1]}
    levels = {"teacher": 1.0, "student": 0.0}
    kept = set(cut.layers) if cut is not None and cut.depth == depths["teacher"] else set()

    def draw(axis: Axes) -> None:
        from matplotlib.patches import Polygon, Rectangle

        starts = {"teacher": 0.0, "student": 0.0}
        for number, ends in enumerate(zip(block_map.teacher, block_map.student, strict=True), start=1):
            shares = {who: end / depths[who] for who, end in zip(depths, ends, strict=True)}
            corners = [
                (starts["teacher"], 1.0),
                (shares["teacher"], 1.0),
                (shares["student"], 0.3),
                (starts["student"], 0.3),
            ]
            axis.add_patch(Polygon(corners, facecolor="0.93" if number % 2 else "0.82", edgecolor="0.5"))
            middle = sum(x for x, _ in corners) / 4
            axis.text(middle, 0.65, str(number), ha="center", va="center", fontsize=10, fontweight="bold")
            starts = shares
        for who, depth in depths.items():
            every = -(-depth // MOST_NUMBERS)
            for layer in range(depth):
                is_kept = who == "teacher" and layer in kept
                face = "#9ecbe8" if is_kept or (who == "student" and kept) else "white"
                box = Rectangle((layer / depth, levels[who]), 1 / depth, 0.3, facecolor=face, edgecolor="black")
                axis.add_patch(box)
                if layer % every == 0:
                    text = axis.text((layer + 0.5) / depth, levels[who] + 0.15, str(layer), ha="center", va="center")
                    text.set_fontsize(8)
                    text.set_fontweight("bold" if is_kept else "normal")
                if is_kept:
                    axis.plot([(layer + 0.5) / depth], [levels[who] + 0.37], "v", color="black", markersize=5)
        axis.set(xlim=(-0.01, 1.01), ylim=(-0.05, 1.45), xticks=[])
        axis.set_yticks([0.15, 0.65, 1.15], ["student", "block", "teacher"])
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)

    marked = " Marked with ▼ are the layers that the student was cut out of." if kept else ""
    note = "Above the teacher's layers, below the student's; a number joins the blocks that answer each other." + marked
    return Panel("Blocks", draw, 1.9, note=note)


def block_rows(block_map: BlockMap) -> list[list[str]]:
    """The map as rows of a table: block, the student's layers, the teacher's, and the stone."""
    return [line.split(maxsplit=3) for line in str(block_map).splitlines()[1:]]


def cut_rows(cut: Cut) -> list[tuple[str, int, int]]:
    """What is smaller than in the teacher: its name, how much is kept, and of how much; the same of all layers once."""
    rows = {("layers", len(cut.layers), cut.depth): None}
    for axis in cut.axes:
        name = re.sub(r"(?<=\.)\d+(?=\.)", "*", axis["tensor"])
        rows[f"{name}, dimension {axis['dim']}", len(axis["kept"]), axis["size"]] = None
    return list(rows)
