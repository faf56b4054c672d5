from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutput

from hf_blockkd.routing.places import first_tensor, read, replaced

OLD, NEW = torch.zeros(2), torch.ones(2)
Pair = namedtuple("Pair", ["name", "states"])


@dataclass(frozen=True)
class Package:
    name: str
    states: torch.Tensor


@pytest.mark.parametrize(
    ("value", "place"),
    [
        (OLD, ()),
        ((OLD, 3), (0,)),
        ([None, [OLD]], (1, 0)),
        (Pair("a", OLD), (1,)),
        ({"a": 1, "b": (2, OLD)}, ("b", 1)),
        (Package("a", OLD), ("states",)),
        (BaseModelOutput(last_hidden_state=OLD, hidden_states=(OLD,)), ("last_hidden_state",)),
    ],
)
def test_the_first_tensor_is_found_and_replaced_and_all_else_stays(value, place):
    assert first_tensor(value) == place
    assert read(value, place) is OLD
    new = replaced(value, place, NEW)
    assert type(new) is type(value)
    assert read(new, place) is NEW
    assert read(value, place) is OLD
    assert repr(replaced(new, place, OLD)) == repr(value)


def test_attributes_of_any_object_are_places():
    value = SimpleNamespace(states=OLD, name="a")
    new = replaced((value, 1), (0, "states"), NEW)
    assert new[0].states is NEW
    assert value.states is OLD
    assert new[0].name == "a"


def test_what_holds_no_tensor_has_no_place():
    assert first_tensor((None, {"a": "b"}, 3)) is None
