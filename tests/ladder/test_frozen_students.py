"""A ladder under a student that is trained already: its connectors alone learn."""

import copy

import pytest
import torch

from ..helpers.tiny_models import tiny_bert, tiny_resnet, tiny_vit
from ..helpers.training import assert_same_state, batch_of, image_rows, make_trainer, state_of, text_rows

DROPS = {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5}
PAIRS = {
    "texts, dropout": (lambda: (tiny_bert(hidden_size=8, **DROPS), tiny_bert()), text_rows),
    "images, batch norms": (lambda: (tiny_resnet(), tiny_resnet(hidden_sizes=[8, 16])), image_rows),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_ladder_of_a_frozen_student_trains_its_connectors_alone(name, tmp_path):
    make, rows = PAIRS[name]
    student, teacher = make()
    student.requires_grad_(False)
    settings = {"objective": "ladder", "task_weight": 0.0, "max_steps": 60, "learning_rate": 1e-2}
    trainer = make_trainer(tmp_path, student, teacher, rows(), **settings)
    before, batch = copy.deepcopy(student.state_dict()), batch_of(rows())
    connectors = state_of(trainer.connectors)

    def errors() -> list[float]:
        trainer.model.eval()
        clean = teacher(**{key: value for key, value in batch.items() if key != "labels"}).logits.softmax(-1)
        stones = trainer.stepping_stone_logits(batch).values()
        return [(clean * (clean.log() - one.log_softmax(-1))).sum(-1).mean().item() for one in stones]

    start = errors()
    trainer.train()
    assert_same_state(student.state_dict(), before)
    assert all(not torch.equal(connectors[key], value) for key, value in state_of(trainer.connectors).items())
    assert all(after < 0.5 * at_first for after, at_first in zip(errors(), start, strict=True))


def test_a_frozen_student_is_met_as_it_will_be_deployed(tmp_path):
    student, teacher = tiny_bert(hidden_size=8, **DROPS), tiny_bert()
    student.requires_grad_(False)
    trainer, batch = make_trainer(tmp_path, student, teacher, text_rows(), objective="ladder"), batch_of(text_rows())
    trainer.model.train()
    step = trainer.make_step(batch)
    step.teach()
    outputs, _ = step.learn(trainer.model)
    assert trainer.model.training
    student.eval()
    expected = student(**{key: value for key, value in batch.items() if key != "labels"}).logits
    assert torch.equal(outputs.logits, expected)


NOTHING_TRAINS = [
    {"objective": "block_kd"},
    {"objective": "ladder", "train_connectors": False},
    {"objective": "ladder", "stone_weight": 0.0},
    {"objective": "ladder", "stepping_stones": "none"},
]


@pytest.mark.parametrize("settings", NOTHING_TRAINS)
def test_only_a_ladder_whose_connectors_train_is_trained_under_a_frozen_student(settings, tmp_path):
    student, teacher = tiny_vit(hidden_size=8), tiny_vit()
    student.requires_grad_(False)
    cure = r"so the student would not train; .*set `objective='ladder'` and `train_connectors=True`"
    with pytest.raises(ValueError, match=cure):
        make_trainer(tmp_path, student, teacher, image_rows(), **settings)


def test_states_that_are_asked_for_train_connectors_under_a_frozen_student_where_no_stone_runs(tmp_path):
    student, teacher = tiny_vit(hidden_size=8), tiny_vit()
    student.requires_grad_(False)
    settings = {"objective": "ladder", "stepping_stones": "none", "state_blocks": [1], "max_steps": 1}
    trainer = make_trainer(tmp_path, student, teacher, image_rows(256), **settings)
    start = state_of(trainer.connectors)
    trainer.train()
    moved = {name for name, one in state_of(trainer.connectors).items() if not torch.equal(one, start[name])}
    assert {name.split(".")[0] for name in moved} == {"0"}


def test_a_sum_with_a_ladder_is_one_too(tmp_path):
    student, teacher = tiny_vit(hidden_size=8), tiny_vit()
    student.requires_grad_(False)
    trainer = make_trainer(tmp_path, student, teacher, image_rows(), objective="ladder+hint", max_steps=1)
    start = state_of(trainer.connectors)
    trainer.train()
    assert all(not torch.equal(start[key], value) for key, value in state_of(trainer.connectors).items())
