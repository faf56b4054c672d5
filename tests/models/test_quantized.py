"""Quantized teachers: gradients pass through their layers, or they are refused.

The backends are no dependencies; their tests run where `pip install bitsandbytes torchao` has been.
"""

import copy

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from hf_blockkd import UnsupportedArchitectureError, find_layer_stack
from hf_blockkd.data.teacher_cache import fingerprint
from hf_blockkd.models.quantized import is_quantized, keep_gradients, swallowed_gradients
from hf_blockkd.routing.entering import enter_at, record_extras
from hf_blockkd.training import self_test

from ..helpers.tiny_models import tiny_llama
from ..helpers.training import batch_of, make_trainer, step_logs, token_rows

WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "head_dim": 32}
"""Wide enough for blocks of 64 weights."""
INPUTS = {name: tensor for name, tensor in batch_of(token_rows(4, seed=5)).items() if name != "labels"}


def eight_bits():
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed, so its teachers are not tested")
    return BitsAndBytesConfig(load_in_8bit=True)


def four_bits(**options):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed, so its teachers are not tested")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, **options)


def nested_normal_floats():
    return four_bits(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def weights_alone():
    pytest.importorskip("torchao", reason="torchao is not installed, so its teachers are not tested")
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def weights_and_activations():
    pytest.importorskip("torchao", reason="torchao is not installed, so its teachers are not tested")
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return TorchAoConfig(Int8DynamicActivationInt8WeightConfig())


BACKENDS = [eight_bits, four_bits, nested_normal_floats, weights_alone]


def quantized(folder, quantization_config):
    tiny_llama(**WIDE).save_pretrained(folder / "teacher")
    return AutoModelForCausalLM.from_pretrained(
        folder / "teacher", quantization_config=quantization_config, device_map="cpu", dtype=torch.float32
    )


@torch.no_grad()
def dequantized(model, like):
    """A plain model with the weights that the quantized one multiplies by, read off its answers to unit vectors."""
    plain = copy.deepcopy(like)
    for name, module in plain.named_modules():
        if isinstance(module, nn.Linear):
            own = model.get_submodule(name)
            module.weight.copy_(own(torch.eye(module.in_features)).T)
    return plain.requires_grad_(False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_stone_learns_through_a_quantized_teacher_as_through_its_plain_twin(tmp_path, backend):
    torch.manual_seed(0)
    like = tiny_llama(**WIDE)
    torch.manual_seed(0)
    teacher = quantized(tmp_path, backend())
    assert is_quantized(teacher)
    assert not is_quantized(like)
    trainer = make_trainer(tmp_path, tiny_llama(num_hidden_layers=2), teacher, token_rows(8), max_steps=2)
    trainer.train()  # with the self-test before its first step
    plain = dequantized(teacher, like)
    gradients = []
    for model in (teacher, plain):
        stack = find_layer_stack(model)
        with torch.no_grad(), record_extras(stack) as extras:
            model(**INPUTS)
        states = torch.randn(4, 6, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with enter_at(stack, 1, states, extras):
            model(**INPUTS).logits.logsumexp(-1).sum().backward()
        gradients.append(states.grad)
    assert all(parameter.grad is None for parameter in teacher.parameters())
    error = (gradients[0] - gradients[1]).norm() / gradients[1].norm()
    # 8 bits of bitsandbytes round the states, too.
    assert error < (0.1 if backend is eight_bits else 1e-4), error


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_quantized_base_teaches_its_own_adapters_with_one_copy_of_the_weights(tmp_path, backend):
    torch.manual_seed(0)
    base = quantized(tmp_path, backend())
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = make_trainer(
        tmp_path, base, None, token_rows(8), max_steps=2, learning_rate=0.05, eval_dataset=token_rows(4),
        peft_config=config,
    )  # fmt: skip
    student, teacher = trainer.model.get_base_model(), trainer.teacher
    assert teacher.model.layers[0].self_attn.q_proj.weight is student.model.layers[0].self_attn.q_proj.base_layer.weight
    trainer.evaluate()
    trainer.train()
    with torch.no_grad():
        expected = teacher(**INPUTS).logits
        torch.manual_seed(0)
        alone = quantized(tmp_path, backend())
        keep_gradients(alone)
        assert torch.equal(expected, alone(**INPUTS).logits)
        assert (trainer.model.eval()(**INPUTS).logits - expected).abs().max() > 1e-3


def test_a_teacher_that_quantizes_activations_is_refused_by_the_module_that_stops_gradients(tmp_path):
    teacher = quantized(tmp_path, weights_and_activations())
    trainer = make_trainer(tmp_path, tiny_llama(num_hidden_layers=2), teacher, token_rows(8), max_steps=1)
    with pytest.raises(UnsupportedArchitectureError, match=r"quantized modules of the teacher, e\.g\. 'model\.layers"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_errors_of_states_need_no_gradient_through_a_quantized_teacher(tmp_path, monkeypatch):
    monkeypatch.setattr(self_test, "is_quantized", lambda model: True)
    monkeypatch.setattr(self_test, "swallowed_gradients", lambda *args: ["model.layers.2.mlp.up_proj"])
    models = tiny_llama(num_hidden_layers=2), tiny_llama()
    trainer = make_trainer(tmp_path, *models, token_rows(8), max_steps=1, state_blocks="last_two")
    trainer.train()
    assert step_logs(trainer)[0]["loss_state"] > 0
    trainer = make_trainer(tmp_path, *models, token_rows(8), max_steps=1, state_weight=0.0)
    with pytest.raises(UnsupportedArchitectureError, match=r"e\.g\. 'model\.layers\.2\.mlp\.up_proj'"):
        trainer.train()


@pytest.mark.parametrize("backend", [eight_bits, four_bits, weights_alone])
def test_a_cache_knows_a_quantized_teacher_again(tmp_path, backend):
    teacher = quantized(tmp_path, backend())
    assert fingerprint(teacher) == fingerprint(copy.deepcopy(teacher))
    with torch.no_grad():
        teacher.model.norm.weight.add_(1)
    other = fingerprint(teacher)
    assert other != fingerprint(quantized(tmp_path, backend()))


class Rounded(nn.Linear):
    """Rounds what it gets, as backends that quantize activations do."""

    def forward(self, states):
        return super().forward((states * 64).round() / 64)


def test_modules_that_swallow_gradients_are_found_by_name():
    model = tiny_llama()
    stack = find_layer_stack(model)
    with torch.no_grad(), record_extras(stack) as extras:
        model(**INPUTS)
    assert swallowed_gradients(model, stack, INPUTS, extras, 0) == []
    for index in (0, 2):
        rounded = Rounded(16, 24, bias=False)
        rounded.load_state_dict(model.model.layers[index].mlp.up_proj.state_dict())
        model.model.layers[index].mlp.up_proj = rounded
    assert swallowed_gradients(model, stack, INPUTS, extras, 1) == ["model.layers.2.mlp.up_proj"]
