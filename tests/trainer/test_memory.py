"""What saves memory changes no bit: recomputed suffixes, and teachers that lie elsewhere."""

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from torch.autograd.graph import saved_tensors_hooks

from hf_blockkd import find_layer_stack
from hf_blockkd.data.teacher_cache import fingerprint

from ..helpers.tiny_models import tiny_bert, tiny_deberta, tiny_gpt2, tiny_llama, tiny_t5, tiny_vit
from ..helpers.training import (
    PLAIN_SGD,
    Gradients,
    assert_same_state,
    batch_of,
    image_rows,
    make_trainer,
    state_of,
    step_logs,
    text_rows,
    token_rows,
)

FAMILIES = {
    "vit": (tiny_vit, {"num_hidden_layers": 2}, image_rows),
    "bert": (tiny_bert, {"num_hidden_layers": 2}, text_rows),
    # Its layers hand on more than hidden states, and its model works between two of them.
    "deberta": (tiny_deberta, {"num_hidden_layers": 2}, text_rows),
    "llama": (tiny_llama, {"num_hidden_layers": 2}, token_rows),
    "gpt2": (tiny_gpt2, {"n_layer": 2}, token_rows),
    "t5": (tiny_t5, {"num_decoder_layers": 2}, token_rows),
}


def fast_and_slow(values, *fast):
    """Parameters of a test, those that are not named as fast marked as slow."""
    return [value if value in fast else pytest.param(value, marks=pytest.mark.slow) for value in values]


def train(folder, student, teacher, rows, **settings):
    """Gradients of every step, logs and final weights of a short run."""
    torch.manual_seed(1)
    watch = Gradients()
    settings = {"max_steps": 2, "cross_weight": 0.5, **PLAIN_SGD, **settings}
    trainer = make_trainer(folder, student, teacher, rows, callbacks=[watch], **settings)
    trainer.train()
    return trainer, watch.steps


def assert_same_run(run, other):
    (trainer, steps), (other_trainer, other_steps) = run, other
    for gradients, expected in zip(steps, other_steps, strict=True):
        assert_same_state(gradients, expected)
    assert_same_state(state_of(trainer.model), state_of(other_trainer.model))
    names = {name for name in step_logs(trainer)[0] if "loss" in name or "stone" in name}
    for ours, theirs in zip(step_logs(trainer), step_logs(other_trainer), strict=True):
        assert {name: ours[name] for name in names} == {name: theirs[name] for name in names}


@pytest.mark.parametrize("family", fast_and_slow(FAMILIES, "vit", "t5"))
@pytest.mark.parametrize("precision", fast_and_slow(["fp32", "bf16"], "fp32"))
def test_recomputing_activations_changes_no_bit(tmp_path, family, precision):
    build, config, rows = FAMILIES[family]
    student, teacher = build(**config), build()
    settings = {"bf16": precision == "bf16"}
    plain = train(tmp_path, copy.deepcopy(student), copy.deepcopy(teacher), rows(8), **settings)
    saved = train(tmp_path, student, teacher, rows(8), activation_checkpointing=True, **settings)
    assert saved[0].pair.stones.recompute
    assert not plain[0].pair.stones.recompute
    assert_same_run(saved, plain)


def kept_elements(trainer, batch):
    """Number of elements that the stones' forwards keep for backward, without what takes part as a weight."""
    weights = {p.data_ptr() for model in (trainer.model, trainer.teacher) for p in model.parameters()}
    kept = {}

    def keep(tensor):
        if tensor.data_ptr() not in weights:
            kept[tensor.data_ptr()] = tensor
        return tensor

    stones = trainer.pair.stones
    with torch.no_grad():
        _, extras = stones.teach(batch)
        with stones.capture([1]) as states:
            trainer.model(**batch)
    states = {depth: state.requires_grad_() for depth, state in states.items()}
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = stones.run(1, states, batch, extras)
    assert outputs.logits.requires_grad
    return sum(tensor.numel() for tensor in kept.values())


