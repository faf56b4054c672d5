"""Only whole checkpoints of ours give way to others; all else in the folder stays, and an error is told as it is."""

import errno
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState

from hf_blockkd.saving.checkpoints import (
    DELETED,
    KEPT,
    MANIFEST_NAME,
    REPLACED,
    UNFINISHED,
    checkpoints,
    find_checkpoint,
    flaw,
)
from hf_blockkd.saving.writing import made_whole

from ..helpers.tiny_models import tiny_bert, tiny_vit
from ..helpers.training import assert_same_state, file_bytes, image_rows, make_trainer, state_of, text_rows

EVERY_STEP = {"save_strategy": "steps", "save_steps": 1}


def bert_trainer(folder, **settings):
    torch.manual_seed(0)
    return make_trainer(folder, tiny_bert(num_hidden_layers=2), tiny_bert(), text_rows(8), **{**EVERY_STEP, **settings})


def vit_trainer(folder, marks, **settings):
    """Its checkpoint with the highest mark is the best one."""
    marks = iter(marks)
    evaluation = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "mark", "greater_is_better": True}
    return make_trainer(
        folder,
        tiny_vit(num_hidden_layers=2),
        tiny_vit(),
        image_rows(8),
        eval_dataset=image_rows(4, seed=1),
        compute_metrics=lambda prediction: {"mark": next(marks)},
        **{**EVERY_STEP, **evaluation, "load_best_model_at_end": True, "learning_rate": 0.1, **settings},
    )


def stock_checkpoint(folder, step=1):
    arguments = TrainingArguments(
        str(folder), max_steps=step, save_steps=step, report_to="none", use_cpu=True, disable_tqdm=True
    )
    Trainer(tiny_vit(), arguments, train_dataset=image_rows(8)).train()
    return folder / f"checkpoint-{step}"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


