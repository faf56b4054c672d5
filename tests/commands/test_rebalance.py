"""`hf-blockkd plan --rebalance`: what blocks of a run cost, and the flags that share it out."""

import pytest

from hf_blockkd import BlockMap, make_student
from hf_blockkd.commands.cli import main
from hf_blockkd.models.cut import Cut

from ..helpers.tiny_models import tiny_vit
from ..helpers.training import image_rows, make_trainer
from .report.helpers import write_run

ACCURACIES = {
    "eval_teacher_accuracy": 0.9,
    "eval_block_1_accuracy": 0.84,
    "eval_block_2_entry_accuracy": 0.9,
    "eval_block_2_accuracy": 0.9,
    "eval_block_3_entry_accuracy": 0.88,
    "eval_block_3_accuracy": 0.85,
}


@pytest.fixture
def run(tmp_path):
    write_run(tmp_path, ACCURACIES)
    BlockMap.even(3, 6, 3).save(tmp_path)
    return tmp_path


def printed(capsys, *argv):
    assert main(["plan", "--rebalance", *map(str, argv)]) == 0
    return capsys.readouterr().out


def refused(capsys, *argv):
    assert main(["plan", "--rebalance", *map(str, argv)]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    return err


def test_costs_are_shared_out_by_boundaries(run, capsys):
    lines = printed(capsys, run).splitlines()
    assert lines[2].split() == ["1", "0.9000", "0.8400", "0.0600"]
    assert lines[4].split() == ["3", "0.8800", "0.8500", "0.0300"]
    assert lines[-2:] == ["Train it with", "  --student_boundaries 1 2 3 --teacher_boundaries 1 3 6"]


def test_layers_are_named_where_the_student_was_cut(run, capsys):
    Cut([0, 2, 5], 6).save(run)
    assert printed(capsys, run).splitlines()[-2:] == [
        "Cut the student and train it with",
        "  --student_boundaries 1 2 3 --teacher_boundaries 1 3 6 --layers 0,1,5",
    ]


def test_what_is_balanced_is_left_as_it_is(tmp_path, capsys):
    write_run(tmp_path, {name: 0.9 - 0.1 * ("entry" not in name and "teacher" not in name) for name in ACCURACIES})
    BlockMap.even(3, 6, 3).save(tmp_path)
    assert "leave it as it is" in printed(capsys, tmp_path)


def test_a_run_that_was_trained_and_measured_is_read(tmp_path, capsys):
    teacher = tiny_vit(num_hidden_layers=4)
    student = make_student(teacher, num_layers=2)
    trainer = make_trainer(tmp_path, student, teacher, image_rows(), eval_dataset=image_rows(seed=1), max_steps=1)
    trainer.train()
    metrics = trainer.evaluate_blocks()
    trainer.save_model()
    trainer.save_state()
    capsys.readouterr()
    out = printed(capsys, tmp_path, "--metric", "loss")
    cost = metrics["eval_block_1_loss"] - metrics["eval_teacher_loss"]
    assert f"{cost:.4f}" in out.splitlines()[2]


def test_a_run_whose_blocks_were_not_measured_is_refused(tmp_path, run, capsys):
    message = refused(capsys, run, "--metric", "loss")
    assert "its log holds no `eval_block_1_loss`; call `trainer.evaluate_blocks()`" in message
    (run / "blocks.json").unlink()
    assert "its folder holds no `blocks.json`" in refused(capsys, run)
    assert "no trainer_state.json" in refused(capsys, run / "nowhere")