def test_a_recomputed_suffix_keeps_the_inputs_of_its_layers_alone(tmp_path):
    """Measured on the tensors that autograd keeps: transformers' own checkpointing would do nothing in eval mode."""
    teacher = tiny_vit(num_hidden_layers=8)
    batch = {name: tensor for name, tensor in batch_of(image_rows(4)).items() if name != "labels"}
    counts = []
    for checkpointing in (False, True):
        trainer = make_trainer(
            tmp_path, tiny_vit(num_hidden_layers=2), teacher, image_rows(4), activation_checkpointing=checkpointing
        )
        counts.append(kept_elements(trainer, batch))
    assert counts[1] < 0.5 * counts[0]


# ---- Teachers that lie elsewhere ----


def on_demand(teacher, folder):
    return cpu_offload(teacher, execution_device=torch.device("cpu"))


def on_disk(teacher, folder):
    return disk_offload(teacher, folder / "weights", execution_device=torch.device("cpu"))


def half_on_disk(teacher, folder):
    """As `device_map` has it: every second layer on the disk."""
    stack = find_layer_stack(teacher)
    layers = {f"{stack.path}.{index}": "disk" for index in range(0, len(stack), 2)}
    return dispatch_model(teacher, {"": "cpu", **layers}, main_device="cpu", offload_dir=folder / "weights")


# DeBERTa-v2 reads the weight of its relative embeddings past their module, so that it does not run offloaded at all.
OFFLOADABLE = [family for family in FAMILIES if family != "deberta"]


@pytest.mark.parametrize("place", fast_and_slow([on_demand, on_disk, half_on_disk], on_disk, half_on_disk))
@pytest.mark.parametrize("family", fast_and_slow(OFFLOADABLE, "llama"))
@pytest.mark.parametrize("checkpointing", fast_and_slow([False, True], True))
def test_a_teacher_that_accelerate_offloads_gives_the_same_bits(tmp_path, family, place, checkpointing):
    build, config, rows = FAMILIES[family]
    student, teacher = build(**config), build()
    plain = train(tmp_path, copy.deepcopy(student), copy.deepcopy(teacher), rows(8))
    teacher = place(teacher, tmp_path)
    assert any(parameter.is_meta for parameter in teacher.parameters())
    offloaded = train(tmp_path, student, teacher, rows(8), activation_checkpointing=checkpointing)
    assert any(parameter.is_meta for parameter in teacher.parameters())
    assert_same_run(offloaded, plain)


def test_a_cache_knows_a_teacher_again_wherever_it_lies(tmp_path):
    teacher = tiny_vit()
    here = fingerprint(teacher)
    assert fingerprint(on_disk(copy.deepcopy(teacher), tmp_path)) == here
    assert fingerprint(on_disk(tiny_vit(), tmp_path / "other")) != here


@pytest.mark.parametrize(
    "settings", [{}, {"stepping_stones": "all"}, {"objective": "kd"}, {"eval_stepping_stones": True}]
)
def test_no_check_before_the_first_step_makes_more_logits_than_training_does(tmp_path, settings):
    """Of a text of 200 tokens, a chunk of 16 lives in training, and 64 where a model's own loss is looked at."""
    torch.manual_seed(0)
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, 64, (4, 200))]
    student, teacher = (tiny_llama(num_hidden_layers=n, max_position_embeddings=200) for n in (2, 3))
    seen = {"student": [], "teacher": []}
    for role, model in (("student", student), ("teacher", teacher)):
        model.lm_head.register_forward_hook(lambda *call, role=role: seen[role].append(call[2].shape[:-1].numel()))
    trainer = make_trainer(
        tmp_path, student, teacher, rows, max_steps=2, loss_chunk_size=16, per_device_train_batch_size=2, **settings
    )
    trainer.train()
    for counts in seen.values():
        assert max(counts) <= 64
        assert counts.count(16) > 40
