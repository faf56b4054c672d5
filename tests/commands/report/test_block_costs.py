"""What blocks cost, read from a log and drawn."""

import pytest

from hf_blockkd.commands.report import report
from hf_blockkd.commands.report.block_costs import BlockCost, cost_panel, read_costs
from hf_blockkd.commands.report.drawing import save_panels

from .helpers import overlapping_labels, write_run

ENTRY = {
    "eval_teacher_accuracy": 0.9,
    "eval_block_1_accuracy": 0.8,
    "eval_block_2_entry_accuracy": 0.85,
    "eval_block_2_accuracy": 0.86,
    "eval_teacher_loss": 0.5,
    "eval_block_1_loss": 0.75,
    "eval_block_2_entry_loss": 0.625,
    "eval_block_2_loss": 0.6875,
}


def test_a_block_costs_what_the_metric_is_worse_with_it_than_with_the_maps_before_it():
    log = [{"step": 1, "eval_block_1_accuracy": 0.1, "eval_block_1_cka": 0.3}, {"step": 2, **ENTRY}]
    costs = read_costs(log, "accuracy")
    assert [one[:3] for one in costs] == [(1, 0.9, 0.8), (2, 0.85, 0.86)]
    assert [one.cost for one in costs] == pytest.approx([0.1, -0.01])
    assert read_costs(log, "loss") == [BlockCost(1, 0.5, 0.75, 0.25), BlockCost(2, 0.625, 0.6875, 0.0625)]
    assert read_costs(log, "f1") == []


def test_what_another_evaluation_says_of_the_teacher_is_left_alone():
    log = [{"step": 2, **ENTRY}, {"step": 2, "eval_teacher_accuracy": 0.1, "eval_stone_1_accuracy": 0.2}]
    assert read_costs(log, "accuracy")[0][:3] == (1, 0.9, 0.8)


def test_no_names_in_the_panel_overlap(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *args, **kwargs: figures.append(figure))
    many = [BlockCost(i, 0.9, 0.9 - 0.01 * i, 0.01 * i) for i in range(1, 9)]
    save_panels([cost_panel(many, "accuracy")], tmp_path / "costs.png")
    assert not overlapping_labels(figures[0])


def test_the_page_has_them_where_they_were_measured(tmp_path):
    measured, other = tmp_path / "measured", tmp_path / "other"
    write_run(measured, {"loss": 1.0, **ENTRY})
    write_run(other, {"loss": 1.0})
    written = report(tmp_path)
    assert measured / "costs.png" in written.pictures
    assert other / "costs.png" not in written.pictures
    html = written.page.read_text()
    assert html.count("Which block hurts") == 1
    assert not any("costs.png" in sentence for sentence in written.missing)
    # Drawn once: with the costs, and not among all other curves.
    assert html.count("<code>eval_block_2_accuracy</code>") <= 2
