"""What a training step computes: stones, gradients, the frozen teacher, and what is logged."""

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import TrainerCallback

from hf_blockkd.connectors.attached import attach

from ..helpers.tiny_models import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5, tiny_vit
from ..helpers.training import (
    PLAIN_SGD,
    Gradients,
    assert_same_state,
    batch_of,
    image_rows,
    make_trainer,
    max_difference,
    state_of,
    step_logs,
    text_rows,
    token_rows,
    with_connectors,
)

FAMILIES = pytest.mark.parametrize(
    ("builder", "rows"),
    [(tiny_vit, image_rows), (tiny_bert, text_rows), (tiny_llama, token_rows)],
    ids=["vit", "bert", "llama"],
)


# ---- Stones ----


@FAMILIES
def test_stones_of_a_copied_teacher_give_its_logits_bit_for_bit_before_any_training(tmp_path, builder, rows):
    teacher = builder()
    batch = batch_of(rows(3))
    with torch.no_grad():
        expected = copy.deepcopy(teacher)(**{k: v for k, v in batch.items() if k != "labels"}).logits
    trainer = make_trainer(tmp_path, copy.deepcopy(teacher), teacher, connector="identity", num_blocks=3)
    stones = trainer.stepping_stone_logits(batch)
    assert list(stones) == [1, 2, 3]
    for logits in stones.values():
        assert torch.equal(logits, expected)


def test_stepping_stone_logits_leave_the_mode_and_the_gradients_of_the_student_alone(tmp_path):
    trainer = make_trainer(tmp_path, tiny_vit(), tiny_vit())
    trainer.model.train()
    logits = trainer.stepping_stone_logits(batch_of(image_rows(2)))
    assert trainer.model.training
    assert logits[1].requires_grad
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_stones_take_a_batch_without_labels(tmp_path):
    trainer = make_trainer(tmp_path, tiny_t5(num_decoder_layers=2), tiny_t5())
    ids = torch.tensor([[5, 6, 7, 2], [8, 9, 2, 0]])
    logits = trainer.stepping_stone_logits({"input_ids": ids, "decoder_input_ids": ids})
    assert [stone.shape for stone in logits.values()] == [(2, 4, 64)] * 2


# ---- A step against a reference written out by hand ----


def reference_logits(model, states, layers):
    """The rest of a ViT without dropout, from `states` on, written without its own forward."""
    for layer in layers:
        states = layer(states, None)
    return model.classifier(model.vit.layernorm(states)[:, 0])


def reference_loss(student, teacher, connectors, batch, ends, temperature, weights, stone_weight):
    """CE, KL and cross term of every stone by their definitions, from probabilities."""

    def kl(logits, target):
        p, q = (target.detach() / temperature).softmax(-1), (logits / temperature).softmax(-1)
        return (p * (p.log() - q.log())).sum(-1).mean() * temperature**2

    with torch.no_grad():
        teacher_logits = reference_logits(teacher, teacher.vit.embeddings(batch["pixel_values"]), teacher.vit.layers)
    states = student.vit.embeddings(batch["pixel_values"])
    stones, start = [], 0
    for connector, student_end, teacher_end in zip(connectors, *ends, strict=True):
        for layer in student.vit.layers[start:student_end]:
            states = layer(states, None)
        start = student_end
        stones.append(reference_logits(teacher, connector(states), teacher.vit.layers[teacher_end:]))
    outputs = [reference_logits(student, states, []), *stones]
    ensemble = torch.stack(stones).mean(0)
    factors = [1.0, *stone_weight]
    parts = {
        "loss_task": sum(w * F.cross_entropy(y, batch["labels"]) for w, y in zip(factors, outputs, strict=True)),
        "loss_distill": sum(w * kl(y, teacher_logits) for w, y in zip(factors, outputs, strict=True)),
        "loss_cross": sum(w * kl(y, ensemble) for w, y in zip(factors, outputs, strict=True)),
    }
    return sum(weight * part for weight, part in zip(weights, parts.values(), strict=True)), parts


