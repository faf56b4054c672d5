"""Gradient norms and alignments of blocks, against the same written out."""

import copy

import numpy as np
import pytest
import torch

from hf_blockkd.training.diagnostics import block_alignment, linear_cka

from ..helpers.tiny_models import tiny_bert, tiny_resnet, tiny_vit
from ..helpers.training import Gradients, batch_of, image_rows, make_trainer, step_logs, text_rows


def cka_by_kernels(x: np.ndarray, y: np.ndarray) -> float:
    """HSIC of linear kernels over the root of both with themselves, as the paper defines it."""
    n = len(x)
    centre = np.eye(n) - np.ones((n, n)) / n

    def hsic(a: np.ndarray, b: np.ndarray) -> float:
        return np.trace(a @ a.T @ centre @ b @ b.T @ centre) / (n - 1) ** 2

    return hsic(x, y) / np.sqrt(hsic(x, x) * hsic(y, y))


@pytest.mark.parametrize("shapes", [((9, 3), (9, 5)), ((4, 7), (4, 6))], ids=["many examples", "many features"])
def test_linear_cka_is_that_of_the_paper(shapes):
    x, y = (torch.randn(shape) for shape in shapes)
    assert linear_cka(x, y) == pytest.approx(cka_by_kernels(x.double().numpy(), y.double().numpy()), rel=1e-6)


def test_linear_cka_sees_neither_rotation_nor_scale_nor_shift():
    x = torch.randn(20, 6)
    rotation = torch.linalg.qr(torch.randn(6, 6)).Q
    assert linear_cka(x, 3 * x @ rotation + 5) == pytest.approx(1.0, abs=1e-6)
    assert linear_cka(x, torch.ones(20, 2)) == 0.0


@pytest.mark.parametrize(("build", "rows"), [(tiny_vit, image_rows), (tiny_bert, text_rows)], ids=["vit", "bert"])
def test_a_copy_of_the_teacher_is_wholly_aligned(tmp_path, build, rows):
    teacher = build()
    trainer = make_trainer(tmp_path, copy.deepcopy(teacher), teacher)
    trainer.model.eval()
    alignment = block_alignment(trainer.pair, [batch_of(rows(8))])
    assert alignment == {1: pytest.approx(1.0, abs=1e-6), 2: pytest.approx(1.0, abs=1e-6)}


def test_maps_are_averaged_over_the_image_wherever_their_channels_are(tmp_path):
    teacher, student = tiny_vit(), tiny_resnet()
    trainer = make_trainer(tmp_path, student, teacher, num_blocks=2)
    trainer.model.eval()
    batch = batch_of(image_rows(8))
    alignment = block_alignment(trainer.pair, [batch])
    with torch.no_grad():
        ours = student(batch["pixel_values"], output_hidden_states=True).hidden_states[-1].mean((2, 3))
        theirs = []
        handle = trainer.pair.stones.teacher_stack.layers[-1].register_forward_hook(
            lambda layer, args, output: theirs.append(output if isinstance(output, torch.Tensor) else output[0])
        )
        teacher(batch["pixel_values"])
        handle.remove()
    expected = cka_by_kernels(ours.double().numpy(), theirs[0].mean(1).double().numpy())
    assert alignment[2] == pytest.approx(expected, rel=1e-5)


def test_padding_takes_no_part_in_the_alignment(tmp_path):
    teacher, student = tiny_bert(), tiny_bert(hidden_size=8)
    trainer = make_trainer(tmp_path, student, teacher)
    trainer.model.eval()
    rows = text_rows(6)
    padded = [{**row, "input_ids": row["input_ids"].clone()} for row in rows]
    for row in padded:
        row["input_ids"][row["attention_mask"] == 0] = 5
    assert any(not torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(rows, padded, strict=True))
    assert block_alignment(trainer.pair, [batch_of(padded)]) == block_alignment(trainer.pair, [batch_of(rows)])


def test_gradient_norms_are_those_of_the_blocks_at_logged_steps(tmp_path):
    gradients = Gradients()
    student = tiny_vit(num_hidden_layers=3)
    settings = {"max_steps": 4, "logging_steps": 2, "max_grad_norm": 0.0}
    trainer = make_trainer(tmp_path, student, tiny_vit(), image_rows(), callbacks=[gradients], **settings)
    trainer.train()
    logs = step_logs(trainer)
    assert [log["step"] for log in logs] == [2, 4]
    for log in logs:
        found = gradients.steps[log["step"] - 1]
        for block, layers in ((1, (0,)), (2, (1, 2))):
            names = [name for name in found if any(f".layers.{i}." in name or f".layer.{i}." in name for i in layers)]
            assert names
            expected = torch.cat([found[name].flatten() for name in names]).double().norm().item()
            assert log[f"grad_norm_block_{block}"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("most", [1e-3, 1e3], ids=["clipped", "below"])
def test_gradient_norms_are_those_before_clipping(most, tmp_path):
    teacher, student = tiny_vit(), tiny_vit(hidden_size=8)
    logs = []
    for max_grad_norm in (0.0, most):
        settings = {"max_steps": 1, "logging_steps": 1, "max_grad_norm": max_grad_norm}
        trainer = make_trainer(tmp_path, copy.deepcopy(student), teacher, image_rows(), **settings)
        trainer.train()
        logs.append({key: value for key, value in step_logs(trainer)[0].items() if key.startswith("grad_norm")})
    assert {"grad_norm", "grad_norm_block_1", "grad_norm_block_2"} == logs[0].keys()
    assert logs[1] == pytest.approx(logs[0], rel=1e-5)
    assert min(logs[0].values()) > 1e-3
