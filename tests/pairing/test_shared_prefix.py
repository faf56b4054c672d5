"""Frozen first layers in common are computed once, and the gradients are the same bits."""

import copy

import pytest
import torch
from transformers import TrainerCallback

from hf_blockkd import find_layer_stack, make_student

from ..helpers.tiny_models import tiny_bert, tiny_llama, tiny_mistral, tiny_t5, tiny_vit
from ..helpers.training import PLAIN_SGD, Gradients, image_rows, make_trainer, max_difference, text_rows, token_rows

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def layers_of(model):
    return find_layer_stack(model).layers


def freeze(student, depth):
    """Freeze the embeddings and the first layers."""
    for name, parameter in student.named_parameters():
        parameter.requires_grad_("embed" not in name)
    layers_of(student)[:depth].requires_grad_(False)


def run(folder, student, teacher, rows, share=True, **settings):
    """The gradients of two steps, and how often the first student layer ran in the run."""
    student, gradients = copy.deepcopy(student), Gradients()
    settings = {"num_blocks": 2, "max_steps": 2, **PLAIN_SGD, **settings}
    trainer = make_trainer(folder, student, teacher, rows, callbacks=[gradients], **settings)
    if not share:
        trainer.pair.prefix.limit = 0
    count = 0

    def wrapped(*args, **kwargs):
        nonlocal count
        count += 1
        return original(*args, **kwargs)

    original = layers_of(student)[0].forward
    layers_of(student)[0].forward = wrapped
    trainer.train()
    return trainer, gradients.steps, count


CASES = {
    "vit": (tiny_vit, {}, image_rows, {}),
    "vit-share": (tiny_vit, {}, image_rows, {"stepping_stones": "share"}),
    "vit-plain-kd": (tiny_vit, {}, image_rows, {"stepping_stones": "none"}),
    "bert": (tiny_bert, NO_DROPOUT, text_rows, {}),
    "vit-bf16": (tiny_vit, {}, image_rows, {"bf16": True}),
    "llama": (tiny_llama, {}, token_rows, {"loss_chunk_size": 4}),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_gradients_are_the_same_bits_without_running_the_layers(tmp_path, case):
    build, config, rows, settings = case
    teacher = build(num_hidden_layers=4, **config)
    student = make_student(teacher, layers=[0, 1, 2])
    freeze(student, 2)
    limit = {"student_boundaries": [2, 3], "teacher_boundaries": [2, 4]}
    trainer, shared, calls = run(tmp_path, student, teacher, rows(), **limit, **settings)
    assert trainer.pair.prefix.depth == 2
    _, expected, own_calls = run(tmp_path, student, teacher, rows(), share=False, **limit, **settings)
    assert max_difference(shared[0], expected[0]) == max_difference(shared[1], expected[1]) == 0.0
    assert max(gradient.abs().max() for gradient in shared[0].values()) > 1e-3
    assert calls == 2  # the forwards that compare losses and that find the prefix
    assert own_calls >= 2


@pytest.mark.parametrize("change", ["trainable", "other weights", "dropout", "other embeddings", "other depth"])
def test_what_is_not_the_same_is_not_shared(tmp_path, change):
    config = {"hidden_dropout_prob": 0.1} if change == "dropout" else NO_DROPOUT
    teacher = tiny_bert(num_hidden_layers=4, **config)
    student = make_student(teacher, layers=[1, 2, 3] if change == "other depth" else [0, 1, 2])
    freeze(student, 0 if change == "trainable" else 2)
    with torch.no_grad():
        if change == "other weights":
            student.bert.encoder.layer[0].output.dense.weight[0, 0] += 1
        elif change == "other embeddings":
            # A word that the batch does not have.
            student.bert.embeddings.word_embeddings.weight[2] += 1
    trainer, _, _ = run(tmp_path, student, teacher, text_rows(), max_steps=1)
    assert trainer.pair.prefix.depth == 0


def test_a_window_that_only_longer_texts_feel_is_not_shared(tmp_path):
    teacher = tiny_mistral(num_hidden_layers=4, sliding_window=40)
    for window, depth in ((40, 2), (8, 0)):
        student = make_student(teacher, layers=[0, 1, 2], sliding_window=window)
        freeze(student, 2)
        limit = {"student_boundaries": [2, 3], "teacher_boundaries": [2, 4]}
        trainer, _, _ = run(tmp_path, student, teacher, token_rows(length=6), max_steps=1, **limit)
        assert trainer.pair.prefix.depth == depth


def test_it_ends_where_the_first_stone_reads_and_when_somebody_thaws_it(tmp_path):
    teacher = tiny_vit(num_hidden_layers=4)
    student = make_student(teacher, layers=[0, 1, 2, 3])
    freeze(student, 3)
    trainer, _, _ = run(tmp_path, student, teacher, image_rows(), num_blocks=4, stepping_stones="all")
    assert trainer.pair.prefix.depth == 1
    layers_of(trainer.model)[0].requires_grad_(True)
    trainer.train()
    assert trainer.pair.prefix.depth == 0


def test_embeddings_that_are_thawed_on_the_way_get_their_gradient(tmp_path):
    class Thaw(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            model.vit.embeddings.requires_grad_(state.global_step == 1)

    teacher = tiny_vit(num_hidden_layers=4)
    student = make_student(teacher, layers=[0, 1, 2])
    freeze(student, 2)
    limit = {"student_boundaries": [2, 3], "teacher_boundaries": [2, 4]}
    gradients = Gradients()
    trainer = make_trainer(
        tmp_path, student, teacher, image_rows(), callbacks=[Thaw(), gradients], max_steps=2, **limit
    )
    trainer.train()
    first, second = ({name for name in step if "embeddings" in name} for step in gradients.steps)
    assert not first
    assert second


def test_a_second_run_looks_again(tmp_path):
    teacher = tiny_vit(num_hidden_layers=4)
    student = make_student(teacher, layers=[0, 1, 2])
    freeze(student, 2)
    limit = {"student_boundaries": [2, 3], "teacher_boundaries": [2, 4]}
    trainer = make_trainer(tmp_path, student, teacher, image_rows(), max_steps=1, **limit)
    trainer.train()
    assert trainer.pair.prefix.depth == 2
    with torch.no_grad():
        layers_of(student)[1].mlp.fc1.weight[0, 0] += 1
    trainer.train()
    assert trainer.pair.prefix.depth == 1


def test_what_layers_hand_on_is_shared_too(tmp_path):
    """The first layer of T5 makes the position bias of all others."""
    teacher = tiny_t5(dropout_rate=0.0)
    student = copy.deepcopy(teacher)
    student.requires_grad_(False)
    student.decoder.block[-1].requires_grad_(True)
    trainer, shared, calls = run(tmp_path, student, teacher, token_rows(), stepping_stones="none")
    assert trainer.pair.prefix.depth == len(teacher.decoder.block) - 1
    _, expected, _ = run(tmp_path, student, teacher, token_rows(), share=False, stepping_stones="none")
    assert max_difference(shared[0], expected[0]) == 0.0
    assert calls == 2
