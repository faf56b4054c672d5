"""Curves of runs: what they hold, where the numbers come from, and what is refused."""

import sys
from pathlib import Path

import numpy as np
import pytest

from hf_blockkd.commands.report import drawing
from hf_blockkd.commands.report.curves import loss_panels, plot_blocks, plot_losses, plot_path
from hf_blockkd.commands.report.runs import Run
from hf_blockkd.commands.report.settings import weights_of

from ...helpers.tiny_models import tiny_vit
from ...helpers.training import image_rows, make_trainer


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((np.argmax(prediction.predictions, -1) == prediction.label_ids).mean())}


@pytest.fixture
def figures(monkeypatch) -> list:
    """The figures that are drawn, as matplotlib holds them when they are saved."""
    drawn = []

    def keep(figure, path):
        drawn.append(figure)
        return save(figure, path)

    save = drawing._save
    monkeypatch.setattr(drawing, "_save", keep)
    return drawn


def trained(folder: Path, **config):
    config = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "eval_stepping_stones": True, **config}
    trainer = make_trainer(
        folder,
        tiny_vit(),
        tiny_vit(hidden_size=32),
        image_rows(),
        eval_dataset=image_rows(seed=1),
        compute_metrics=accuracy,
        **config,
    )
    trainer.train()
    return trainer


def curves(axis) -> dict[str, tuple[list, list]]:
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axis.get_lines()}


def logged(trainer, key: str) -> tuple[list[int], list[float]]:
    entries = [entry for entry in trainer.state.log_history if key in entry]
    return [entry["step"] for entry in entries], [entry[key] for entry in entries]


# ---- Losses ----


def test_losses_show_what_the_trainer_logged(tmp_path, figures):
    trainer = trained(tmp_path, cross_weight=0.5)
    assert plot_losses(trainer.state.log_history, tmp_path / "losses.png") == tmp_path / "losses.png"

    parts, task, distill = figures[0].axes
    assert list(curves(parts)) == ["total", "task", "distillation", "cross"]
    assert curves(parts)["total"] == logged(trainer, "loss")
    assert curves(parts)["cross"] == logged(trainer, "loss_cross")
    assert curves(task)["$N_{1}$"] == logged(trainer, "stone_1/task")
    assert curves(distill)["$N_{2}$"] == logged(trainer, "stone_2/distill")
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("config", "total"),
    [
        ({}, "total =\ntask\n+ distillation"),
        ({"task_weight": 0.5, "cross_weight": 2.0}, "total =\n0.5 x task\n+ distillation\n+ 2 x cross"),
        ({"state_weight": 3.0}, "total =\ntask\n+ distillation\n+ 3 x states"),
        ({"state_weight": 3.0, "stone_schedule": "linear"}, "total =\ntask\n+ distillation\n+ 3 to 0 x states"),
    ],
)
def test_the_total_says_what_its_parts_count(tmp_path, figures, config, total):
    trainer = trained(tmp_path, eval_strategy="no", **config)
    trainer.save_model()
    trainer.save_state()
    plot_losses(trainer.state.log_history, tmp_path / "losses.png", weights_of(Run.read(tmp_path)))
    assert next(iter(curves(figures[0].axes[0]))) == total
    # The last step of a linear schedule is one of four before its end.
    entry = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    left = 0.25 if "stone_schedule" in config else 1.0
    parts = {"task": config.get("task_weight", 1), "distill": 1, "cross": config.get("cross_weight", 0)}
    parts["state"] = config.get("state_weight", 0) * left
    sums = sum(weight * entry.get(f"loss_{name}", 0) for name, weight in parts.items())
    assert entry["loss"] == pytest.approx(sums, rel=1e-3)
    (panel, *_) = loss_panels(trainer.state.log_history)
    assert ("the total falls with state_weight, whether" in panel.note) == ("stone_schedule" in config)


def test_a_part_without_weight_is_not_drawn(tmp_path, figures):
    trainer = trained(tmp_path, eval_strategy="no")
    plot_losses(trainer.state.log_history, tmp_path / "losses.png")
    assert list(curves(figures[0].axes[0])) == ["total", "task", "distillation"]


def test_what_an_objective_adds_is_drawn(tmp_path, figures):
    trainer = trained(tmp_path, state_weight=1.0, objective="block_kd+hint", eval_strategy="no")
    plot_losses(trainer.state.log_history, tmp_path / "losses.png")
    parts = curves(figures[0].axes[0])
    assert parts["states"] == logged(trainer, "loss_state")
    assert parts["hints"] == logged(trainer, "loss_hint")


def test_plain_kd_has_one_panel_of_losses(tmp_path, figures):
    trainer = trained(tmp_path, stepping_stones="none")
    plot_losses(trainer.state.log_history, tmp_path / "losses.png")
    assert len(figures[0].axes) == 1


