"""Sizes that meet a budget of parameters, against all students that there are."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import PreTrainedModel

from hf_blockkd import find_layer_stack, make_student
from hf_blockkd.data.calibration import batches_for
from hf_blockkd.students.budget import sizes_within

from ..helpers import tiny_models as tiny


def teacher() -> PreTrainedModel:
    return tiny.tiny_gpt2(n_embd=32, n_layer=4, n_head=4, n_inner=64)


def count(depth: int, width: int) -> int:
    return tiny.tiny_gpt2(n_embd=width, n_layer=depth, n_head=width // 8, n_inner=2 * width).num_parameters()


def found(model: PreTrainedModel, parameters: float, **given: int) -> list[tuple[int, int]]:
    return sizes_within(model, find_layer_stack(model), parameters, **given)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.8])
def test_depth_and_width_are_those_of_nearest_shares_among_the_widest_that_fit(share):
    model = teacher()
    fitting = [
        (depth, width)
        for depth, width in itertools.product(range(1, 5), (8, 16, 24, 32))
        if count(depth, width) <= share * model.num_parameters()
    ]
    widest = [max(one for one in fitting if one[0] == depth) for depth in {depth for depth, _ in fitting}]
    wanted = sorted(widest, key=lambda one: (abs(one[0] / 4 - one[1] / 32), -count(*one)))
    assert found(model, share) == wanted


def test_a_number_of_parameters_is_a_budget_as_well_as_a_share():
    model = teacher()
    assert found(model, model.num_parameters() // 4) == found(model, 0.25)


def test_what_is_given_stays():
    model = teacher()
    ((depth, width),) = found(model, 0.4, num_layers=1)
    assert depth == 1
    assert count(1, width) <= 0.4 * model.num_parameters() < count(1, width + 8) or width == 32
    assert {width for _, width in found(model, 0.4, hidden_size=16)} == {16}


@pytest.mark.parametrize("build", [tiny.tiny_vit, tiny.tiny_llama, tiny.tiny_t5])
def test_a_student_of_a_budget_meets_it(build):
    model = build()
    student = make_student(model, parameters=0.5, channels="weights")
    assert student.num_parameters() <= 0.5 * model.num_parameters()


@pytest.mark.parametrize("parameters", [0, -1, 1, 1.0, 10_000_000, True, "half", float("nan")])
def test_a_budget_that_is_none_is_refused(parameters):
    with pytest.raises(ValueError, match=r"`parameters` is .*, but must be a share of the teacher's [0-9,]+ p"):
        make_student(teacher(), parameters=parameters)


def test_a_budget_that_nothing_meets_is_refused_with_the_smallest_there_is():
    message = rf"`parameters` is 50, which is 50 parameters, but the smallest student .* has {count(1, 8):,}; raise"
    with pytest.raises(ValueError, match=message):
        make_student(teacher(), parameters=50)


def test_of_several_candidates_the_one_nearest_to_the_teacher_is_returned():
    model = teacher()
    rows = [{"input_ids": torch.randint(5, 60, (12,), generator=torch.Generator().manual_seed(i))} for i in range(32)]
    sizes = found(model, 0.5)[:2]
    batches = list(batches_for(model, rows, seed=1))
    distances = [
        sum(kl(student(**batch).logits, model(**batch).logits) for batch in batches)
        for student in (make_student(model, *size, data=rows) for size in sizes)
    ]
    best = sizes[distances.index(min(distances))]
    student = make_student(model, parameters=0.5, candidates=2, data=rows)
    assert (student.config.n_layer, student.config.n_embd) == best


@torch.no_grad()
def kl(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    p, q = theirs.log_softmax(-1), ours.log_softmax(-1)
    return (p.exp() * (p - q)).sum().item()


def test_queries_stay_in_whole_groups_or_in_a_part_of_one():
    """Of 4 queries in 2 groups, 3 would be one group that is larger than the teacher's are."""
    model = tiny.tiny_llama(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    sizes = {size for share in (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9) for size in found(model, share)}
    assert {width for _, width in sizes} == {8, 16, 32}
    for depth, width in sorted(sizes):
        assert make_student(model, depth, width, channels="weights").config.hidden_size == width


def test_named_layers_are_the_depth_of_a_budget():
    student = make_student(teacher(), layers=[0, 2], parameters=0.5, channels="weights")
    assert student.cut.layers == [0, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 15}, "`hidden_size` is 15, but must be a multiple of the teacher's head size, 8"),
        ({"hidden_size": "wide"}, "`hidden_size` is 'wide', but must be a whole number"),
        ({"layers": [0, 9]}, r"`layers` is \[0, 9\], but must be a rising list of layer indices from 0 to 3"),
        ({"layer_size": 3}, "`layer_size` is no field of GPT2Config"),
        ({"candidates": 0}, "`candidates` is 0, but must be at least 1"),
        ({"candidates": 1.5}, "`candidates` is 1.5, but must be a whole number"),
        ({"candidates": 2, "parameters": None}, "`candidates` is 2, but without `parameters` there is one size"),
    ],
)
def test_what_does_not_go_with_a_budget_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_student(teacher(), **{"parameters": 0.5, **changes})


def test_candidates_need_data():
    with pytest.raises(ValueError, match="`candidates` is 2, which needs `data`"):
        make_student(teacher(), parameters=0.5, candidates=2)
