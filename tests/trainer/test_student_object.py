"""The student is a plain model before and after training, and one student serves several trainers."""

import copy
import pickle

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import BertForSequenceClassification

from hf_blockkd import BlockwiseDistillConfig
from hf_blockkd.plan import make_plan

from ..helpers.tiny_models import tiny_bert, tiny_vit
from ..helpers.training import (
    PLAIN_SGD,
    QUIET,
    assert_same_state,
    differs,
    image_rows,
    make_trainer,
    state_of,
    text_rows,
    with_connectors,
)


def test_a_trained_student_is_plain(tmp_path):
    student, other = tiny_vit(num_hidden_layers=2), tiny_vit(num_hidden_layers=2)
    ignored = vars(student).get("_keys_to_ignore_on_save")
    trainer = make_trainer(tmp_path, student, tiny_vit(), image_rows(), max_steps=2, **PLAIN_SGD)
    assert state_of(student).keys() == state_of(other).keys()
    trainer.train()
    assert vars(student).get("_keys_to_ignore_on_save") == ignored
    other.load_state_dict(student.state_dict())
    assert b"hf_blockkd" not in pickle.dumps(student)
    with with_connectors(trainer):
        assert len(student.state_dict()) > len(other.state_dict())
    assert state_of(student).keys() == state_of(other).keys()


class Open(BertForSequenceClassification):
    """Names the labels alone."""

    def forward(self, *args, labels=None, **kw):
        return super().forward(*args, labels=labels, **kw)


def test_models_whose_own_forward_is_open_train_as_their_base_on_the_same_columns(tmp_path):
    rows = Dataset.from_list([{name: value.tolist() for name, value in row.items()} for row in text_rows()])
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    pairs = [[tiny_bert(num_hidden_layers=depth, **dropout) for depth in (2, 4)]]
    pairs += [[Open(model.config) for model in pairs[0]]]
    for model, plain in zip(*reversed(pairs), strict=True):
        model.load_state_dict(plain.state_dict())
    for student, teacher in pairs:
        make_trainer(tmp_path, student, teacher, rows.with_format("torch"), max_steps=2, **PLAIN_SGD).train()
    assert_same_state(*(state_of(student) for student, _ in pairs))


def test_an_adapter_that_trains_all_biases_saves_none_of_a_connector(tmp_path):
    config = LoraConfig(target_modules=["query"], bias="all", modules_to_save=["classifier"])
    student = get_peft_model(tiny_bert(num_hidden_layers=2), config)
    make_trainer(tmp_path, student, tiny_bert(), text_rows(), max_steps=1).train()
    student.save_pretrained(tmp_path / "adapter")
    assert not any("connector" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))


def trains(trainer):
    before = state_of(trainer.connectors)
    trainer.train()
    return differs(state_of(trainer.connectors), before)


def test_each_of_two_trainers_around_one_student_trains_its_own_connectors(tmp_path):
    student, teacher = tiny_vit(num_hidden_layers=2), tiny_vit()
    first, second = (
        make_trainer(tmp_path / name, student, teacher, image_rows(), max_steps=2, **PLAIN_SGD) for name in "ab"
    )
    assert trains(first)
    assert trains(second)
    known = {id(parameter) for group in second.optimizer.param_groups for parameter in group["params"]}
    assert not any(id(parameter) in known for parameter in first.connectors.parameters())


def test_a_plan_leaves_the_trainer_around_its_student_as_it_was(tmp_path):
    student, teacher = tiny_vit(num_hidden_layers=2), tiny_vit()
    trainer = make_trainer(tmp_path, student, teacher, image_rows(), max_steps=2, **PLAIN_SGD)
    make_plan(student, teacher, BlockwiseDistillConfig(str(tmp_path), **QUIET))
    assert trains(trainer)


@pytest.mark.parametrize("named", [False, True])
def test_connectors_join_the_group_of_an_optimizer_that_learns_fastest(tmp_path, named):
    student = tiny_vit(num_hidden_layers=2)
    head = list(student.classifier.named_parameters(prefix="classifier"))
    body = list(student.vit.named_parameters(prefix="vit"))
    groups = [{"params": body if named else [p for _, p in body], "lr": 0.0}]
    groups += [{"params": head if named else [p for _, p in head], "lr": 0.1}]
    trainer = make_trainer(tmp_path, student, tiny_vit(), image_rows(), max_steps=1, max_grad_norm=0.0)
    optimizer = torch.optim.SGD(groups)
    trainer = type(trainer)(
        model=student,
        teacher_model=tiny_vit(),
        args=trainer.args,
        train_dataset=image_rows(),
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)),
    )
    assert trains(trainer)
    assert [len(group["params"]) for group in optimizer.param_groups] == [
        len(group.get("param_names", group["params"])) for group in optimizer.param_groups
    ]


def test_connectors_learn_at_a_rate_of_their_own(tmp_path):
    settings = {"max_steps": 1, "connector_learning_rate": 0.0, "weight_decay": 0.1, "learning_rate": 0.1}
    trainer = make_trainer(tmp_path, tiny_vit(num_hidden_layers=2), tiny_vit(), image_rows(), **settings)
    before = state_of(trainer.model)
    assert not trains(trainer)
    assert differs(state_of(trainer.model), before)
    assert (trainer.optimizer.param_groups[-1]["initial_lr"], trainer.optimizer.param_groups[-1]["weight_decay"]) == (
        0.0,
        0.0,
    )


def test_connectors_at_the_rate_of_all_train_as_without_a_rate_of_their_own(tmp_path):
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    student, teacher = tiny_bert(num_hidden_layers=2, **dropout), tiny_bert(hidden_size=16, **dropout)
    found = []
    for own in ({}, {"connector_learning_rate": 0.01}):
        settings = {"max_steps": 3, "weight_decay": 0.5, "learning_rate": 0.01, **own}
        trainer = make_trainer(tmp_path, copy.deepcopy(student), teacher, text_rows(), **settings)
        trainer.train()
        found.append(state_of(trainer.model) | state_of(trainer.connectors))
        groups = trainer.optimizer.param_groups
        assert [group["weight_decay"] for group in groups] == [0.5, 0.0] * (len(own) + 1)
    assert_same_state(*found)


def test_an_optimizer_class_of_the_person_trains_student_and_connectors(tmp_path):
    first = make_trainer(tmp_path, tiny_vit(num_hidden_layers=2), tiny_vit(), image_rows(), max_steps=1)
    trainer = type(first)(
        model=first.model,
        teacher_model=first.teacher,
        args=first.args,
        train_dataset=image_rows(),
        optimizer_cls_and_kwargs=(torch.optim.Adagrad, {"lr": 0.1}),
    )
    assert trains(trainer)
    assert isinstance(trainer.optimizer.optimizer, torch.optim.Adagrad)


def test_batches_that_a_person_asks_for_hold_no_keys_of_a_teacher_cache(tmp_path):
    settings = {"max_steps": 1, "teacher_cache": str(tmp_path / "cache"), "objective": "kd"}
    trainer = make_trainer(tmp_path, tiny_vit(num_hidden_layers=2), tiny_vit(), image_rows(), **settings)
    trainer.train()
    assert set(next(iter(trainer.get_train_dataloader()))) == {"pixel_values", "labels"}