@pytest.mark.parametrize("connector", ["linear", "mlp"])
@pytest.mark.parametrize(("weighting", "stone_weight"), [("halving", [0.25, 0.5, 1.0]), ("uniform", [1.0, 1.0, 1.0])])
def test_loss_parts_and_gradients_of_a_step_equal_those_written_by_hand(tmp_path, weighting, stone_weight, connector):
    student, teacher = tiny_vit(hidden_size=12, num_attention_heads=3), tiny_vit(num_hidden_layers=5)
    rows, gradients = image_rows(4), Gradients()
    trainer = make_trainer(
        tmp_path,
        student,
        teacher,
        rows,
        callbacks=[gradients],
        connector=connector,
        stepping_stones="all",
        student_boundaries=[1, 2, 3],
        teacher_boundaries=[2, 3, 5],
        stone_weighting=weighting,
        task_weight=0.7,
        distill_weight=1.3,
        cross_weight=0.4,
        temperature=3.0,
        max_steps=1,
        **PLAIN_SGD,
    )
    copies = copy.deepcopy((student, teacher, trainer.connectors))
    attach(copies[2], copies[0])
    ends, weights = ([1, 2, 3], [2, 3, 5]), (0.7, 1.3, 0.4)
    loss, parts = reference_loss(*copies, batch_of(rows), ends, 3.0, weights, stone_weight)
    loss.backward()
    trainer.train()

    logs = step_logs(trainer)[0]
    assert logs["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert {name: logs[name] for name in parts} == pytest.approx({n: p.item() for n, p in parts.items()}, rel=1e-5)
    expected = {name: parameter.grad for name, parameter in copies[0].named_parameters()}
    assert sum(name.startswith("blockwise_connectors.") for name in expected) == 3 * len(
        list(copies[2][0].parameters())
    )
    assert max_difference(gradients.steps[0], expected) < 1e-5
    assert min(gradient.abs().max() for name, gradient in expected.items() if name.endswith("weight")) > 1e-4


# ---- Who learns, and who does not ----


class TeacherMode(TrainerCallback):
    def __init__(self):
        self.teacher, self.modes = None, []

    def on_step_end(self, args, state, control, **kwargs):
        self.modes.append(any(module.training for module in self.teacher.modules()))


@FAMILIES
def test_training_moves_student_and_connectors_and_never_the_teacher(tmp_path, builder, rows):
    teacher, student = builder(), builder(num_hidden_layers=2)
    teacher.train()
    frozen, before = state_of(teacher), state_of(student)
    mode, gradients = TeacherMode(), Gradients()
    trainer = make_trainer(tmp_path, student, teacher, rows(8), callbacks=[mode, gradients], max_steps=3, **PLAIN_SGD)
    mode.teacher = trainer.teacher
    connectors = state_of(trainer.connectors)
    trainer.train()

    assert trainer.teacher is teacher
    assert mode.modes == [False] * 3
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert_same_state(state_of(teacher), frozen)
    with with_connectors(trainer):
        assert set(gradients.steps[0]) == {name for name, _ in trainer.model.named_parameters()}
    moved = state_of(trainer.model)
    assert all(not torch.equal(moved[name], before[name]) for name in before if name.endswith("weight"))
    assert all(not torch.equal(value, connectors[name]) for name, value in state_of(trainer.connectors).items())


def test_key_value_caches_are_off_in_the_teacher(tmp_path):
    trainer = make_trainer(tmp_path, tiny_llama(num_hidden_layers=2), tiny_llama(use_cache=True))
    inputs = trainer.pair.inputs_for("teacher", batch_of(token_rows(2)))
    assert trainer.teacher(**inputs).past_key_values is None
    assert trainer.teacher.config.use_cache is True


# ---- Logging ----


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("stones", ["all", "sample"])
def test_logged_parts_add_up_to_the_logged_loss(tmp_path, stones, accumulation):
    trainer = make_trainer(
        tmp_path,
        tiny_gpt2(n_layer=2),
        tiny_gpt2(),
        token_rows(10),
        stepping_stones=stones,
        task_weight=0.5,
        distill_weight=2.0,
        cross_weight=0.25,
        gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=2,
        logging_steps=2,
        max_steps=8,
    )
    trainer.train()
    logs = step_logs(trainer)
    assert len(logs) == 4
    for entry in logs:
        parts = 0.5 * entry["loss_task"] + 2.0 * entry["loss_distill"] + 0.25 * entry["loss_cross"]
        assert entry["loss"] == pytest.approx(parts, rel=1e-5)
        if stones == "all":
            assert {"stone_1/task", "stone_1/distill", "stone_2/task", "stone_2/distill"} <= set(entry)
            # ln 64 = 4.16 for uniform guesses: an average over steps, not a sum over micro-batches.
            assert 2.0 < entry["stone_2/task"] < 8.0
        assert entry["loss_cross"] > 0
