"""Gradients pass a teacher in float16 as they pass one in float32, however many labels a window has."""

import copy

import pytest
import torch

from hf_blockkd.pairing.gradient_scale import GradientScale

from ..helpers.tiny_models import tiny_bert, tiny_llama
from ..helpers.training import batch_of, make_trainer, text_rows, token_rows


def connector_gradients(folder, student, teacher, rows, num_items, **settings):
    trainer = make_trainer(folder, copy.deepcopy(student), teacher, stepping_stones="all", **settings)
    loss = trainer.compute_loss(trainer.model.train(), batch_of(rows), num_items_in_batch=torch.tensor(num_items))
    loss.backward()
    return [parameter.grad * num_items for parameter in trainer.connectors.parameters()]


@pytest.mark.parametrize("num_items", [64, 2**17, 2**21])
@pytest.mark.parametrize("settings", [{}, {"loss_chunk_size": 5}, {"objective": "fcfd"}], ids=str)
@pytest.mark.parametrize(("build", "rows"), [(tiny_llama, token_rows), (tiny_bert, text_rows)])
def test_a_teacher_in_float16_loses_no_gradient(tmp_path, build, rows, settings, num_items):
    dropout = {} if build is tiny_llama else {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    student, teacher = build(num_hidden_layers=2, hidden_size=12, num_attention_heads=3, **dropout), build()
    half = copy.deepcopy(teacher).half()
    expected = connector_gradients(tmp_path, student, teacher.float(), rows(8), num_items, **settings)
    found = connector_gradients(tmp_path, student, half, rows(8), num_items, **settings)
    for gradient, reference in zip(found, expected, strict=True):
        assert (gradient - reference).norm() <= 2e-2 * reference.norm()


def test_the_scale_changes_no_bit_in_float32():
    plain, scaled = (torch.randn(5, requires_grad=True, generator=torch.Generator().manual_seed(0)) for _ in range(2))
    weight = torch.randn(5)
    (plain * weight).tanh().sum().div(1000).backward()
    scale = GradientScale(torch.tensor(512.0))
    scale.leave((scale.enter(scaled) * weight).tanh()).sum().div(1000).backward()
    assert torch.equal(plain.grad, scaled.grad)


def test_what_else_uses_the_states_gets_its_gradient_unscaled():
    states = torch.ones(3, requires_grad=True)
    scale = GradientScale(torch.tensor(64.0))
    scale.leave(scale.enter(states) * 2.0).sum().backward(retain_graph=True)
    (states * 3.0).sum().backward()
    assert torch.equal(states.grad, torch.full((3,), 5.0))
