"""Students of benchmarks that are no smaller teacher: weights of few values, another family, neurons that spike."""

import json
import sys
from pathlib import Path

import pytest
import torch
from arguments import ModelArguments
from task import new_student
from transformers import AutoModelForImageClassification, ResNetForImageClassification

from hf_blockkd import find_layer_stack

from ..helpers.tiny_models import tiny_vit
from ..helpers.training import image_rows, make_trainer

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "benchmarks"))


@pytest.mark.parametrize(
    ("levels", "values"), [(2, [-0.5, 0.5]), (3, [-1, 0, 1]), (4, [-1.5, -0.5, 0.5, 1.5])], ids=str
)
def test_weights_are_the_nearest_of_few_values_and_gradients_pass_as_if_they_were_whole(levels, values):
    from quantized import STEPS, quantize

    model = tiny_vit()
    linear = model.vit.layers[0].mlp.fc1
    whole = linear.weight.detach().clone()
    quantize(model, levels)
    step = STEPS[levels] * whole.square().mean(1, keepdim=True).sqrt()
    grid = step[..., None] * torch.tensor(values)
    nearest = (whole[..., None] - grid).abs().argmin(-1, keepdim=True)
    assert torch.allclose(linear.weight, grid.expand(*whole.shape, -1).gather(-1, nearest)[..., 0], atol=1e-6)
    ahead = torch.randn_like(whole)
    (linear.weight * ahead).sum().backward()
    assert torch.equal(linear.parametrizations.weight.original.grad, ahead)
    assert not hasattr(model.classifier, "parametrizations")


def test_the_steps_round_a_normal_variable_with_the_least_error():
    from quantized import STEPS, Rounded

    row = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(20000) + 0.5) / 20000)[None]
    for levels, step in STEPS.items():
        errors = []
        for factor in (0.97, 1.0, 1.03):
            rounded = Rounded(levels)
            rounded.step = factor * step
            errors.append((rounded(row) - row).square().mean())
        assert min(errors) == errors[1]


def test_so_many_levels_have_no_step():
    from quantized import quantize

    with pytest.raises(ValueError, match="`levels` is 5; choose one of 2, 3, 4, 8, 16"):
        quantize(tiny_vit(), 5)


def script(**config):
    return ModelArguments(teacher="teacher", fresh=True, student_config=json.dumps(config))


def test_a_fresh_student_of_another_family_has_the_teachers_classes():
    teacher, fields = tiny_vit(), {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1]}
    own = script(model_type="resnet", **fields)
    student = new_student(own, teacher, AutoModelForImageClassification, {})
    assert isinstance(student, ResNetForImageClassification)
    assert student.config.id2label == teacher.config.id2label
    assert (student.config.num_channels, student.config.hidden_act) == (teacher.config.num_channels, "relu")
    with pytest.raises(ValueError, match=r"`patch_size` is no field"):
        new_student(script(model_type="resnet", patch_size=2), teacher, AutoModelForImageClassification, {})
    own.fresh = False
    with pytest.raises(ValueError, match=r"names the model type 'resnet', but a student that is cut .* is a 'vit'"):
        new_student(own, teacher, AutoModelForImageClassification, {})


def test_spiking_students_learn_through_the_teachers_layers_from_their_rates(tmp_path):
    pytest.importorskip("snntorch")
    import spiking  # noqa: F401

    torch.manual_seed(0)
    teacher, rows = tiny_vit(), image_rows(8)
    own = script(model_type="spiking", hidden_sizes=[8, 8], strides=[1, 1], patch_size=2)
    student = new_student(own, teacher, AutoModelForImageClassification, {}).train()
    pixels = torch.stack([row["pixel_values"] for row in rows])
    handed_on = []
    for layer in find_layer_stack(student).layers:
        layer.register_forward_hook(lambda module, args, output: handed_on.append(output))
    student(pixels)
    for rates, spikes in handed_on:
        assert spikes.shape[0] == 4
        assert set(spikes.unique().tolist()) == {0.0, 1.0}
        assert torch.equal(rates, spikes.mean(0))
    # Labels and logits of the student itself cannot move a connector: stones can.
    trainer = make_trainer(tmp_path, student, teacher, rows, max_steps=1, stepping_stones="all", state_weight=0.0)
    before = [connector.width.weight.detach().clone() for connector in trainer.connectors]
    trainer.train()
    for connector, weight in zip(trainer.connectors, before, strict=True):
        assert not torch.equal(connector.width.weight, weight)
