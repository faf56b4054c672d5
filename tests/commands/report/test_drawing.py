"""Labels stand apart, whatever the figures are, and lines differ without colour."""

import itertools

import pytest

from hf_blockkd.commands.report import drawing
from hf_blockkd.commands.report.comparison import Group, comparison_panel
from hf_blockkd.commands.report.curves import block_panels, loss_panels, other_panels, path_panels
from hf_blockkd.commands.report.drawing import spread, written
from hf_blockkd.commands.report.ladder import ladder_panels
from hf_blockkd.commands.report.runs import Run
from hf_blockkd.commands.report.structure import block_panel
from hf_blockkd.models.cut import Cut
from hf_blockkd.pairing.blocks import BlockMap

from .helpers import overlapping_labels


@pytest.fixture
def figures(monkeypatch) -> list:
    drawn = []
    save = drawing._save
    monkeypatch.setattr(drawing, "_save", lambda figure, file: (drawn.append(figure), save(figure, file)))
    return drawn


def crowded_log(stones: int, steps: int = 3) -> list[dict]:
    """Everything ends at nearly the same value."""
    numbers = range(1, stones + 1)
    return [
        {
            "step": 1000 * step,
            **dict.fromkeys(("loss", "loss_task", "loss_distill", "loss_state", "loss_hint"), 1 / step),
            **{f"stone_{i}/{part}": 1 / step + i * 1e-4 for i in numbers for part in ("task", "distill")},
            **{f"grad_norm_block_{i}": 0.1 + i * 1e-5 for i in numbers},
            **{f"eval_stone_{i}_accuracy": 0.9 - i * 1e-4 for i in numbers},
            **{f"eval_block_{i}_cka": 0.9 for i in numbers},
            "eval_accuracy": 0.9,
            "eval_teacher_accuracy": 0.9,
            "eval_loss": 1e-6 * step,
            "learning_rate": 2e-5,
        }
        for step in range(1, steps + 1)
    ]


@pytest.mark.parametrize(("stones", "steps"), [(4, 3), (12, 40), (6, 1)])
def test_labels_of_curves_do_not_overlap(figures, tmp_path, stones, steps):
    log = crowded_log(stones, steps)
    panels = [*loss_panels(log, dict.fromkeys(log[0], "0.5 x ")), *path_panels(log), *block_panels(log)]
    panels += other_panels(log, panels)
    for panel in panels:
        drawing.panel_png(panel)
    drawing.save_panels(loss_panels(log), tmp_path / "losses.png")
    assert len(figures) > 6
    assert [pair for figure in figures for pair in overlapping_labels(figure)] == []


@pytest.mark.parametrize("depth", [6, 40])
def test_labels_of_the_block_map_do_not_overlap(figures, depth):
    drawing.panel_png(block_panel(BlockMap.even(6, depth, 6), Cut([0, 1, 2, 3, 4, 5], depth)))
    assert overlapping_labels(figures[0]) == []
    assert {"1", "6", "student", "teacher"} <= {
        text.get_text() for text in figures[0].findobj(type(figures[0].axes[0].title))
    }


def test_labels_of_a_comparison_do_not_overlap(figures, tmp_path):
    def run(value: float) -> Run:
        return Run(tmp_path, [{"step": 1, "eval_accuracy": value}], {}, {})

    groups = [Group(f"a rather long name of a method {i}", [run(0.9), run(0.9001)]) for i in range(9)]
    drawing.panel_png(comparison_panel(groups, "accuracy", 0.95))
    assert overlapping_labels(figures[0]) == []


def test_names_of_rungs_cover_neither_each_other_nor_a_line(figures):
    names = ["student", "stone 3", "stone 2", "stone 1", "teacher"]
    costs = [1e6, 1.05e6, 1.1e6, 4e6, 9e6]
    rungs = [
        {"ladder": ladder, "seed": 0, "rung": name, "test": 0.9 + i * 1e-3 + shift, "flops": cost}
        | {"parameters": cost / 10, "time": cost / 1e9}
        for ladder, shift in (("block_kd", 0.0), ("ladder", 1e-3))
        for i, (name, cost) in enumerate(zip(names, costs, strict=True))
    ]
    for panel in ladder_panels(rungs):
        drawing.panel_png(panel)
    for figure in figures:
        assert overlapping_labels(figure) == []
        axis = figure.axes[0]
        assert {text.get_text() for text in axis.texts} == {"student", "$N_{3}$", "$N_{2}$", "$N_{1}$", "teacher"}
        points = [axis.transData.transform(line.get_xydata()) for line in axis.get_lines()]
        for text, corners in itertools.product(axis.texts, points):
            box = text.get_window_extent()
            assert not any(box.contains(*point) for point in corners)


def test_lines_differ_without_colour(figures):
    for panel in loss_panels(crowded_log(6)):
        drawing.panel_png(panel)
        looks = [(line.get_linestyle(), line.get_marker()) for line in figures[-1].axes[0].get_lines()]
        assert len(set(looks)) == len(looks) > 1


def test_values_that_are_not_finite_are_drawn_without_a_fall():
    log = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": float("nan")}]
    assert drawing.panel_png(loss_panels(log)[0]).startswith(b"\x89PNG")


def test_places_are_spread_as_little_as_can_be():
    assert spread([0.0, 5.0, 9.0], gap=1.0, top=10.0) == [0.0, 5.0, 9.0]
    assert spread([4.0, 4.0, 4.0], gap=2.0, top=10.0) == [2.0, 4.0, 6.0]
    assert spread([10.0, 10.0], gap=3.0, top=10.0) == [7.0, 10.0]
    assert spread([-1.0, 0.0], gap=3.0, top=10.0) == [0.0, 3.0]


def test_a_mean_has_the_sample_deviation_of_its_seeds():
    assert written([0.5], ".3f") == "0.500"
    assert written([0.4, 0.6], ".4f") == "0.5000 ± 0.1414"
