"""Sizes that meet a budget of parameters, against all students that there are."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from hf_blockkd import find_layer_stack, make_student
from hf_blockkd.models.flops import forward_flops
from hf_blockkd.routing.dummy_inputs import dummy_inputs
from hf_blockkd.students.budget import Budget, sizes_within

from ..helpers import tiny_models as tiny


def teacher() -> PreTrainedModel:
    return tiny.tiny_gpt2(n_embd=32, n_layer=4, n_head=4, n_inner=64)


def count(depth: int, width: int, inner: int | None = None) -> int:
    sizes = {"n_embd": width, "n_layer": depth, "n_head": width // 8, "n_inner": inner or 2 * width}
    return tiny.tiny_gpt2(**sizes).num_parameters()


def found(model: PreTrainedModel, parameters: float, **given: int) -> list[tuple[int, int]]:
    sizes = next(sizes_within(model, find_layer_stack(model), Budget.of_parameters(parameters), **given))
    return [(fit.sizes["num_layers"], fit.sizes["hidden_size"]) for fit in sizes]


@pytest.mark.parametrize("share", [0.1, 0.25, 0.3, 0.5, 0.6, 0.8])
def test_the_first_is_the_most_balanced_and_nearest_of_the_widest_and_of_those_that_neurons_fill(share):
    model = teacher()
    limit, widths = share * model.num_parameters(), (8, 16, 24, 32)

    def rating(depth: int, width: int, inner: int) -> float:
        kept = depth / 4, width / 32, inner / 64
        return max(kept) - min(kept) + 2 * (1 - count(depth, width, inner) / limit)

    tried = []
    for depth in range(1, 5):
        fitting = [width for width in widths if count(depth, width) <= limit]
        if fitting:
            tried.append((depth, fitting[-1], 2 * fitting[-1]))
        if fitting and count(depth, fitting[-1]) < 0.9 * limit:
            for width in (fitting[-1], *widths[len(fitting) : len(fitting) + 1]):
                inner = [own for own in range(4, 65, 4) if count(depth, width, own) <= limit]
                tried += [(depth, width, inner[-1])] if inner else []
    first = next(sizes_within(model, find_layer_stack(model), Budget.of_parameters(share)))[0]
    inner = first.sizes.get("n_inner", 2 * first.sizes["hidden_size"])
    wanted = min(tried, key=lambda one: rating(*one))
    assert (first.sizes["num_layers"], first.sizes["hidden_size"], inner) == wanted
    assert first.number == count(*wanted) <= limit


def test_neurons_fill_what_whole_heads_would_leave(caplog):
    """Of two heads one is kept, which would leave more than half of this budget."""
    model = tiny.tiny_vit(hidden_size=32, num_attention_heads=2, intermediate_size=128, num_hidden_layers=4)
    for share in (0.3, 0.5):
        student = make_student(model, parameters=share, channels="weights")
        assert 0.9 * share < student.num_parameters() / model.num_parameters() <= share
    assert "sizes come in steps" not in caplog.text


def test_what_is_left_of_a_budget_is_said_with_the_step_that_is_too_large(caplog):
    model = teacher()
    student = make_student(model, parameters=0.9, num_layers=2, hidden_size=16, channels="weights")
    whole = model.num_parameters()
    message = (
        f"`parameters` is 0.9, which is {0.9 * whole:,.0f} parameters; the student has {student.num_parameters():,} ("
    )
    assert message in caplog.text
    assert "sizes come in steps" not in caplog.text  # both were given
    student = make_student(model, parameters=0.99, num_layers=4, n_inner=64, channels="weights")
    assert student.config.n_embd == 24
    assert f"steps: with num_layers=4, hidden_size=32 it would have {whole:,}." in caplog.text


def test_a_number_of_parameters_is_a_budget_as_well_as_a_share():
    model = teacher()
    assert found(model, model.num_parameters() // 4) == found(model, 0.25)


def test_what_is_given_stays():
    model = teacher()
    assert {depth for depth, _ in found(model, 0.4, num_layers=1)} == {1}
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
    smallest = tiny.tiny_gpt2(n_embd=4, n_layer=1, n_head=4, n_inner=8).num_parameters()
    message = rf"`parameters` is 50, which is 50 parameters, but the smallest student .* has {smallest:,}; raise"
    with pytest.raises(ValueError, match=message):
        make_student(teacher(), parameters=50)


def rows(number: int = 64) -> list[dict[str, torch.Tensor]]:
    return [
        {"input_ids": torch.randint(5, 60, (12,), generator=torch.Generator().manual_seed(i))} for i in range(number)
    ]


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
        ({"candidates": 2, "parameters": None}, "`candidates` is 2, but without `parameters` or `flops` there is one"),
        ({"candidates": 2}, "`candidates` is 2, which needs `data`"),
        ({"heal_steps": 2}, "`heal_steps` is 2, which needs `data`"),
        ({"heal_steps": -1}, "`heal_steps` is -1, but must be at least 0"),
        ({"flops": 0.5}, "`parameters` is 0.5 and `flops` is 0.5; give one of them"),
    ],
)
def test_what_does_not_go_with_a_budget_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_student(teacher(), **{"parameters": 0.5, **changes})


# ---- FLOPs ----


@torch.no_grad()
def flops(depth: int, width: int, length: int) -> int:
    """Of the real model, counted by torch: a product in eager attention is one of matrices, like all others."""
    sizes = {"n_embd": width, "n_layer": depth, "n_head": width // 8, "n_inner": 2 * width}
    model = tiny.tiny_gpt2(**sizes, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.ones(1, length, dtype=torch.long))
    return counter.get_total_flops()


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.8])
def test_a_budget_of_flops_is_met_by_the_widest_that_fit_on_one_row(share):
    model, inputs = teacher(), {"input_ids": torch.ones(1, 12, dtype=torch.long)}
    sizes = list(itertools.product(range(1, 5), (8, 16, 24, 32)))
    fitting = [size for size in sizes if flops(*size, length=12) <= share * flops(4, 32, length=12)]
    widest = [max(one for one in fitting if one[0] == depth) for depth in {depth for depth, _ in fitting}]
    way = next(sizes_within(model, find_layer_stack(model), Budget.of_flops(share, inputs)))
    whole = {(fit.sizes["num_layers"], fit.sizes["hidden_size"]) for fit in way if "n_inner" not in fit.sizes}
    assert whole == set(widest)
    student = make_student(model, flops=share, data=rows(16), fit=False)
    sizes = {"num_layers": student.config.n_layer, "hidden_size": student.config.n_embd}
    assert way[0].sizes == sizes | ({"n_inner": student.config.n_inner} if "n_inner" in way[0].sizes else {})
    assert way[0].number == forward_flops(student, inputs) <= share * flops(4, 32, length=12)


def test_without_data_flops_are_those_of_an_example_that_is_made_up():
    model = teacher()
    student = make_student(model, flops=0.5, channels="weights")
    example = dummy_inputs(model, batch_size=1)
    assert 0 < forward_flops(student, example) <= 0.5 * forward_flops(model, example)


def test_a_number_of_flops_is_a_budget_as_well_as_a_share():
    model = teacher()
    whole = forward_flops(model, dummy_inputs(model, batch_size=1))
    one, other = (make_student(model, flops=value, channels="weights") for value in (0.4, int(0.4 * whole)))
    assert one.config.to_dict() == other.config.to_dict()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (1.0, r"`flops` is 1.0, but must be a share of the teacher's [0-9,]+ FLOPs, such as 0.25, or a smaller number"),
        (50, r"`flops` is 50, which is 50 FLOPs, but the smallest student of GPT2LMHeadModel .* has [0-9,]+; raise"),
    ],
)
def test_a_budget_of_flops_that_is_none_or_met_by_nothing_is_refused(value, message):
    with pytest.raises(ValueError, match=message):
        make_student(teacher(), flops=value)


# ---- Models whose heads cannot go ----


@pytest.mark.parametrize(
    ("build", "kept"),
    [
        (lambda: tiny.build("Bloom", "CausalLM", {**tiny.TEXT, "n_layer": 3, "n_head": 2}, {}), "n_head"),
        (
            lambda: tiny.build("Mpt", "CausalLM", {"d_model": 16, "n_heads": 2, "n_layers": 3, "vocab_size": 64}, {}),
            "n_heads",
        ),
    ],
)
def test_where_heads_cannot_go_they_become_smaller(build, kept, caplog):
    model = build()
    student = make_student(model, num_layers=3, parameters=0.5, channels="weights")
    assert student.num_parameters() <= 0.5 * model.num_parameters()
    assert getattr(student.config, kept) == 2
    assert student.config.hidden_size < 16
    assert "The most balanced sizes within `parameters` are none to cut to. " in caplog.text
    assert "newly" not in caplog.text


def test_groups_of_queries_go_as_a_whole_under_any_name():
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_kv_heads": 2, "new_decoder_architecture": True}
    model = tiny.build("Falcon", "CausalLM", tiny.TEXT, sizes)
    for share in (0.2, 0.4, 0.6, 0.8):
        student = make_student(model, parameters=share, channels="weights")
        assert student.num_parameters() <= share * model.num_parameters()
        assert student.config.num_attention_heads % student.config.num_kv_heads == 0


def test_a_model_of_stages_is_cut_in_what_a_budget_can_set():
    model = tiny.tiny_resnet()
    with pytest.raises(ValueError, match=r"`parameters` is 0.5, which is .* the smallest student of ResNet.* has "):
        make_student(model, parameters=0.5)
