"""What goes wrong on the way stops the run before an update that it would spoil, and leaves the last checkpoint."""

import itertools
import json
import math
import os
import signal

import pytest
import torch
from transformers import AutoModelForSequenceClassification, TrainerCallback
from transformers.trainer_jit_checkpoint import JITCheckpointCallback

from hf_blockkd.models.loading import load_model
from hf_blockkd.saving.checkpoints import checkpoints, flaw

from ..helpers.tiny_models import VOCABULARY, tiny_bert, tiny_llama, tiny_vit
from ..helpers.training import (
    Terminate,
    assert_same_state,
    image_rows,
    make_trainer,
    state_of,
    step_logs,
    text_rows,
    token_rows,
    with_connectors,
)

EVERY_STEP = {"save_strategy": "steps", "save_steps": 1, "max_steps": 5}


def bert_trainer(folder, **settings):
    torch.manual_seed(0)
    return make_trainer(folder, tiny_bert(num_hidden_layers=2), tiny_bert(), text_rows(8), **{**EVERY_STEP, **settings})


def assert_stopped_after_step_2(folder, trainer):
    assert trainer.state.global_step == 2
    newest = checkpoints(folder)[0]
    assert newest.name == "checkpoint-2"
    assert flaw(newest) is None
    saved = AutoModelForSequenceClassification.from_pretrained(newest)
    assert all(torch.isfinite(parameter).all() for parameter in saved.parameters())


# ---- Values that are not finite ----


class Spoil(TrainerCallback):
    """Writes a value into a parameter when the third step begins."""

    def __init__(self, value):
        self.value, self.parameter = value, None

    @torch.no_grad()
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.parameter.view(-1)[0] = self.value


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name", ["bert.encoder.layer.0.attention.self.query.weight", "classifier.bias", "blockwise_connectors.0.weight"]
)
def test_a_weight_of_student_or_connector_that_is_not_finite_is_named(tmp_path, name, value):
    callback = Spoil(value)
    trainer = bert_trainer(tmp_path)
    trainer.add_callback(callback)
    with with_connectors(trainer):
        callback.parameter = trainer.model.get_parameter(name)
    with pytest.raises(ValueError, match=f"At optimizer step 3, {name} is not finite; .*last checkpoint is untouched"):
        trainer.train()
    assert_stopped_after_step_2(tmp_path, trainer)


def test_a_weight_of_the_teacher_that_is_not_finite_stops_the_run_as_well(tmp_path):
    callback = Spoil(float("nan"))
    trainer = bert_trainer(tmp_path)
    trainer.add_callback(callback)
    callback.parameter = trainer.teacher.classifier.bias
    with pytest.raises(ValueError, match=r"The teacher gives values that are not finite.*step 3"):
        trainer.train()
    assert_stopped_after_step_2(tmp_path, trainer)


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_a_gradient_that_overflows_is_found_with_and_without_clipping(tmp_path, max_grad_norm):
    class Overflow(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                model.classifier.weight.register_hook(lambda gradient: gradient * float("inf"))

    trainer = bert_trainer(tmp_path, max_grad_norm=max_grad_norm)
    trainer.add_callback(Overflow())
    with pytest.raises(ValueError, match=r"At optimizer step 3, the gradient is not finite"):
        trainer.train()
    assert_stopped_after_step_2(tmp_path, trainer)


@pytest.mark.parametrize("at_first", [2, 1], ids=["", "set after the trainer was made"])
@pytest.mark.parametrize("wrong", [2, 5])
def test_a_fault_in_any_micro_batch_of_a_step_is_named_before_its_update(tmp_path, wrong, at_first):
    rows = image_rows(8)
    rows[wrong]["pixel_values"] = torch.full_like(rows[wrong]["pixel_values"], float("nan"))
    settings = {**EVERY_STEP, "train_sampling_strategy": "sequential", "gradient_accumulation_steps": at_first}
    student = tiny_vit(num_hidden_layers=2)
    before = state_of(student)
    trainer = make_trainer(tmp_path, student, tiny_vit(), rows, **settings)
    trainer.args.gradient_accumulation_steps = 2
    with pytest.raises(ValueError, match=rf"not finite for examples \[{wrong % 4}\] of a batch of optimizer step 1"):
        trainer.train()
    assert_same_state(state_of(student), before)


@pytest.mark.parametrize("value", [float("inf"), float("-inf")])
def test_a_label_that_is_not_finite_stops_the_run_before_its_step(tmp_path, value):
    rows = [{**row, "labels": torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0])} for row in image_rows(16)]
    rows[9]["labels"] = torch.tensor([0.0, value, 0.0, 0.0, 0.0])
    student, teacher = (tiny_vit(problem_type="multi_label_classification") for _ in range(2))
    settings = {**EVERY_STEP, "train_sampling_strategy": "sequential"}
    trainer = make_trainer(tmp_path, student, teacher, rows, **settings)
    with pytest.raises(ValueError, match="`labels` holds values that are not finite"):
        trainer.train()
    assert trainer.state.global_step == 2
    assert flaw(checkpoints(tmp_path)[0]) is None


# ---- Processes that die ----


class DiesAt(torch.utils.data.Dataset):
    """Kills whoever reads its row `index`, unless that is the process that made it."""

    def __init__(self, rows, index):
        self.rows, self.index, self.parent = rows, index, os.getpid()

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        if index == self.index and os.getpid() != self.parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.rows[index]


