"""Stopping and going on gives the very same model, connectors and optimizer as never having stopped."""

import copy
from collections.abc import Mapping

import pytest
import torch
from peft import LoraConfig

from hf_blockkd.connectors.attached import CONNECTORS_NAME

from ..helpers.tiny_models import (
    scrambled,
    tiny_beit,
    tiny_bert,
    tiny_deit,
    tiny_gpt_neox,
    tiny_llama,
    tiny_swin,
    tiny_vit,
)
from ..helpers.training import (
    assert_same_state,
    differs,
    file_bytes,
    image_rows,
    make_trainer,
    state_of,
    step_logs,
    text_rows,
    token_rows,
)

CASES = {
    "vit": (tiny_vit, image_rows, {}),
    "deit": (tiny_deit, image_rows, {}),
    "beit": (tiny_beit, image_rows, {}),
    "bert-with-dropout": (tiny_bert, text_rows, {}),
    "llama": (tiny_llama, token_rows, {}),
    "llama-tied": (lambda **c: tiny_llama(tie_word_embeddings=True, **c), token_rows, {}),
    "gpt-neox": (tiny_gpt_neox, token_rows, {}),
    "vit-sample": (tiny_vit, image_rows, {"stepping_stones": "sample", "cross_weight": 0.1}),
    "bert-share": (tiny_bert, text_rows, {"stepping_stones": "share", "stones_every": 2}),
    "vit-some-stones": (tiny_vit, image_rows, {"stepping_stones": [1], "connector": "mlp"}),
    "bert-theseus": (tiny_bert, text_rows, {"objective": "theseus"}),
    "llama-lora": (tiny_llama, token_rows, {"lora": ["q_proj", "v_proj"]}),
    "bert-lora-sample": (tiny_bert, text_rows, {"lora": ["query", "value"], "stepping_stones": "sample"}),
}


def lora(targets):
    return LoraConfig(r=2, target_modules=targets, lora_dropout=0.1) if targets else None


def flat(value, prefix=""):
    """The leaves of an optimizer's state, by path."""
    if isinstance(value, (Mapping, list)):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        return {path: leaf for key, part in items for path, leaf in flat(part, f"{prefix}/{key}").items()}
    return {prefix: value}


def assert_same_optimizer(actual, expected):
    ours, theirs = flat(actual.state_dict()), flat(expected.state_dict())
    assert ours.keys() == theirs.keys()
    for path, value in theirs.items():
        assert torch.equal(ours[path], value) if isinstance(value, torch.Tensor) else ours[path] == value, path


@torch.no_grad()
def forget(trainer):
    """Other weights wherever something is trained, as a fresh process would have them."""
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(tmp_path, case):
    build, make_rows, settings = case
    settings = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, "learning_rate": 1e-2, **settings}
    targets = settings.pop("lora", None)
    teacher, student = build(), build(num_hidden_layers=2)

    def trainer(folder):
        return make_trainer(
            folder, copy.deepcopy(student), teacher, make_rows(8), peft_config=lora(targets), **copy.copy(settings)
        )

    unbroken = trainer(tmp_path / "unbroken")
    unbroken.train()
    resumed = trainer(tmp_path / "resumed")
    forget(resumed)
    assert differs(state_of(resumed.model), state_of(unbroken.model))
    resumed.train(resume_from_checkpoint=str(tmp_path / "unbroken" / "checkpoint-3"))

    assert_same_state(state_of(resumed.model), state_of(unbroken.model))
    assert_same_state(state_of(resumed.connectors), state_of(unbroken.connectors))
    assert_same_optimizer(resumed.optimizer, unbroken.optimizer)
    assert step_logs(resumed) == step_logs(unbroken)
    for name in ("model.safetensors", "adapter_model.safetensors", CONNECTORS_NAME):
        first, second = (tmp_path / run / "checkpoint-6" / name for run in ("unbroken", "resumed"))
        assert first.exists() == second.exists()
        assert not first.exists() or first.read_bytes() == second.read_bytes()


