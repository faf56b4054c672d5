"""Models that no search finds, described by hand: other places for layers, and for states in and out of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_blockkd import (
    Architecture,
    UnsupportedArchitectureError,
    check_routing,
    find_layer_stack,
    register_architecture,
)
from hf_blockkd.routing.architectures import ARCHITECTURES

from ..helpers import tiny_models as tiny
from ..helpers.training import make_trainer, state_of, step_logs, text_rows

INPUTS = {"input_ids": torch.tensor([[3, 4, 5], [6, 7, 8]])}


@dataclass(frozen=True)
class Package:
    label: str
    states: torch.Tensor


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)

    def new(self, states: torch.Tensor) -> torch.Tensor:
        return states + self.inner(states).relu()


class Plain(Layer):
    def forward(self, states):
        return self.new(states)


class Second(Layer):
    def forward(self, scale, states):
        return scale, self.new(states)


class InDictionary(Layer):
    def forward(self, batch):
        return {"scale": batch["scale"], "deep": [None, self.new(batch["states"])]}


class InPackage(Layer):
    def forward(self, package):
        return Package(package.label, self.new(package.states))


class RobotConfig(PreTrainedConfig):
    model_type = "robot"
    num_labels = tiny.LABELS


class RobotForSequenceClassification(PreTrainedModel):
    """Its forward runs `call(layer, states)` for each layer of its trunk."""

    config_class = RobotConfig
    main_input_name = "input_ids"
    _input_embed_layer = "embed"

    def __init__(self, layer_class: type, call: Callable, width: int = tiny.WIDTH) -> None:
        super().__init__(RobotConfig(vocab_size=tiny.VOCABULARY))
        self.embed, self.head = nn.Embedding(tiny.VOCABULARY, width), nn.Linear(width, tiny.LABELS)
        self.trunk = nn.Sequential(*(layer_class(width) for _ in range(3)))
        self.call = call

    def forward(self, input_ids, attention_mask=None, labels=None):
        states = self.embed(input_ids)
        for layer in self.trunk:
            states = self.call(layer, states)
        logits = self.head(states.mean(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def robot(kind: str, width: int = tiny.WIDTH) -> PreTrainedModel:
    layer_class, call, _ = ROBOTS[kind]
    return tiny.scrambled(RobotForSequenceClassification(layer_class, call, width))


SCALE = torch.tensor(7.0)
PLAIN = (Plain, lambda layer, states: layer(states))
SECOND = (Second, lambda layer, states: layer(SCALE, states)[1])
NAMED = (Second, lambda layer, states: layer(states=states, scale=SCALE)[1])
DICTIONARY = (InDictionary, lambda layer, states: layer({"scale": 7.0, "states": states})["deep"][1])
PACKAGE = (InPackage, lambda layer, states: layer(Package("robot", states)).states)
ROBOTS = {
    "a Sequential": (*PLAIN, Architecture("trunk")),
    "layers one by one": (*PLAIN, Architecture(lambda model: [model.trunk[0], model.trunk[1], model.trunk[2]])),
    "second argument": (*SECOND, Architecture("trunk", entry=1, exit=1)),
    "second argument, by keyword": (*NAMED, Architecture("trunk", entry=1, exit=1)),
    "named argument, by position": (*SECOND, Architecture("trunk", entry="states", exit=1)),
    "inside a dictionary": (*DICTIONARY, Architecture("trunk", entry=(0, "states"), exit=("deep", 1))),
    "inside a dataclass": (*PACKAGE, Architecture("trunk", entry=(0, "states"), exit="states")),
}


@pytest.fixture(autouse=True)
def _registry():
    before = dict(ARCHITECTURES)
    yield
    ARCHITECTURES.clear()
    ARCHITECTURES.update(before)


@pytest.mark.parametrize("kind", ROBOTS)
def test_a_described_model_gives_its_own_logits_at_every_depth_to_the_bit(kind):
    register_architecture("robot", ROBOTS[kind][-1])
    report = check_routing(robot(kind), INPUTS)
    assert (report.num_layers, report.max_abs_error) == (3, 0.0)


@pytest.mark.parametrize("kind", ["layers one by one", "second argument", "inside a dictionary"])
def test_a_described_model_trains_as_teacher_and_as_student(kind, tmp_path):
    register_architecture("robot", ROBOTS[kind][-1])
    for student, teacher in ((robot(kind), tiny.tiny_bert()), (tiny.tiny_bert(num_hidden_layers=2), robot(kind, 24))):
        trainer = make_trainer(tmp_path, student, teacher, text_rows(8), max_steps=2)
        before = state_of(trainer.connectors)
        trainer.train()
        assert all(log["stone_1/distill"] > 0 for log in step_logs(trainer))
        assert all(not torch.equal(before[name], after) for name, after in state_of(trainer.connectors).items())


def test_stones_run_on_some_of_the_examples_of_a_described_model(tmp_path):
    register_architecture("robot", ROBOTS["inside a dataclass"][-1])
    teacher = robot("inside a dataclass")
    trainer = make_trainer(tmp_path, tiny.tiny_bert(), teacher, text_rows(8), max_steps=2, stepping_stones="share")
    trainer.train()
    assert len(step_logs(trainer)) == 2


def test_a_path_of_the_caller_goes_before_the_registered_one():
    register_architecture("robot", Architecture("nowhere"))
    assert find_layer_stack(robot("a Sequential"), "trunk").path == "trunk"


@pytest.mark.parametrize(
    ("kind", "architecture", "message"),
    [
        ("a Sequential", Architecture("head"), "'head' of Robot.* names a Linear instead of a non-empty nn.ModuleList"),
        ("a Sequential", Architecture("trunks"), "'trunks' of Robot.* names nothing"),
        ("a Sequential", Architecture(lambda model: []), r"\(model type 'robot'\) returns 0 layers"),
        ("a Sequential", Architecture(lambda model: [nn.Linear(2, 2)]), "1 layers, of which 1 are no modules"),
        ("a Sequential", Architecture("trunk", entry="state"), "hands Plain no argument 'state'.*it takes states"),
        ("a Sequential", Architecture("trunk", entry=1), "hands Plain no argument 1"),
        ("second argument", Architecture("trunk", entry=1, exit="states"), "Second returns a tuple without hidden"),
        ("second argument", Architecture("trunk", entry=1, exit=2), "Second returns a tuple without hidden"),
    ],
)
def test_a_wrong_description_is_refused_in_one_sentence(kind, architecture, message):
    register_architecture("robot", architecture)
    with pytest.raises(UnsupportedArchitectureError, match=message):
        check_routing(robot(kind), INPUTS)


def test_a_model_type_without_a_name_is_refused():
    with pytest.raises(ValueError, match="`model_type` is empty"):
        register_architecture("", Architecture("trunk"))


def test_a_head_that_reads_past_the_states_is_refused():
    """What its layers return beside the described states decides the logits, so a stone would change nothing."""
    register_architecture("robot", Architecture("trunk", entry=0, exit=0))
    model = robot("second argument")
    model.call = lambda layer, states: layer(states.mean(-1), states)[1]
    with pytest.raises(UnsupportedArchitectureError, match="do not depend on the hidden states that leave the last"):
        check_routing(model, INPUTS)
