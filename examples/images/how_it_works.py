"""Draws how_it_works.png: a teacher, the student that is cut out of it, and the stepping stones between them."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import FancyBboxPatch

TEACHER, STUDENT, INK = "#d3e3f3", "#fbdfb1", "#222222"
WIDTH, GAP = 1.7, 0.5
ROWS = {  # name -> height of its middle, and the blocks of the student that it runs
    "teacher": (3.6, 0),
    "stone 1": (2.5, 1),
    "stone 2": (1.7, 2),
    "stone 3": (0.9, 3),
    "student": (-0.2, 4),
}


def main() -> None:
    figure, axes = plt.subplots(figsize=(9.2, 4.2), layout="constrained")
    for name, (height, students) in ROWS.items():
        axes.text(-0.2, height, name, ha="right", va="center", fontsize=12, weight="bold")
        for place in range(4):
            left = place * (WIDTH + GAP)
            of_student = place < students
            size = 0.34 if of_student else 0.62
            box = FancyBboxPatch(
                (left, height - size / 2),
                WIDTH,
                size,
                boxstyle=f"round,pad=0,rounding_size={0.12 if of_student else 0.02}",
                facecolor=STUDENT if of_student else TEACHER,
                edgecolor=INK,
                hatch=None if of_student else "//",
                linewidth=1,
            )
            box.set_hatch_linewidth(0.25)
            axes.add_patch(box)
            label = (
                "head"
                if place == 3
                else f"layer {place + 1}"
                if of_student
                else f"layers {2 * place + 1}, {2 * place + 2}"
            )
            background = {"facecolor": box.get_facecolor(), "edgecolor": "none", "pad": 1.5}
            axes.text(left + WIDTH / 2, height, label, ha="center", va="center", fontsize=11, bbox=background)
            if place == 3:
                continue
            is_connector = of_student and place + 1 == students
            axes.annotate(
                "", (left + WIDTH + GAP, height), (left + WIDTH, height), arrowprops={"arrowstyle": "-|>", "color": INK}
            )
            if is_connector:
                axes.plot(left + WIDTH + 0.2, height, "D", color=INK, markersize=8)
    axes.annotate("", (8.75, -0.2), (8.75, 3.6), arrowprops={"arrowstyle": "-|>", "linewidth": 2, "color": INK})
    axes.text(
        8.95,
        1.7,
        "cut: whole layers, then\nchannels, heads, neurons;\nfitted by least squares",
        va="center",
        fontsize=11,
    )
    axes.text(
        0,
        -0.95,
        "hatched: the teacher's, frozen      plain: the student's, trained      ◆ connector, fitted, then trained",
        fontsize=11,
    )
    axes.set(xlim=(-1.5, 11.9), ylim=(-1.2, 4.1))
    axes.axis("off")
    figure.savefig(Path(__file__).with_name("how_it_works.png"), dpi=110)


if __name__ == "__main__":
    main()
