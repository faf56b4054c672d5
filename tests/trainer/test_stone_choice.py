"""Which stones train: some of them, a sample, or none at all, which is plain knowledge distillation."""

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback

from hf_blockkd.objectives.sampling import draw_stones, sampling_shares

from ..helpers.tiny_models import tiny_bert, tiny_deberta, tiny_llama, tiny_vit
from ..helpers.training import (
    PLAIN_SGD,
    Gradients,
    assert_same_state,
    batch_of,
    differs,
    image_rows,
    make_trainer,
    max_difference,
    state_of,
    step_logs,
    text_rows,
    token_rows,
    with_connectors,
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
    assert min(counts.values()) >= 1, counts
    assert counts[1] < counts[3], counts
    again = draws(image_rows(5, seed=1), max_steps=12, gradient_accumulation_steps=2, per_device_train_batch_size=2)
    assert again == first[:12]
    assert draws(image_rows(8), max_steps=12, seed=7) != first[:12]
    assert {len(stones) for stones in draws(image_rows(8), max_steps=4, stones_per_step=2)} == {2}


@pytest.mark.parametrize(
    ("sampling", "shares"),
    [("uniform", {1: 1 / 3, 2: 1 / 3, 3: 1 / 3}), ("weight", {1: 1 / 7, 2: 2 / 7, 3: 4 / 7})],
)
def test_a_sampled_gradient_is_an_unbiased_estimate_of_that_of_all_stones(tmp_path, sampling, shares):
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

    _, (of_all,) = gradients(stepping_stones="all", max_steps=1)
    trainer, sampled = gradients(stepping_stones="sample", stone_sampling=sampling, max_steps=30)
    by_stone = {next(iter(drawn)): step for drawn, step in zip(drawn_stones(trainer), sampled, strict=True)}
    assert set(by_stone) == {1, 2, 3}
    mean = {name: sum(share * by_stone[i][name] for i, share in shares.items()) for name in of_all}
    assert max_difference(mean, of_all) < 1e-6
    assert max_difference(by_stone[1], of_all) > 1e-2


# ---- Examples shared out among the stones ----


def classes_loss(logits, target, labels, temperature):
    kl = F.kl_div(
        (logits / temperature).log_softmax(-1), (target / temperature).log_softmax(-1), log_target=True, reduction="sum"
    )
    return F.cross_entropy(logits, labels, reduction="sum", ignore_index=-100) + kl * temperature**2


@pytest.mark.parametrize(
    ("builder", "rows", "settings"),
    [
        (tiny_vit, image_rows, {}),
        (tiny_vit, image_rows, {"stone_fraction": 0.5, "stones_every": 2}),
        (tiny_vit, image_rows, {"stepping_stones": "all", "stone_fraction": 0.5}),
        (tiny_vit, image_rows, {"stepping_stones": "all", "stones_every": 2}),
        (tiny_bert, text_rows, {"stone_sampling": "uniform"}),
        (tiny_deberta, text_rows, {"stone_sampling": "cost"}),
    ],
)
def test_a_stone_learns_from_its_own_examples_with_the_weight_that_makes_up_for_the_others(
    tmp_path, builder, rows, settings
):
    """The gradient of the step is that of the whole batch's logits with every example that was not drawn left out."""
    dropout = {} if builder is tiny_vit else {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    student, teacher, rows = builder(num_hidden_layers=2, **dropout), builder(**dropout), rows(8)
    recorder = Gradients()
    config = {"stepping_stones": "share", "num_blocks": 2, "temperature": 2.0, **settings}
    trainer = make_trainer(
        tmp_path,
        student,
        teacher,
        rows,
        callbacks=[recorder],
        max_steps=2,
        per_device_train_batch_size=8,
        train_sampling_strategy="sequential",
        **{**PLAIN_SGD, "learning_rate": 0.0},
        **config,
    )
    trainer.train()
    batch = batch_of(rows)
    weights = {1: 0.5, 2: 1.0}
    first, last = trainer.block_map.teacher
    layers = {1: last - first, 2: 0}
    shares = sampling_shares(weights, layers, trainer.args.stone_sampling)
    for step, found in enumerate(recorder.steps):
        drawn = draw_stones(
            trainer.args.stepping_stones,
            weights,
            shares,
            seed=trainer.args.seed,
            step=step,
            num_examples=8,
            fraction=trainer.args.stone_fraction,
            every=trainer.args.stones_every,
        )
        assert bool(drawn) == (step % trainer.args.stones_every == 0)
        with with_connectors(trainer):
            trainer.model.zero_grad()
        labels = batch["labels"]
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        target = teacher(**inputs).logits
        loss = classes_loss(student(**inputs).logits, target, labels, 2.0)
        for i, logits in trainer.stepping_stone_logits(inputs).items():
            if i in drawn:
                some = slice(None) if drawn[i].examples is None else drawn[i].examples
                loss = loss + drawn[i].weight * classes_loss(logits[some], target[some], labels[some], 2.0)
        (loss / 8).backward()
        with with_connectors(trainer):
            expected = {name: parameter.grad for name, parameter in student.named_parameters() if name in found}
        missing = {name for name in found if expected[name] is None}
        assert all(not found[name].any() for name in missing)
        assert max((found[name] - expected[name]).abs().max().item() for name in found if name not in missing) < 1e-5


def test_shared_examples_are_logged_as_the_mean_loss_of_each_stone(tmp_path):
    student, teacher = tiny_vit(), tiny_vit()

    def mean_logs(**settings):
        trainer = make_trainer(
            tmp_path,
            copy.deepcopy(student),
            teacher,
            image_rows(8),
            max_steps=60,
            per_device_train_batch_size=8,
            logging_steps=60,
            num_blocks=2,
            **{**PLAIN_SGD, "learning_rate": 0.0},
            **settings,
        )
        trainer.train()
        return step_logs(trainer)[-1]

    every, shared = mean_logs(), mean_logs(stepping_stones="share")
    for name in ("loss", "loss_task", "loss_distill", "stone_1/task", "stone_2/distill"):
        assert shared[name] == pytest.approx(every[name], rel=0.1), name


def test_a_schedule_of_stones_is_a_callback_that_changes_the_arguments(tmp_path):
    class FewLate(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            args.stepping_stones = ["all", "sample", [2], "none"][state.global_step]

    trainer = make_trainer(tmp_path, tiny_vit(), tiny_vit(), image_rows(8), callbacks=[FewLate()], max_steps=4)
    trainer.train()
    assert [len(stones) for stones in drawn_stones(trainer)] == [2, 1, 1, 0]
    assert drawn_stones(trainer)[2] == {2}


def test_examples_that_are_several_sequences_are_not_shared_out(tmp_path):
    rows = [{"input_ids": torch.randint(3, 60, (3, 6)), "labels": torch.tensor(i % 3)} for i in range(4)]
    trainer = make_trainer(
        tmp_path, tiny_bert("MultipleChoice"), tiny_bert("MultipleChoice"), rows, stepping_stones="share", max_steps=1
    )
    with pytest.raises(ValueError, match=r"states of BertForMultipleChoice have the shape .* cannot be shared out"):
        trainer.train()


def test_batches_without_a_dimension_of_examples_are_not_shared_out(tmp_path):
    def packed(rows):
        batch = batch_of(rows)
        return {**batch, "position_ids": torch.arange(6)[None]}

    trainer = make_trainer(tmp_path, tiny_llama(), tiny_llama(), token_rows(), stepping_stones="share", max_steps=1)
    trainer.data_collator = packed
    with pytest.raises(ValueError, match=r"examples of a batch apart, but `position_ids` has the shape \(1, 6\)"):
        trainer.train()
