"""What trackers get: the same names as the log history, and numbers; and that one process alone speaks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ..helpers.tiny_models import tiny_vit
from ..helpers.training import image_rows, make_trainer

PARTS = {"loss", "loss_task", "loss_distill", "loss_cross", "stone_1/task", "stone_2/distill", "grad_norm_block_2"}
EVALUATED = {"eval_loss", "eval_share", "eval_teacher_loss", "eval_stone_1_share", "eval_block_2_cka"}


def share(prediction):
    return {"share": (prediction.predictions.argmax(-1) == prediction.label_ids).mean(dtype="float32")}


def train(folder, **config) -> dict[str, float]:
    """Two steps and an evaluation; every name that was logged, and its last value."""
    settings = {"max_steps": 2, "stepping_stones": "all", "eval_strategy": "epoch", "eval_stepping_stones": True}
    rows = {"eval_dataset": image_rows(4, seed=1), "compute_metrics": share}
    trainer = make_trainer(
        folder, tiny_vit(num_hidden_layers=2), tiny_vit(), image_rows(), **rows, **settings, **config
    )
    trainer.train()
    return {name: value for entry in trainer.state.log_history for name, value in entry.items()}


def under_stock_names(logged: dict[str, float]) -> dict[str, float]:
    """As the callbacks of transformers call them."""
    return {f"eval/{name[5:]}" if name.startswith("eval_") else f"train/{name}": logged[name] for name in logged}


def test_names_of_train_and_eval_stand_in_the_log_history_as_numbers(tmp_path):
    logged = train(tmp_path)
    assert logged.keys() >= PARTS | EVALUATED
    assert {name: value for name, value in logged.items() if type(value) not in (int, float)} == {}
    # MLflow's file store has a file for each name, in folders.
    assert not [name for name in logged if any(other.startswith(f"{name}/") for other in logged)]


@pytest.mark.slow
def test_tensorboard_gets_what_the_log_history_has(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    expected = under_stock_names(train(tmp_path, report_to="tensorboard"))
    events = EventAccumulator(str(next(tmp_path.rglob("events.out.tfevents.*")).parent)).Reload()
    found = {name: events.Scalars(name)[-1].value for name in events.Tags()["scalars"]}
    expected.pop("train/step")
    assert found == pytest.approx({name: expected[name] for name in found}, rel=1e-6)
    assert found.keys() >= under_stock_names(dict.fromkeys(PARTS | EVALUATED)).keys()


@pytest.mark.slow
def test_trackio_gets_what_the_log_history_has(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    storage = pytest.importorskip("trackio.sqlite_storage").SQLiteStorage
    expected = under_stock_names(train(tmp_path, report_to="trackio", run_name="run", project="tests"))
    found = {name: value for entry in storage.get_logs("tests", "run") for name, value in entry.items()}
    found = {name: found[name] for name in found.keys() & expected.keys()}
    assert found == pytest.approx({name: expected[name] for name in found}, rel=1e-6)
    assert found.keys() >= under_stock_names(dict.fromkeys(PARTS | EVALUATED)).keys()


TWO_PROCESSES = """
from tests.helpers.tiny_models import tiny_vit
from tests.helpers.training import image_rows, make_trainer

trainer = make_trainer("out", tiny_vit(num_hidden_layers=2), tiny_vit(), image_rows(16), max_steps=2, use_cpu=False)
assert trainer.args.world_size == 2
trainer.train()
trainer.evaluate([{"pixel_values": row["pixel_values"]} for row in image_rows(4)])
"""


@pytest.mark.slow
def test_one_of_two_processes_speaks(tmp_path):
    (tmp_path / "script.py").write_text(TWO_PROCESSES)
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "script.py"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": f"{root}:{os.environ.get('PYTHONPATH')}"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("'loss': ") == 2
    assert (done.stdout + done.stderr).count("have no labels: there is nothing to evaluate") == 1