class AfterSave(TrainerCallback):
    """Does something to the checkpoints once that of a step is there."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.act(Path(args.output_dir))


# ---- What is not ours ----


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_checkpoints_of_a_stock_trainer_are_neither_deleted_nor_counted(tmp_path, limit, caplog):
    theirs = stock_checkpoint(tmp_path)
    before = file_bytes(theirs)
    bert_trainer(tmp_path, max_steps=8, save_steps=2, save_total_limit=limit).train()
    ours = ["checkpoint-2", "checkpoint-4", "checkpoint-6", "checkpoint-8"][-limit:]
    assert names(tmp_path) == ["checkpoint-1", *ours]
    assert file_bytes(theirs) == before
    assert caplog.text.count(f"{theirs} is kept") == 1
    assert f"not counted by `save_total_limit={limit}`: {MANIFEST_NAME} is missing." in caplog.text


def test_they_outlive_the_end_of_a_run_that_keeps_its_best_checkpoint_alone(tmp_path):
    theirs = stock_checkpoint(tmp_path, step=9)
    before = file_bytes(theirs)
    trainer = vit_trainer(tmp_path, [0.1, 0.9, 0.3, 0.2], max_steps=4, save_total_limit=1)
    trainer.train()
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-9"]
    assert file_bytes(theirs) == before
    assert trainer.args.save_total_limit == 1


def test_a_checkpoint_of_theirs_in_the_way_gets_another_name(tmp_path, caplog):
    theirs = stock_checkpoint(tmp_path, step=2)
    before = file_bytes(theirs)
    bert_trainer(tmp_path, max_steps=2, save_total_limit=1).train()
    assert names(tmp_path) == [f"{KEPT}checkpoint-2", "checkpoint-2"]
    assert file_bytes(tmp_path / f"{KEPT}checkpoint-2") == before
    assert flaw(tmp_path / "checkpoint-2") is None
    assert f"{theirs} is not replaced but kept as {KEPT}checkpoint-2" in caplog.text
    (tmp_path / "checkpoint-2" / "optimizer.pt").unlink()
    bert_trainer(tmp_path, max_steps=2, save_total_limit=1).train()
    assert names(tmp_path) == [f"{KEPT}checkpoint-2", f"{KEPT}checkpoint-2-2", "checkpoint-2"]


def unlink_optimizer(folder):
    (folder / "optimizer.pt").unlink()


def change_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"ours")


def protect(folder):
    folder.chmod(0o555)


def move_and_link(folder):
    folder.rename(folder.parent.parent / "elsewhere")
    folder.symlink_to(folder.parent.parent / "elsewhere")


@pytest.mark.parametrize("change", [unlink_optimizer, change_weights, protect, move_and_link])
def test_a_checkpoint_of_ours_that_a_person_changed_is_theirs(tmp_path, change, caplog):
    run = tmp_path / "run"
    trainer = bert_trainer(run, max_steps=5, save_total_limit=2)
    trainer.add_callback(AfterSave(1, lambda _: change(run / "checkpoint-1")))
    trainer.train()
    assert names(run) == ["checkpoint-1", "checkpoint-4", "checkpoint-5"]
    assert "model.safetensors" in names(run / "checkpoint-1")
    assert caplog.text.count("checkpoint-1 is kept") == 1
    (run / "checkpoint-1").resolve().chmod(0o755)


def test_only_folders_with_names_of_ours_are_taken_for_left_overs(tmp_path):
    theirs = [f"{UNFINISHED}notes", f"{REPLACED}checkpoint", f"{DELETED}checkpoint-1-of-mine", f"{KEPT}checkpoint-1"]
    for name in theirs:
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").write_text("mine")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"{UNFINISHED}checkpoint-7").symlink_to(tmp_path / "elsewhere")
    ours = f"{UNFINISHED}checkpoint-5", f"{DELETED}checkpoint-6"
    for name in ours:
        (tmp_path / name).mkdir()
    before = set(names(tmp_path))
    bert_trainer(tmp_path, max_steps=1, save_total_limit=1).train()
    assert set(names(tmp_path)) == before - set(ours) | {"checkpoint-1"}


# ---- A process that is killed ----


def test_a_checkpoint_that_was_being_replaced_when_the_process_died_comes_back(tmp_path):
    bert_trainer(tmp_path, max_steps=2).train()
    last = tmp_path / "checkpoint-2"
    before = file_bytes(last)
    shutil.copytree(last, tmp_path / f"{UNFINISHED}checkpoint-2")
    last.rename(tmp_path / f"{REPLACED}checkpoint-2")
    assert find_checkpoint(tmp_path, True) == str(last) == find_checkpoint(tmp_path, last)
    assert file_bytes(last) == before
    last.rename(tmp_path / f"{REPLACED}checkpoint-2")
    bert_trainer(tmp_path, max_steps=1).train()
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]
    assert file_bytes(last) == before


def test_one_that_was_replaced_goes_only_after_its_successor_is_there(tmp_path):
    bert_trainer(tmp_path, max_steps=3).train()
    shutil.copytree(tmp_path / "checkpoint-3", tmp_path / f"{REPLACED}checkpoint-3")
    (tmp_path / "checkpoint-2").rename(tmp_path / f"{REPLACED}checkpoint-2")
    (tmp_path / "checkpoint-2").mkdir()
    bert_trainer(tmp_path, max_steps=1).train()
    assert names(tmp_path) == [f"{REPLACED}checkpoint-2", "checkpoint-1", "checkpoint-2", "checkpoint-3"]


# ---- The best one ----


def tear(name):
    def act(run_dir):
        (run_dir / "checkpoint-2" / name).unlink()

    return act


def test_a_best_checkpoint_without_what_resuming_alone_reads_is_loaded(tmp_path):
    resuming = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.json"]
    trainer = vit_trainer(tmp_path, [0.1, 0.9, 0.3, 0.2], max_steps=4, save_total_limit=1)
    for name in resuming:
        trainer.add_callback(AfterSave(2, tear(name)))
    trainer.train()
    # What is left of the best one cannot be resumed from, so the last one stays beside it.
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4"]
    trainer.save_model(str(tmp_path / "saved"))
    best, last = ((tmp_path / f"checkpoint-{n}" / "model.safetensors").read_bytes() for n in (2, 4))
    assert (tmp_path / "saved" / "model.safetensors").read_bytes() == best != last


@pytest.mark.parametrize("name", ["model.safetensors", "connectors.safetensors", MANIFEST_NAME])
def test_a_best_checkpoint_without_its_weights_is_refused(tmp_path, name):
    trainer = vit_trainer(tmp_path, [0.1, 0.9, 0.3], max_steps=3)
    trainer.add_callback(AfterSave(2, tear(name)))
    with pytest.raises(ValueError, match=f"checkpoint-2 is not whole: {name} is missing"):
        trainer.train()


def test_a_checkpoint_of_theirs_at_the_best_step_is_not_taken_for_the_best_one(tmp_path):
    stock_checkpoint(tmp_path)
    settings = {"max_steps": 4, "save_steps": 2, "load_best_model_at_end": False, "save_total_limit": 1}
    trainer = vit_trainer(tmp_path, [0.9, 0.1, 0.1, 0.1], **settings)
    trainer.train()
    assert trainer.state.best_model_checkpoint is None
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-4"]


# ---- What goes wrong in a save ----


class Faulty(TrainerCallback, ExportableState):
    """A callback whose state cannot be written at the second step."""

    def __init__(self, fault):
        self.fault, self.step = fault, 0

    def on_step_end(self, args, state, control, **kwargs):
        self.step = state.global_step

    def state(self):
        if self.step == 2 and isinstance(self.fault, BaseException):
            raise self.fault
        return {"args": {}, "attributes": {"value": self.fault if self.step == 2 else 0}}


@pytest.mark.parametrize(
    ("fault", "error", "text"),
    [
        (KeyError("missing"), KeyError, "missing"),
        (torch.zeros(1), TypeError, "not JSON serializable"),
        (RuntimeError("CUDA error: device-side assert triggered"), RuntimeError, "device-side assert"),
        (FileNotFoundError(errno.ENOENT, "No such file", "vocabulary"), FileNotFoundError, "vocabulary"),
        (ConnectionError("no route to host"), ConnectionError, "no route"),
        (KeyboardInterrupt("by hand"), KeyboardInterrupt, "by hand"),
        (SystemExit(3), SystemExit, "3"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_an_exception_that_tells_of_no_disk_comes_through_as_itself(tmp_path, fault, error, text):
    trainer = bert_trainer(tmp_path, max_steps=3, save_total_limit=1)
    trainer.add_callback(Faulty(fault))
    with pytest.raises(error, match=text) as raised:
        trainer.train()
    assert type(raised.value) is error
    [note] = raised.value.__notes__
    assert note == f"{tmp_path}/checkpoint-2 was not written; {tmp_path}/checkpoint-1 before it is untouched."
    assert names(tmp_path) == ["checkpoint-1"]
    assert flaw(tmp_path / "checkpoint-1") is None


@pytest.mark.parametrize(
    ("number", "cure"),
    [
        (errno.ENOSPC, "make room"),
        (errno.EDQUOT, "make room"),
        (errno.EROFS, "make it writable"),
        (errno.EACCES, "make it writable"),
    ],
)
def test_an_error_of_the_disk_says_what_it_is_and_what_helps(tmp_path, number, cure):
    trainer = bert_trainer(tmp_path, max_steps=2)
    trainer.add_callback(Faulty(OSError(number, os.strerror(number), "weights")))
    cause = re.escape(f"([Errno {number}] {os.strerror(number)}: 'weights')")
    match = (
        rf"checkpoint-2 could not be written {cause}; .*checkpoint-1 .*untouched: {cure} or name another `output_dir`"
    )
    with pytest.raises(OSError, match=match):
        trainer.train()
    assert names(tmp_path) == ["checkpoint-1"]


def save_nowhere(folder):
    save_file({"weight": torch.zeros(1)}, folder / "nowhere" / "model.safetensors")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize(
    ("write", "match"),
    [
        (lambda folder: Path("/dev/full").write_text("x" * 100_000), "make room"),
        (lambda folder: torch.save(torch.zeros(100_000), "/dev/full"), "make room"),
        (lambda folder: Tokenizer(models.BPE()).save("/dev/full"), "make room"),
        (save_nowhere, "No such file or directory"),
    ],
    ids=["python", "torch", "tokenizers", "safetensors"],
)
def test_a_full_disk_is_told_from_other_faults_in_the_words_of_each_library(tmp_path, write, match):
    accelerator = Accelerator(cpu=True)
    with (
        pytest.raises(Exception, match=match) as raised,
        made_whole(tmp_path / "checkpoint-1", accelerator, True) as it,
    ):
        write(it)
    assert (type(raised.value) is OSError) == (match == "make room")
    assert names(tmp_path) == []


def test_a_checkpoint_without_optimizer_is_whole_where_that_was_asked_for(tmp_path):
    trainer = bert_trainer(tmp_path, max_steps=3, save_only_model=True, save_total_limit=2)
    trainer.train()
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3"]
    assert [flaw(checkpoint) for checkpoint in checkpoints(tmp_path)] == [None, None]
    assert not list(tmp_path.rglob("optimizer.pt"))


def test_a_person_may_add_files_to_a_checkpoint_that_still_counts(tmp_path):
    trainer = bert_trainer(tmp_path, max_steps=3, save_total_limit=2)
    trainer.add_callback(AfterSave(1, lambda run: (run / "checkpoint-1" / "notes.txt").write_text("good")))
    trainer.train()
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3"]
    again = bert_trainer(tmp_path, max_steps=3, save_total_limit=2)
    again.train(resume_from_checkpoint=True)
    assert_same_state(state_of(again.model), state_of(trainer.model))
