"""Which stones train: some of them, a sample, or none at all, which is plain knowledge distillation."""

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import Trainer

from .tiny_models import tiny_bert, tiny_vit
from .training import (
    PLAIN_SGD,
    Gradients,
    assert_same_state,
    differs,
    image_rows,
    make_trainer,
    max_difference,
    state_of,
    step_logs,
    text_rows,
)

DROPOUT = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}


@pytest.mark.parametrize(("chosen", "trained"), [([2], {2}), ([1, 3], {1, 3}), ("1,3", {1, 3}), ("none", set())])
def test_only_the_listed_stones_train_and_are_logged(tmp_path, chosen, trained):
    trainer = make_trainer(
        tmp_path, tiny_vit(), tiny_vit(), image_rows(4), stepping_stones=chosen, num_blocks=3, max_steps=2
    )
    before = [state_of(connector) for connector in trainer.connectors]
    trainer.train()
    moved = {i for i, old in enumerate(before, 1) if differs(state_of(trainer.connectors[i - 1]), old)}
    assert moved == trained
    logs = step_logs(trainer)[-1]
    assert {name for name in logs if name.startswith("stone_")} == {
        f"stone_{i}/{part}" for i in trained for part in ("task", "distill")
    }


# ---- Plain knowledge distillation, and samples ----


class PlainKD(Trainer):
    """The textbook: cross-entropy, and KL at a temperature."""

    def __init__(self, teacher, temperature, **kwargs):
        super().__init__(**kwargs)
        self.teacher, self.temperature = teacher, temperature
        self.loss_is_scaled_for_ga = True

    def _get_num_items_in_batch(self, batch_samples, device):
        return sum(batch["labels"].numel() for batch in batch_samples)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        with torch.no_grad():
            target = (self.teacher(**inputs).logits / self.temperature).log_softmax(-1)
        logits = model(**inputs).logits
        task = F.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch
        rows = F.kl_div((logits / self.temperature).log_softmax(-1), target, reduction="none", log_target=True).sum(-1)
        return task + (rows * self.temperature**2).sum() / num_items_in_batch


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(("builder", "rows"), [(tiny_vit, image_rows), (tiny_bert, text_rows)], ids=["vit", "bert"])
def test_without_stones_it_is_plain_kd_bit_for_bit(tmp_path, builder, rows, accumulation):
    teacher, student = builder(**DROPOUT), builder(num_hidden_layers=2, **DROPOUT)
    other = copy.deepcopy(student)
    settings = {"max_steps": 5, "gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 3}
    trainer = make_trainer(
        tmp_path, student, teacher, rows(10), stepping_stones="none", temperature=3.0, learning_rate=1e-2, **settings
    )
    trainer.train()
    plain = PlainKD(teacher=teacher, temperature=3.0, model=other, args=trainer.args, train_dataset=rows(10))
    plain.train()
    trained = {n: p for n, p in state_of(student).items() if not n.startswith("blockwise_connectors.")}
    assert_same_state(trained, state_of(other))
    ours, theirs = ([entry["loss"] for entry in step_logs(t)] for t in (trainer, plain))
    assert ours == theirs


def drawn_stones(trainer):
    return [{int(n[6]) for n in entry if n.startswith("stone_")} for entry in step_logs(trainer)]


def test_samples_follow_from_the_seed_and_the_step_alone(tmp_path):
    def draws(rows, **settings):
        models = (tiny_vit(num_hidden_layers=3), tiny_vit(num_hidden_layers=4))
        trainer = make_trainer(tmp_path, *models, rows, stepping_stones="sample", num_blocks=3, **settings)
        trainer.train()
        return drawn_stones(trainer)

    first = draws(image_rows(8), max_steps=30)
    assert all(len(stones) == 1 for stones in first)
    counts = {i: first.count({i}) for i in (1, 2, 3)}
    assert min(counts.values()) >= 4, counts
    again = draws(image_rows(5, seed=1), max_steps=12, gradient_accumulation_steps=2, per_device_train_batch_size=2)
    assert again == first[:12]
    assert draws(image_rows(8), max_steps=12, seed=7) != first[:12]
    assert {len(stones) for stones in draws(image_rows(8), max_steps=4, stones_per_step=2)} == {2}


def test_a_sampled_gradient_is_an_unbiased_estimate_of_that_of_all_stones(tmp_path):
    student, teacher, rows = tiny_vit(), tiny_vit(num_hidden_layers=4), image_rows(4)

    def gradients(**settings):
        recorder = Gradients()
        trainer = make_trainer(
            tmp_path,
            copy.deepcopy(student),
            teacher,
            rows,
            callbacks=[recorder],
            num_blocks=3,
            **{**PLAIN_SGD, "learning_rate": 0.0},
            **settings,
        )
        trainer.train()
        return trainer, recorder.steps

    _, (of_all,) = gradients(max_steps=1)
    trainer, sampled = gradients(stepping_stones="sample", max_steps=16)
    by_stone = {next(iter(drawn)): step for drawn, step in zip(drawn_stones(trainer), sampled, strict=True)}
    assert set(by_stone) == {1, 2, 3}
    mean = {name: sum(step[name] for step in by_stone.values()) / 3 for name in of_all}
    assert max_difference(mean, of_all) < 1e-6
    assert max_difference(by_stone[1], of_all) > 1e-2
