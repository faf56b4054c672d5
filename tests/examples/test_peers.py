"""What the step benchmark compares: recipes of others do what they say, and all shapes take a step."""

import sys
from pathlib import Path

import pytest
import torch
from benchmarks.peers import GivenVectors, VectorRecipe
from transformers import TrainingArguments

from ..helpers.tiny_models import tiny_bert
from ..helpers.training import batch_of, text_rows

BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"


def test_vectors_are_compared_by_the_squared_error_of_means_over_what_is_no_padding(tmp_path):
    student, teacher = tiny_bert(None, num_hidden_layers=2).eval(), tiny_bert(None).eval()
    batch = batch_of(text_rows(3))
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")

    def vectors(model):
        states = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        return torch.stack([one[mask > 0].mean(0) for one, mask in zip(states, batch["attention_mask"], strict=True)])

    ours = vectors(student)
    loss = VectorRecipe(teacher=teacher, model=student, args=args).compute_loss(student, batch)
    assert loss.item() == pytest.approx((ours - vectors(teacher)).square().mean().item(), rel=1e-5)
    # Without a teacher, a step costs what it does with vectors that were made beforehand.
    alone = GivenVectors(model=student, args=args).compute_loss(student, batch)
    assert alone.item() == pytest.approx(ours.square().mean().item(), rel=1e-5)


def test_a_shape_of_vectors_takes_a_step_with_every_trainer(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    import shapes
    import step_time

    monkeypatch.setattr(step_time, "DEVICE", "cpu")
    shape = shapes.Shape(
        "tiny",
        "vectors",
        lambda is_teacher: tiny_bert(None, num_hidden_layers=4 if is_teacher else 2),
        lambda: {**batch_of(text_rows(4)), "labels": torch.full((4,), -100)},
        num_blocks=2,
    )
    batch = shape.make_batch()
    trainers = step_time.make_trainers(shape, batch, ["plain KD", "plain KD, cached", "last stone"], str(tmp_path))
    for trainer in trainers.values():
        step_time.step(trainer, batch, 0)  # the first one checks more
    flops = {name: step_time.count_flops(trainer, batch) for name, trainer in trainers.items()}
    assert flops["hf_blockkd, plain KD"] == flops["docs recipe"]
    assert flops["hf_blockkd, plain KD, cached"] == flops["student alone"] < flops["docs recipe"]