def test_a_worker_of_the_data_loader_that_dies_is_explained_and_the_run_goes_on_from_its_last_checkpoint(tmp_path):
    def trainer(folder, workers):
        torch.manual_seed(0)
        settings = {**EVERY_STEP, "train_sampling_strategy": "sequential", "dataloader_prefetch_factor": 1}
        settings = settings if workers else {**settings, "dataloader_prefetch_factor": None}
        rows = DiesAt(text_rows(24), 19)
        models = tiny_bert(num_hidden_layers=2), tiny_bert()
        return make_trainer(folder, *models, rows, dataloader_num_workers=workers, **settings)

    broken = trainer(tmp_path / "run", 1)
    with pytest.raises(RuntimeError, match=r"DataLoader worker .*lower `dataloader_num_workers`, and go on with"):
        broken.train()
    assert 0 < broken.state.global_step < 5
    # The news may come while a checkpoint is being written, which then is none.
    last = checkpoints(tmp_path / "run")[0].name
    resumed = trainer(tmp_path / "run", 0)
    resumed.train(resume_from_checkpoint=True)
    assert f"checkpoint-{resumed._initial_global_step}" == last
    unbroken = trainer(tmp_path / "unbroken", 0)
    unbroken.train()
    assert_same_state(state_of(resumed.model), state_of(unbroken.model))


@pytest.mark.parametrize("settings", [{"save_strategy": "no"}, {"save_steps": 2}, {"save_strategy": "best"}], ids=str)
def test_sigterm_saves_after_the_step_and_ends_the_run_which_goes_on_to_the_same_bits(tmp_path, settings):
    def trainer(folder):
        marks = itertools.chain([0.9], itertools.repeat(0.1))
        evaluation = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": text_rows(4, seed=1)}
        evaluation |= {"metric_for_best_model": "mark", "compute_metrics": lambda prediction: {"mark": next(marks)}}
        return bert_trainer(folder, enable_jit_checkpoint=True, **evaluation, **settings)

    before = signal.getsignal(signal.SIGTERM)
    stopped = trainer(tmp_path / "run")
    manager = next(c for c in stopped.callback_handler.callbacks if isinstance(c, JITCheckpointCallback)).jit_manager
    manager.kill_wait = 0
    stopped.add_callback(Terminate(2, manager))
    stopped.train()
    assert signal.getsignal(signal.SIGTERM) is before
    assert stopped.state.global_step == 3
    assert checkpoints(tmp_path / "run")[0].name == "checkpoint-3"

    resumed = trainer(tmp_path / "run")
    resumed.train(resume_from_checkpoint=True)
    assert resumed._initial_global_step == 3
    unbroken = trainer(tmp_path / "unbroken")
    unbroken.train()
    assert_same_state(state_of(resumed.model), state_of(unbroken.model))
    assert step_logs(resumed) == step_logs(unbroken)


# ---- Code of strangers ----


def test_a_folder_with_code_of_its_own_is_refused_and_the_code_never_runs(tmp_path):
    folder, mark = tmp_path / "model", tmp_path / "it ran"
    folder.mkdir()
    (folder / "code.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass StrangeConfig: pass\n")
    config = {"model_type": "strange", "architectures": ["StrangeForCausalLM"]}
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoConfig": "code.StrangeConfig"}}))
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_model(str(folder))
    with pytest.raises(ValueError, match="trust_remote_code"):
        make_trainer(tmp_path / "run", tiny_vit(), str(folder), image_rows(4))
    assert not mark.exists()


@pytest.mark.parametrize("chunk_size", [0, 5])
@pytest.mark.parametrize("spoiled", ["student", "teacher"])
def test_a_loss_that_is_not_finite_stops_the_run_and_is_named_in_chunks_or_not(tmp_path, spoiled, chunk_size):
    models = {"student": tiny_llama(num_hidden_layers=2), "teacher": tiny_llama()}
    with torch.no_grad():
        models[spoiled].lm_head.weight[3] = float("nan") if spoiled == "teacher" else float("-inf")
    trainer = make_trainer(
        tmp_path, *models.values(), token_rows(8), loss_chunk_size=chunk_size, objective="kd", max_steps=2
    )
    wrong = {
        "teacher": r"(The teacher gives values.* not finite.*|`loss_distill` is nan on )a batch of optimizer step 1",
        "student": r"At optimizer step 1, lm_head\.weight is not finite",
    }
    with pytest.raises(ValueError, match=wrong[spoiled]):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("chunk_size", [0, 5])
def test_tokens_that_both_models_leave_out_do_no_harm(tmp_path, chunk_size):
    models = tiny_llama(num_hidden_layers=2), tiny_llama()

    def leave_out(model, args, outputs):
        logits = outputs.logits.clone()
        logits[..., VOCABULARY - 2 :] = float("-inf")
        outputs.logits = outputs["logits"] = logits
        return outputs

    rows = [{**row, "labels": row["labels"].clamp(max=VOCABULARY - 3)} for row in token_rows(8)]
    for model in models:
        model.register_forward_hook(leave_out)
    trainer = make_trainer(tmp_path, *models, rows, loss_chunk_size=chunk_size, max_steps=2)
    trainer.train()
    assert all(math.isfinite(entry["loss"]) and math.isfinite(entry["loss_distill"]) for entry in step_logs(trainer))