def test_a_sampled_stone_is_drawn_at_the_steps_that_drew_it(tmp_path, figures):
    trainer = trained(tmp_path, stepping_stones="sample", max_steps=6)
    plot_losses(trainer.state.log_history, tmp_path / "losses.png")
    drawn = curves(figures[0].axes[1])
    steps = [step for points, _ in drawn.values() for step in points]
    assert sorted(steps) == [1, 2, 3, 4, 5, 6]
    assert drawn["$N_{1}$"] == logged(trainer, "stone_1/task")


# ---- Path ----


def test_the_path_leads_from_the_teacher_to_the_student_at_the_last_evaluation(tmp_path, figures):
    trainer = trained(tmp_path)
    plot_path(trainer.state.log_history, tmp_path / "path.png")
    along, over_training = figures[0].axes

    values, names = next(iter(curves(along).values()))
    assert names == ["teacher", "$N_{1}$", "$N_{2}$", "student"]
    keys = ["eval_teacher_accuracy", "eval_stone_1_accuracy", "eval_stone_2_accuracy", "eval_accuracy"]
    assert values == [logged(trainer, key)[1][-1] for key in keys]
    assert along.get_title() == "From teacher to student, step 4"
    assert curves(over_training) == {name: logged(trainer, key) for name, key in zip(names, keys, strict=True)}
    assert logged(trainer, "eval_accuracy")[0] == [2, 4]


def test_a_single_evaluation_has_no_panel_over_training(tmp_path, figures):
    trainer = trained(tmp_path, eval_steps=4)
    plot_path(trainer.state.log_history, tmp_path / "path.png", metric="loss")
    assert len(figures[0].axes) == 1
    assert next(iter(curves(figures[0].axes[0]).values()))[0][-1] == logged(trainer, "eval_loss")[1][-1]


def test_a_log_with_the_stones_alone_is_drawn_without_the_others(tmp_path, figures):
    plot_path([{"step": 3, "eval_stone_1_f1": 0.5, "eval_stone_2_f1": 0.6}], tmp_path / "path.png", metric="f1")
    assert next(iter(curves(figures[0].axes[0]).values())) == ([0.5, 0.6], ["$N_{1}$", "$N_{2}$"])


def test_stones_are_in_the_order_of_their_numbers(tmp_path, figures):
    log = [{"step": 1, **{f"eval_stone_{i}_accuracy": i / 20 for i in (10, 2, 1, 9)}}]
    plot_path(log, tmp_path / "path.png")
    assert next(iter(curves(figures[0].axes[0]).values()))[0] == [1 / 20, 2 / 20, 9 / 20, 10 / 20]


# ---- Blocks ----


def test_blocks_have_their_gradients_and_their_alignment_over_training(tmp_path, figures):
    trainer = trained(tmp_path)
    plot_blocks(trainer.state.log_history, tmp_path / "blocks.png")
    gradients, alignment = figures[0].axes
    for axis, key in ((gradients, "grad_norm_block_{}"), (alignment, "eval_block_{}_cka")):
        assert curves(axis) == {f"block {i}": logged(trainer, key.format(i)) for i in (1, 2)}
    assert logged(trainer, "grad_norm_block_1")[0] == [1, 2, 3, 4]
    assert logged(trainer, "eval_block_1_cka")[0] == [2, 4]


def test_a_log_without_blocks_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds neither `grad_norm_block_1` nor `eval_block_1_cka`"):
        plot_blocks([{"step": 1, "loss": 1.0}], tmp_path / "blocks.png")


# ---- Refusals ----


def test_an_empty_log_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the log holds no `loss`; set `logging_steps`"):
        plot_losses([], tmp_path / "losses.png")
    with pytest.raises(ValueError, match="train with `eval_stepping_stones=True`"):
        plot_path([{"step": 1, "eval_accuracy": 0.5}], tmp_path / "path.png")
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_ended_before_its_first_log_says_how_long_it_was_and_what_its_mean_loss_was(tmp_path):
    trainer = trained(tmp_path, max_steps=2, logging_steps=500, eval_strategy="no")
    mean = trainer.state.log_history[-1]["train_loss"]
    with pytest.raises(ValueError, match=rf"fewer steps than the run has \(2 in all, with a mean loss of {mean:.4g}\)"):
        plot_losses(trainer.state.log_history, tmp_path / "losses.png")


def test_a_metric_that_was_not_evaluated_is_refused_with_those_that_were(tmp_path):
    trainer = trained(tmp_path)
    with pytest.raises(ValueError, match="`metric` is 'f1', which was not evaluated; choose one of accuracy, loss"):
        plot_path(trainer.state.log_history, tmp_path / "path.png", metric="f1")


def test_without_matplotlib_one_sentence_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    log = [{"step": 1, "loss": 1.0, "stone_1/task": 1.0, "eval_stone_1_accuracy": 0.5}]
    for draw in (plot_losses, plot_path):
        with pytest.raises(ImportError, match="Pictures need matplotlib; install it"):
            draw(log, tmp_path / "picture.png")