def test_resuming_in_the_middle_of_an_epoch_with_accumulation_goes_on_with_the_next_batch(tmp_path):
    settings = {
        "save_strategy": "steps",
        "save_steps": 2,
        "max_steps": 5,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
    }
    teacher, student = tiny_vit(), tiny_vit(num_hidden_layers=2)
    runs = [make_trainer(tmp_path / n, copy.deepcopy(student), teacher, image_rows(14), **settings) for n in "ab"]
    runs[0].train()
    runs[1].train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert_same_state(state_of(runs[1].model), state_of(runs[0].model))


@pytest.mark.parametrize("targets", [None, ["query", "value"]], ids=["full", "lora"])
def test_the_best_model_comes_back_with_its_connectors(tmp_path, targets):
    settings = {
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "max_steps": 4,
        "learning_rate": 0.5,
        "optim": "sgd",
        "load_best_model_at_end": True,
        "metric_for_best_model": "mark",
        "greater_is_better": True,
    }
    marks = iter([0.1, 0.9, 0.3, 0.2])
    student, teacher = tiny_bert(num_hidden_layers=2), tiny_bert()
    trainer = make_trainer(
        tmp_path,
        student,
        teacher,
        text_rows(8),
        eval_dataset=text_rows(4, seed=1),
        compute_metrics=lambda prediction: {"mark": next(marks)},
        peft_config=lora(targets),
        **settings,
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    trainer.save_model(str(tmp_path / "best"))
    weights = "adapter_model.safetensors" if targets else "model.safetensors"
    for name in (weights, CONNECTORS_NAME):
        best = (tmp_path / "best" / name).read_bytes()
        assert best == (tmp_path / "checkpoint-2" / name).read_bytes()
        assert best != (tmp_path / "checkpoint-4" / name).read_bytes()


# ---- What cannot be resumed ----


def checkpoint(folder):
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    make_trainer(folder, tiny_vit(), tiny_vit(), image_rows(4), **settings).train()
    return folder / "checkpoint-1"


def refuse(tmp_path, folder, match, **settings):
    before = file_bytes(folder)
    trainer = make_trainer(tmp_path / "other", tiny_vit(), tiny_vit(), image_rows(4), max_steps=2, **settings)
    with pytest.raises(ValueError, match=match):
        trainer.train(resume_from_checkpoint=str(folder))
    assert trainer.state.global_step == 0
    assert file_bytes(folder) == before


def test_a_checkpoint_without_connectors_is_refused(tmp_path):
    folder = checkpoint(tmp_path / "run")
    (folder / CONNECTORS_NAME).unlink()
    refuse(tmp_path, folder, r"checkpoint-1 is not whole: connectors\.safetensors is missing.*BlockwiseDistillTrainer")


def test_connectors_of_another_block_map_are_refused(tmp_path):
    refuse(tmp_path, checkpoint(tmp_path / "run"), "num_blocks", num_blocks=3)


def test_connectors_of_another_kind_are_refused(tmp_path):
    refuse(tmp_path, checkpoint(tmp_path / "run"), "connector", connector="mlp")


def test_a_student_with_stages_resumes_too(tmp_path):
    """Swin's file used to be written with older key names, which reading it back raw does not match."""
    teacher, student = tiny_swin(), scrambled(copy.deepcopy(tiny_swin()))
    rows = [{"pixel_values": torch.randn(1, 16, 16), "labels": torch.tensor(i % 5)} for i in range(8)]
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    runs = [make_trainer(tmp_path / n, copy.deepcopy(student), teacher, rows, **settings) for n in "ab"]
    runs[0].train()
    forget(runs[1])
    runs[1].train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"))
    assert_same_state(state_of(runs[1].model), state_of(runs[0].model))


def test_a_checkpoint_with_other_connectors_is_refused_before_the_student_is_overwritten(tmp_path):
    teacher, student = tiny_vit(num_hidden_layers=3), tiny_vit(num_hidden_layers=3)
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    make_trainer(tmp_path, copy.deepcopy(student), teacher, image_rows(), num_blocks=2, **settings).train()
    other = make_trainer(tmp_path, student, teacher, image_rows(), num_blocks=3, **settings)
    before = state_of(student)
    with pytest.raises(ValueError, match="holds connectors of another run"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert_same_state(state_of(student), before)
