"""A checkpoint is there whole or not at all, and only whole ones are resumed from."""

import json
import resource
import shutil

import pytest
import torch
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from hf_blockkd.saving.checkpoints import KEPT, MANIFEST_NAME, UNFINISHED, checkpoints, flaw

from ..helpers.tiny_models import tiny_bert, tiny_vit
from ..helpers.training import (
    assert_same_state,
    file_bytes,
    image_rows,
    make_trainer,
    state_of,
    step_logs,
    text_rows,
    with_connectors,
)

EVERY_OTHER_STEP = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "learning_rate": 1e-2}
FILES = [
    "README.md",
    "blocks.json",
    "config.json",
    "connectors.safetensors",
    "model.safetensors",
    "optimizer.pt",
    "resolved_args.json",
    "rng_state.pth",
    "scheduler.pt",
    "trainer_state.json",
    "training_args.json",
]


def bert_trainer(folder, **settings):
    """Always the same run, with dropout and sampled stones, in another folder."""
    torch.manual_seed(0)
    student, teacher = tiny_bert(num_hidden_layers=2), tiny_bert()
    settings = {**EVERY_OTHER_STEP, "stepping_stones": "sample", **settings}
    return make_trainer(folder, student, teacher, text_rows(8), **settings)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A whole run with checkpoints 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("unbroken")
    trainer = bert_trainer(folder)
    trainer.train()
    return folder, trainer


@pytest.fixture
def run(unbroken, tmp_path):
    """A copy of its folder, to be damaged."""
    shutil.copytree(unbroken[0], tmp_path / "run")
    return tmp_path / "run"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# ---- What is whole ----


def test_a_manifest_lists_every_other_file(unbroken):
    folder, _ = unbroken
    assert names(folder) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    for checkpoint in checkpoints(folder):
        assert names(checkpoint) == sorted([*FILES, MANIFEST_NAME])
        assert sorted(json.loads((checkpoint / MANIFEST_NAME).read_text())["files"]) == FILES
        assert flaw(checkpoint) is None
    assert get_last_checkpoint(str(folder)) == str(folder / "checkpoint-6") == str(checkpoints(folder)[0])


def remove(path):
    path.unlink()


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def empty(path):
    path.write_bytes(b"")


def fill_with_zeros(path):
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize("name", [*FILES, MANIFEST_NAME])
@pytest.mark.parametrize("damage", [remove, truncate, empty, fill_with_zeros])
def test_every_damage_to_every_file_is_found(run, name, damage):
    damage(run / "checkpoint-4" / name)
    assert name in flaw(run / "checkpoint-4")
    sizes = None if damage is fill_with_zeros and name != MANIFEST_NAME else flaw(run / "checkpoint-4")
    assert flaw(run / "checkpoint-4", contents=False) == sizes


