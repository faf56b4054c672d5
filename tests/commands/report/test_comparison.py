"""Which runs belong together, and how much of the gap they close."""

import json

import pytest

from hf_blockkd.commands.report.comparison import gap_closed, group_runs, teacher_value
from hf_blockkd.commands.report.runs import Run

from .helpers import write_run


def groups_of(base, **runs):
    """Folder -> (accuracy, arguments), grouped."""
    for name, (value, args) in runs.items():
        write_run(base / name.replace("__", "/"), {"eval_accuracy": value}, **args)
    return group_runs([Run.read(base / name.replace("__", "/")) for name in runs], base)


def test_runs_that_differ_in_their_seed_alone_are_one_group(tmp_path):
    groups = groups_of(
        tmp_path,
        kd__seed_0=(0.5, {"seed": 0, "objective": "kd", "output_dir": "a"}),
        kd__seed_1=(0.7, {"seed": 1, "objective": "kd", "output_dir": "b"}),
        hot__seed_0=(0.6, {"seed": 0, "objective": "kd", "temperature": 9.0}),
    )
    assert [(group.name, group.values("eval_accuracy")) for group in groups] == [("kd", [0.5, 0.7]), ("hot", [0.6])]


def test_two_runs_of_one_seed_are_never_taken_for_two_seeds(tmp_path):
    groups = groups_of(tmp_path, first=(0.5, {"seed": 0, "num_blocks": 3}), second=(0.7, {"seed": 0, "num_blocks": 3}))
    assert [group.name for group in groups] == ["first", "second"]


def test_groups_have_names_of_their_own(tmp_path):
    groups = groups_of(tmp_path, kd__seed_0=(0.5, {"seed": 0, "num_blocks": 3}), kd__seed_1=(0.7, {"num_blocks": 2}))
    assert [group.name for group in groups] == ["kd", "kd/seed_1"]


def test_students_of_other_layers_are_another_group(tmp_path):
    for name, layers in (("a", [0, 3]), ("b", [0, 5])):
        write_run(tmp_path / name, {"eval_accuracy": 0.5}, seed=len(name))
        (tmp_path / name / "cut.json").write_text(json.dumps({"layers": layers, "depth": 6}))
    assert len(group_runs([Run.read(tmp_path / name) for name in "ab"], tmp_path)) == 2


def test_the_gap_is_that_between_the_student_alone_and_the_teacher(tmp_path):
    groups = groups_of(
        tmp_path,
        alone__seed_0=(0.5, {"seed": 0, "objective": "alone"}),
        alone__seed_1=(0.7, {"seed": 1, "objective": "alone"}),
        kd=(0.75, {"seed": 0, "objective": "kd"}),
    )
    shares = gap_closed(groups, "accuracy", 0.8)
    assert shares == {"alone": pytest.approx(0.0), "kd": pytest.approx(0.75)}
    # A teacher that is no better leaves no gap.
    assert gap_closed(groups, "accuracy", 0.6) == {}
    assert gap_closed(groups, "accuracy", None) == {}
    assert gap_closed(groups[1:], "accuracy", 0.8) == {}


def test_of_losses_the_lower_is_the_better(tmp_path):
    for name, value in (("alone", 2.0), ("kd", 1.5)):
        write_run(tmp_path / name, {"eval_loss": value}, objective=name)
    groups = group_runs([Run.read(tmp_path / name) for name in ("alone", "kd")], tmp_path)
    assert gap_closed(groups, "loss", 1.0)["kd"] == pytest.approx(0.5)
    assert gap_closed(groups, "loss", 3.0) == {}


def test_the_teachers_figure_is_that_beside_the_stones_or_of_the_results(tmp_path):
    write_run(tmp_path / "run", {"eval_accuracy": 0.5, "eval_teacher_accuracy": 0.9})
    groups = group_runs([Run.read(tmp_path / "run")], tmp_path)
    assert teacher_value(groups, "accuracy", [tmp_path]) == 0.9
    assert teacher_value(groups, "f1", [tmp_path]) is None
    (tmp_path / "results.jsonl").write_text('{"model": "teacher", "f1": 0.8}\n{"model": "student, KD", "f1": 0.1}\n')
    assert teacher_value(groups, "f1", [tmp_path]) == 0.8
