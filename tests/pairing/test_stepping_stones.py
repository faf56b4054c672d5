from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from hf_blockkd import BlockMap, find_layer_stack
from hf_blockkd.connectors.maps import make_connectors
from hf_blockkd.objectives.sampling import choose_stones
from hf_blockkd.pairing.stepping_stones import SteppingStones
from hf_blockkd.routing.dummy_inputs import dummy_inputs
from hf_blockkd.routing.entering import enter_at

from ..helpers import tiny_models as tiny

TEACHERS = {
    "vit": tiny.tiny_vit,
    "bert": tiny.tiny_bert,
    "llama": tiny.tiny_llama,
    "mistral": tiny.tiny_mistral,
    "t5": tiny.tiny_t5,
    "gpt2 tied": lambda: tiny.tiny_gpt2(tie_word_embeddings=True),
}


def stones_of(student: nn.Module, teacher: nn.Module, num_blocks: int, kind: str, widths: tuple[int, int]):
    ours, theirs = find_layer_stack(student), find_layer_stack(teacher)
    block_map = BlockMap.even(len(ours), len(theirs), num_blocks)
    connectors = make_connectors(kind, [widths[0]] * num_blocks, [widths[1]] * num_blocks, seed=0)
    return SteppingStones(ours, teacher.requires_grad_(False).eval(), theirs, block_map, connectors)


@pytest.mark.parametrize("name", TEACHERS)
@pytest.mark.parametrize("num_blocks", [1, 2, 3])
@torch.no_grad()  # with gradients, torch may choose other attention kernels for the student (T5), which round otherwise
def test_every_stone_of_an_identical_student_is_the_teacher_to_the_bit(name, num_blocks):
    teacher = TEACHERS[name]()
    student = copy.deepcopy(teacher)
    stones = stones_of(student, teacher, num_blocks, "identity", (tiny.WIDTH, tiny.WIDTH))
    inputs = dummy_inputs(teacher)
    clean, extras = stones.teach(inputs)
    with stones.capture(range(1, num_blocks + 1)) as states:
        student(**inputs)
    for index in range(1, num_blocks + 1):
        assert torch.equal(stones.run(index, states, inputs, extras).logits, clean.logits)


@pytest.mark.parametrize("name", TEACHERS)
def test_a_stone_at_depth_zero_is_the_teacher(name):
    teacher = TEACHERS[name]()
    inputs = dummy_inputs(teacher)
    stones = stones_of(teacher, teacher, 1, "identity", (tiny.WIDTH, tiny.WIDTH))
    clean, extras = stones.teach(inputs)
    with torch.no_grad(), stones.capture([1]), enter_at(stones.teacher_stack, 0, embedded(teacher, inputs), extras):
        assert torch.equal(teacher(**inputs).logits, clean.logits)


def embedded(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """What enters layer 0, caught by a hook of the test's own."""
    caught = []
    layer = find_layer_stack(model).layers[0]
    handle = layer.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    model(**inputs)
    handle.remove()
    return caught[0]


def test_a_stone_is_student_prefix_then_connector_then_teacher_suffix_and_head():
    teacher = tiny.tiny_vit(hidden_size=24, num_hidden_layers=5).requires_grad_(False)
    student = tiny.tiny_vit()
    stones = stones_of(student, teacher, 3, "mlp", (tiny.WIDTH, 24))
    assert (stones.block_map.student, stones.block_map.teacher) == ((1, 2, 3), (1, 3, 5))
    inputs = dummy_inputs(teacher)
    _, extras = stones.teach(inputs)
    with stones.capture([1, 2, 3]) as states:
        student(**inputs)
    for index, (ours, theirs) in enumerate(((1, 1), (2, 3), (3, 5)), start=1):
        hidden = student.vit.embeddings(inputs["pixel_values"])
        for layer in student.vit.layers[:ours]:
            hidden = layer(hidden)
        hidden = stones.connectors[index - 1](hidden)
        for layer in teacher.vit.layers[theirs:]:
            hidden = layer(hidden)
        by_hand = teacher.classifier(teacher.vit.layernorm(hidden)[:, 0])
        assert torch.equal(stones.run(index, states, inputs, extras).logits, by_hand)


def test_gradients_reach_the_student_prefix_and_the_own_connector_and_nothing_else():
    teacher = tiny.tiny_bert(hidden_size=24, num_hidden_layers=4)
    student = tiny.tiny_bert()
    stones = stones_of(student, teacher, 3, "linear", (tiny.WIDTH, 24))
    inputs = dummy_inputs(teacher)
    _, extras = stones.teach(inputs)
    with stones.capture([2]) as states:
        student(**inputs)
    logits = stones.run(2, states, inputs, extras).logits
    (logits * torch.randn_like(logits)).sum().backward()

    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad.abs().max() > 0 for parameter in stones.connectors[1].parameters())
    assert all(p.grad is None for i in (0, 2) for p in stones.connectors[i].parameters())
    layers = student.bert.encoder.layer
    for trained in (student.bert.embeddings, layers[0], layers[1]):
        assert all(parameter.grad is not None for parameter in trained.parameters())
    for untouched in (layers[2], student.bert.pooler, student.classifier):
        assert all(parameter.grad is None for parameter in untouched.parameters())


def test_a_skipped_layer_of_the_student_is_named():
    teacher = tiny.tiny_vit()
    stones = stones_of(tiny.tiny_vit(), teacher, 3, "identity", (tiny.WIDTH, tiny.WIDTH))
    with pytest.raises(ValueError, match=r"did not call layer 1 of 'vit\.layers', which stepping stone 1 reads"):
        stones.run(1, {}, dummy_inputs(teacher), {})


@pytest.mark.parametrize(
    ("wanted", "chosen"),
    [("last_two", [2, 3]), ("all", [1, 2, 3]), ("sample", [1, 2, 3]), ("none", []), ([3], [3]), ([1, 3], [1, 3])],
)
def test_stones_are_chosen_by_word_or_index(wanted, chosen):
    assert choose_stones(wanted, num_blocks=3) == chosen


def test_a_single_block_has_one_stone():
    assert choose_stones("last_two", num_blocks=1) == [1]


@pytest.mark.parametrize(("wanted", "per_step"), [([0], 1), ([4], 1), ([1, 9], 1), ("sample", 4)])
def test_stones_that_do_not_exist_are_refused(wanted, per_step):
    with pytest.raises(ValueError, match=r"stepping stones|stones 1 to 3"):
        choose_stones(wanted, num_blocks=3, stones_per_step=per_step)
