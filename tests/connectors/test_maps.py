from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_blockkd.connectors.attached import (
    CONNECTORS_NAME,
    MODULE_NAME,
    attach,
    detached,
    load_connectors,
    save_connectors,
    without_connectors,
)
from hf_blockkd.connectors.maps import ResidualConnector, make_connector, make_connectors

from ..helpers.tiny_models import WIDTH, tiny_bert


@pytest.mark.parametrize(
    ("kind", "widths"),
    [
        ("auto", (6, 6)),
        ("auto", (6, 10)),
        ("linear", (6, 10)),
        ("linear", (6, 6)),
        ("mlp", (6, 10)),
        ("identity", (6, 6)),
    ],
)
def test_a_connector_maps_the_last_dimension_and_trains(kind, widths):
    connector = make_connector(kind, *widths)
    states = torch.randn(2, 3, widths[0], requires_grad=True)
    out = connector(states)
    assert out.shape == (2, 3, widths[1])
    (out * torch.randn_like(out)).sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in connector.parameters())
    assert states.grad.abs().max() > 0


@pytest.mark.parametrize("kind", ["auto", "identity"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_identity_connector_starts_as_the_identity_to_the_bit(kind, dtype):
    connector = make_connector(kind, 16, 16).to(dtype)
    states = torch.randn(4, 5, 16, dtype=dtype) * 100
    assert torch.equal(connector(states), states)


def test_a_residual_connector_adds_an_affine_map():
    connector = ResidualConnector(3, 3)
    with torch.no_grad():
        connector.weight.copy_(torch.arange(9.0).view(3, 3))
        connector.bias.copy_(torch.tensor([10.0, 20.0, 30.0]))
    # Each output is its input plus a row of the matrix times the input plus the bias.
    expected = [1 + (0 + 2 + 6) + 10, 2 + (3 + 8 + 15) + 20, 3 + (6 + 14 + 24) + 30]
    assert connector(torch.tensor([1.0, 2.0, 3.0])).tolist() == expected


def test_kinds_have_the_modules_that_the_names_say():
    assert type(make_connector("linear", 4, 4)) is nn.Linear
    assert type(make_connector("auto", 4, 4)) is ResidualConnector
    assert type(make_connector("auto", 4, 5)) is nn.Linear
    shapes = [tuple(parameter.shape) for parameter in make_connector("mlp", 4, 6).parameters()]
    assert shapes == [(6, 4), (6,), (6, 6), (6,)]


def test_an_mlp_is_not_linear():
    mlp = make_connector("mlp", 4, 6)
    x = torch.randn(1, 4)
    assert not torch.allclose(mlp(2 * x) - mlp(torch.zeros_like(x)), 2 * (mlp(x) - mlp(torch.zeros_like(x))))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="student's states are 4 wide and the teacher's 6; use connector='linear'"):
        make_connector("identity", 4, 6)
    with pytest.raises(ValueError, match="Unknown connector 'conv'; choose one of 'auto'"):
        make_connector("conv", 4, 4)


def test_connectors_follow_from_their_seed_and_leave_the_global_random_state():
    before = torch.get_rng_state()
    first, again, other = (make_connectors("linear", [4, 4], [6, 6], seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first[0].weight, again[0].weight)
    assert not torch.equal(first[0].weight, other[0].weight)
    assert not torch.equal(first[0].weight, first[1].weight)


def test_every_stone_gets_a_connector_of_its_own_widths():
    connectors = make_connectors("auto", [4, 8], [8, 8], seed=0)
    assert [type(connector) for connector in connectors] == [nn.Linear, ResidualConnector]


def test_saved_connectors_come_back_to_the_bit(tmp_path):
    saved, loaded = make_connectors("mlp", [4, 8], [8, 8], seed=0), make_connectors("mlp", [4, 8], [8, 8], seed=1)
    save_connectors(saved, tmp_path)
    assert (tmp_path / CONNECTORS_NAME).is_file()
    load_connectors(loaded, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), loaded.parameters(), strict=True))


def test_missing_or_foreign_connectors_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"connectors\.safetensors is missing"):
        load_connectors(make_connectors("linear", [4], [6], seed=0), tmp_path)
    save_connectors(make_connectors("linear", [4], [6], seed=0), tmp_path)
    for other in (([4, 4], [6, 6]), ([4], [5])):
        with pytest.raises(ValueError, match="holds connectors of another run"):
            load_connectors(make_connectors("linear", *other, seed=0), tmp_path)


def test_attached_connectors_train_with_the_student_and_stay_out_of_its_weight_file(tmp_path):
    student = tiny_bert()
    own_keys = set(student.state_dict())
    connectors = make_connectors("linear", [WIDTH], [6], seed=0)
    attach(connectors, student)
    assert {id(parameter) for parameter in connectors.parameters()} <= {id(p) for p in student.parameters()}
    with_connectors = student.state_dict()
    assert set(with_connectors) - own_keys == {f"{MODULE_NAME}.0.weight", f"{MODULE_NAME}.0.bias"}
    assert set(without_connectors(with_connectors)) == own_keys

    student.save_pretrained(tmp_path)
    loaded, info = type(student).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert all(torch.equal(value, student.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_attaching_ignores_keys_for_this_model_alone():
    student, bystander = tiny_bert(), tiny_bert()
    attach(make_connectors("linear", [WIDTH], [6], seed=0), student)
    ignored = getattr(bystander, "_keys_to_ignore_on_save", None) or ()
    assert not any(MODULE_NAME in key for key in ignored)


def test_detached_hides_the_connectors_and_brings_them_back_even_after_an_error():
    student = tiny_bert()
    connectors = make_connectors("linear", [WIDTH], [6], seed=0)
    attach(connectors, student)

    def fail_inside() -> None:
        with detached(student):
            assert not any(name.startswith(MODULE_NAME) for name in student.state_dict())
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()
    assert getattr(student, MODULE_NAME) is connectors


def test_connectors_of_a_student_that_was_cut_begin_with_its_channels_in_their_places():
    there, back = (
        make_connectors("auto", [ours], [theirs], 0, channels=[1, 3, 4])[0] for ours, theirs in [(3, 6), (6, 3)]
    )
    states = torch.randn(2, 5, 3)
    placed = torch.zeros(2, 5, 6)
    placed[..., [1, 3, 4]] = states
    assert torch.equal(there(states), placed)
    assert torch.equal(back(placed), states)


def test_connectors_of_other_widths_than_the_cut_are_drawn():
    cut, drawn = (make_connectors("linear", [4], [6], 0, channels)[0] for channels in ([1, 3, 4], None))
    assert torch.equal(cut.weight, drawn.weight)