# ---- Resuming ----


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        (remove, MANIFEST_NAME),
        (remove, "trainer_state.json"),
        (remove, "optimizer.pt"),
        (truncate, "model.safetensors"),
        (fill_with_zeros, "connectors.safetensors"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_torn_checkpoint_is_skipped_and_the_one_before_it_gives_the_same_bits(unbroken, run, damage, name, caplog):
    damage(run / "checkpoint-6" / name)
    damage(run / "checkpoint-4" / name)
    trainer = bert_trainer(run)
    trainer.train(resume_from_checkpoint=True)
    for torn in ("checkpoint-6", "checkpoint-4"):
        assert f"{torn} is not whole: {name}" in caplog.text
    assert "starts anew" not in caplog.text
    assert_same_state(state_of(trainer.model), state_of(unbroken[1].model))
    assert step_logs(trainer) == step_logs(unbroken[1])
    assert [flaw(checkpoint) for checkpoint in checkpoints(run)] == [None] * 3


def test_without_a_whole_checkpoint_training_starts_anew_with_a_warning(unbroken, run, caplog):
    for checkpoint in checkpoints(run):
        remove(checkpoint / "rng_state.pth")
    for folder in (run, run.parent / "nothing yet"):
        trainer = bert_trainer(folder)
        trainer.train(resume_from_checkpoint=True)
        assert f"There is no whole checkpoint in '{folder}'; training starts anew" in caplog.text
        assert_same_state(state_of(trainer.model), state_of(unbroken[1].model))
        assert [flaw(checkpoint) for checkpoint in checkpoints(folder)] == [None] * 3
    assert names(run) == [*(f"{KEPT}{name}" for name in names(unbroken[0])), *names(unbroken[0])]


def test_a_torn_checkpoint_that_is_named_is_refused_before_anything_is_overwritten(run):
    truncate(run / "checkpoint-4" / "optimizer.pt")
    before = file_bytes(run)
    trainer = bert_trainer(run)
    weights = state_of(trainer.model)
    with pytest.raises(ValueError, match=r"checkpoint-4 is not whole: optimizer.pt has \d+ bytes.*the last whole one"):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-4"))
    assert_same_state(state_of(trainer.model), weights)
    assert file_bytes(run) == before


@pytest.mark.parametrize("max_steps", [5, 6])
def test_a_run_that_was_through_is_not_trained_any_further(tmp_path, max_steps):
    """Killed after its last checkpoint, in the midst of an epoch or at the end of one."""
    trainer = bert_trainer(tmp_path, max_steps=max_steps)
    trainer.train()
    before = file_bytes(tmp_path)
    again = bert_trainer(tmp_path, max_steps=max_steps)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == max_steps
    assert_same_state(state_of(again.model), state_of(trainer.model))
    assert file_bytes(tmp_path) == before


def test_folders_that_are_no_checkpoints_are_not_resumed_from(run, caplog):
    for name in ("checkpoint-8", "checkpoint-best", f"{UNFINISHED}checkpoint-10"):
        shutil.copytree(run / "checkpoint-2", run / name)
    remove(run / "checkpoint-8" / MANIFEST_NAME)
    trainer = bert_trainer(run, max_steps=7)
    trainer.train(resume_from_checkpoint=True)
    assert step_logs(trainer)[-1]["step"] == 7
    assert trainer._initial_global_step == 6
    assert "checkpoint-best" not in caplog.text
    assert "checkpoint-10" not in caplog.text


# ---- Old checkpoints ----


def test_what_a_killed_process_left_behind_is_cleared_away_by_the_next_checkpoint(run):
    shutil.copytree(run / "checkpoint-2", run / f"{UNFINISHED}checkpoint-4")
    shutil.rmtree(run / "checkpoint-6")
    bert_trainer(run).train(resume_from_checkpoint=True)
    assert names(run) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_without_a_limit_nothing_is_deleted(run):
    remove(run / "checkpoint-6" / MANIFEST_NAME)
    bert_trainer(run, max_steps=5, save_steps=1).train(resume_from_checkpoint=True)
    assert names(run) == ["checkpoint-2", "checkpoint-4", "checkpoint-5", "checkpoint-6"]


def test_a_checkpoint_of_the_same_step_is_replaced_as_a_whole(run):
    (run / "checkpoint-6" / "of the first run").write_text("stale")
    bert_trainer(run, seed=3).train(resume_from_checkpoint=str(run / "checkpoint-4"))
    assert names(run) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert names(run / "checkpoint-6") == sorted([*FILES, MANIFEST_NAME])
    assert flaw(run / "checkpoint-6") is None


@pytest.mark.parametrize("limit", [1, 2])
def test_the_best_checkpoint_outlives_the_limit(tmp_path, limit):
    settings = {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "mark", "greater_is_better": True}
    marks = iter([0.1, 0.9, 0.3, 0.2])
    trainer = make_trainer(
        tmp_path,
        tiny_vit(num_hidden_layers=2),
        tiny_vit(),
        image_rows(8),
        eval_dataset=image_rows(4, seed=1),
        compute_metrics=lambda prediction: {"mark": next(marks)},
        load_best_model_at_end=True,
        save_total_limit=limit,
        **{**EVERY_OTHER_STEP, **settings, "max_steps": 8},
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    # As with the stock trainer, a limit of 1 leaves the best one alone at the end.
    assert names(tmp_path) == (["checkpoint-4"] if limit == 1 else ["checkpoint-4", "checkpoint-8"])
    assert json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())["best_model_checkpoint"] == str(
        tmp_path / "checkpoint-4"
    )


def test_a_best_checkpoint_that_is_torn_is_not_loaded(tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "learning_rate": 0.5}

    class Tear(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            self.trained = trainer.model

        def on_save(self, args, state, control, **kwargs):
            if state.global_step == 6:
                self.before = state_of(self.trained)
                truncate(tmp_path / f"checkpoint-{state.best_global_step}" / "model.safetensors")

    callback = Tear()
    student, teacher = tiny_vit(num_hidden_layers=2), tiny_vit()
    trainer = make_trainer(
        tmp_path,
        student,
        teacher,
        image_rows(8),
        eval_dataset=image_rows(4, seed=1),
        callbacks=[callback],
        **{**EVERY_OTHER_STEP, **settings},
    )
    with pytest.raises(ValueError, match=r"best checkpoint .*checkpoint-\d is not whole: model.safetensors has"):
        trainer.train()
    with with_connectors(trainer):
        assert_same_state(state_of(trainer.model), callback.before)


# ---- A full disk ----


class FullDisk(TrainerCallback):
    """From some step on, no file can grow beyond so many bytes."""

    def __init__(self, step, size):
        self.step, self.size = step, size

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.RLIM_INFINITY))


@pytest.mark.parametrize("size", [0, 2_000, 30_000])
def test_a_full_disk_leaves_the_checkpoint_before_and_says_what_to_do(unbroken, tmp_path, size):
    # Nothing must be printed while no file can grow: the tests' own output is one.
    trainer = bert_trainer(tmp_path, save_total_limit=1, logging_strategy="no")
    trainer.add_callback(FullDisk(4, size))
    try:
        with pytest.raises(
            OSError, match=r"checkpoint-4 could not be written .*checkpoint-2 before it is untouched: make room"
        ):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert names(tmp_path) == ["checkpoint-2"]
    assert flaw(tmp_path / "checkpoint-2") is None
    resumed = bert_trainer(tmp_path, save_total_limit=1)
    resumed.train(resume_from_checkpoint=True)
    assert_same_state(state_of(resumed.model), state_of(unbroken[1].model))


def test_a_full_disk_at_the_first_checkpoint_says_that_there_is_none(tmp_path):
    trainer = bert_trainer(tmp_path, logging_strategy="no")
    trainer.add_callback(FullDisk(2, 2_000))
    try:
        with pytest.raises(OSError, match=r"checkpoint-2 could not be written .*no checkpoint was written before it"):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert names(tmp_path) == []


# ---- What is in the files ----


def test_no_file_of_a_checkpoint_runs_code_when_it_is_read(unbroken):
    """`Trainer` writes its own state by `torch.save`; all of it loads with `weights_only=True`."""
    checkpoint = unbroken[0] / "checkpoint-6"
    by_torch = [name for name in names(checkpoint) if not name.endswith((".json", ".md", ".safetensors"))]
    assert by_torch == ["optimizer.pt", "rng_state.pth", "scheduler.pt"]
    from transformers.trainer_pt_utils import safe_globals

    for name in by_torch:
        with safe_globals():  # numpy's arrays in the random state
            assert torch.load(checkpoint / name, weights_only=True)
