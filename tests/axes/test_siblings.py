"""Modules that no input reaches have the axes of those beside them."""

from __future__ import annotations

from hf_blockkd.axes.axis import Axis, find, fix, split
from hf_blockkd.axes.siblings import as_siblings


def test_what_a_module_shares_is_shared_and_what_is_inside_of_it_is_its_own():
    states, neurons, other = Axis(8), Axis(12), Axis(12)
    split(neurons, 3, 4)
    fix(states, "somebody reads it")
    tensors = {
        "norm.weight": (states,),
        "experts.0.up.weight": (neurons, states),
        "experts.0.down.weight": (states, neurons),
        "experts.1.up.weight": (other, states),
        "experts.1.down.weight": (states, other),
        "experts.2.up.weight": (Axis(12), Axis(8)),
        "experts.2.down.weight": (Axis(8), Axis(12)),
    }
    found = dict(as_siblings(tensors, {"experts.2.up.weight", "experts.2.down.weight"}))
    (up, into), (out, down) = found["experts.2.up.weight"], found["experts.2.down.weight"]
    assert find(into) is find(out) is states
    assert str(up) == "3*4"
    assert [find(part) for part in up.parts] == [find(part) for part in down.parts]
    assert not {find(part) for part in up.parts} & {find(part) for part in neurons.parts}


def test_modules_of_other_shapes_or_names_or_read_in_part_are_no_siblings():
    def tensors(*shape: int) -> dict[str, tuple[Axis, ...]]:
        return {"a.0.w": (Axis(3), Axis(2)), "a.1.w": tuple(map(Axis, shape))}

    assert len(dict(as_siblings(tensors(3, 2), {"a.1.w"}))) == 1
    assert dict(as_siblings(tensors(4, 2), {"a.1.w"})) == {}
    assert dict(as_siblings(tensors(3, 2), {"a.0.w", "a.1.w"})) == {}
    assert dict(as_siblings({**tensors(3, 2), "a.1.b": (Axis(3),)}, {"a.1.w"})) == {}
    assert dict(as_siblings({**tensors(3, 2), "a.0.b": (Axis(3),)}, {"a.1.w"})) == {}
    assert dict(as_siblings({"a.0.w": (Axis(2),), "b.1.w": (Axis(2),)}, {"b.1.w"})) == {}
