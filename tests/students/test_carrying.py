"""A student has every tensor of its teacher in the dtype that the teacher has it in, and so has a reload."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import cpu_offload
from transformers import GPTJConfig, GPTJForCausalLM, PreTrainedModel

from hf_blockkd import make_student

from ..helpers import tiny_models as tiny
from .test_student import TEACHERS, logits_of

SCALINGS = {
    "default": {},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 2.0, "original_max_position_embeddings": 16},
    "llama3": {
        "factor": 2.0,
        "original_max_position_embeddings": 16,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    "longrope": {
        "factor": 2.0,
        "original_max_position_embeddings": 8,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
    },
}


def reloaded(model: PreTrainedModel, folder) -> PreTrainedModel:
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder).eval()


def loaded_in(dtype: torch.dtype, model: PreTrainedModel, folder) -> PreTrainedModel:
    """As people get it: transformers itself chooses what stays in float32."""
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder, dtype=dtype).eval()


def dtypes_of(model: torch.nn.Module) -> dict[str, torch.dtype]:
    return {name: tensor.dtype for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def logits_in_own_dtype(model: PreTrainedModel) -> torch.Tensor:
    """Images in float32 do not go into other weights."""
    with torch.autocast("cpu", dtype=model.dtype, enabled=model.dtype != torch.float32):
        return logits_of(model)


def llama_with(rope_type: str) -> PreTrainedModel:
    parameters = {"rope_type": rope_type, "rope_theta": 10_000.0, **SCALINGS[rope_type]}
    return tiny.tiny_llama(rope_parameters=parameters, max_position_embeddings=16)


@pytest.mark.parametrize("name", [*TEACHERS, "mixtral", "gpt_neox", "swin", "resnet", "beit"])
def test_a_bfloat16_student_is_its_teacher_and_stays_so_when_reloaded(name, tmp_path):
    teacher = loaded_in(torch.bfloat16, getattr(tiny, f"tiny_{name}")(), tmp_path)
    student = make_student(teacher)
    assert dtypes_of(student) == dtypes_of(teacher)
    assert student.config.dtype == torch.bfloat16
    assert torch.equal(logits_in_own_dtype(student), logits_in_own_dtype(teacher))
    assert torch.equal(logits_in_own_dtype(reloaded(student, tmp_path)), logits_in_own_dtype(student))


@pytest.mark.parametrize("name", [*TEACHERS, "swin", "beit"])
def test_a_shallower_student_stays_the_same_when_reloaded(name, tmp_path):
    """Names of a backbone's stages go with its layers: a config with more of them than layers cannot be loaded."""
    student = make_student(getattr(tiny, f"tiny_{name}")(), layers=[0])
    assert torch.equal(logits_of(reloaded(student, tmp_path)), logits_of(student))


@pytest.mark.parametrize("rope_type", SCALINGS)
@torch.no_grad()
def test_frequencies_of_rotary_embeddings_are_not_rounded(rope_type, tmp_path):
    teacher = loaded_in(torch.bfloat16, llama_with(rope_type), tmp_path)
    long_text = torch.randint(3, tiny.VOCABULARY, (1, 200))
    # Dynamic frequencies depend on the longest text so far, in the student as in the teacher.
    teacher(long_text)
    student = make_student(teacher)
    assert student.model.rotary_emb.inv_freq.dtype == torch.float32
    for text in (long_text, long_text[:, :12], long_text[:, :24]):
        assert torch.equal(student(text).logits, teacher(text).logits)


def test_buffers_that_a_teacher_was_cast_with_are_cast_in_its_student():
    teacher = tiny.tiny_llama().to(torch.bfloat16)
    student = make_student(teacher)
    assert student.model.rotary_emb.inv_freq.dtype == torch.bfloat16
    assert torch.equal(logits_of(student), logits_of(teacher))


def test_buffers_that_were_changed_by_hand_are_the_teachers_at_any_depth():
    teacher = tiny.tiny_llama()
    teacher.model.rotary_emb.inv_freq.mul_(0.5)
    for depth in (3, 2):
        student = make_student(teacher, num_layers=depth)
        assert torch.equal(student.model.rotary_emb.inv_freq, teacher.model.rotary_emb.inv_freq)


def test_buffers_that_follow_from_other_fields_are_the_students_own(tmp_path):
    teacher = loaded_in(torch.bfloat16, tiny.tiny_gemma3(), tmp_path)
    faster = {name: {"rope_type": "default", "rope_theta": 50.0} for name in ("full_attention", "sliding_attention")}
    student = make_student(teacher, rope_parameters=faster)
    ours, theirs = student.model.rotary_emb, teacher.model.rotary_emb
    assert not torch.allclose(ours.full_attention_inv_freq, theirs.full_attention_inv_freq)
    assert ours.full_attention_inv_freq.dtype == torch.float32
    narrow = make_student(teacher, hidden_size=8)
    # Embeddings are multiplied by the root of the width.
    assert narrow.model.embed_tokens.embed_scale.item() == pytest.approx(8**0.5, rel=0.01)
    for model in (student, narrow):
        assert torch.equal(logits_of(reloaded(model, tmp_path)), logits_of(model))


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_the_default_dtype_of_torch_changes_nothing(default):
    teacher = tiny.tiny_llama()
    torch.set_default_dtype(default)
    try:
        student = make_student(teacher)
    finally:
        torch.set_default_dtype(torch.float32)
    assert dtypes_of(student) == dtypes_of(teacher)
    assert torch.equal(logits_of(student), logits_of(teacher))


def test_a_student_of_a_float16_teacher_is_in_float32(tmp_path):
    teacher = loaded_in(torch.float16, tiny.tiny_t5(), tmp_path)
    student = make_student(teacher)
    assert set(dtypes_of(student).values()) == {torch.float32}
    assert student.config.dtype == torch.float32
    weights = teacher.state_dict()
    assert all(torch.equal(value, weights[name].float()) for name, value in student.state_dict().items())
    assert reloaded(student, tmp_path).dtype == torch.float32


@pytest.mark.parametrize("name", ["t5", "llama", "vit"])
@pytest.mark.parametrize("theirs", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("ours", [torch.float16, torch.bfloat16, torch.float32])
def test_a_student_in_another_dtype_has_the_dtypes_of_a_reload(name, theirs, ours, tmp_path):
    teacher = loaded_in(theirs, getattr(tiny, f"tiny_{name}")(), tmp_path)
    student = make_student(teacher, dtype=ours)
    assert student.dtype == ours
    again = reloaded(student, tmp_path)
    assert dtypes_of(again) == dtypes_of(student)
    assert torch.equal(logits_in_own_dtype(again), logits_in_own_dtype(student))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_positions_that_a_model_computes_itself_are_not_rounded_where_the_dtype_changes(dtype, tmp_path):
    shape = {"n_embd": 32, "n_layer": 3, "n_head": 2, "rotary_dim": 8, "n_positions": 64}
    student = make_student(GPTJForCausalLM(GPTJConfig(vocab_size=tiny.VOCABULARY, **shape)), num_layers=2, dtype=dtype)
    table = student.transformer.rotary_emb.embed_positions
    angles = torch.arange(64.0)[:, None] / 10_000 ** (torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(table, torch.cat([angles.sin(), angles.cos()], dim=1), rtol=0.0, atol=1e-5)
    assert torch.equal(logits_in_own_dtype(reloaded(student, tmp_path)), logits_in_own_dtype(student))


def test_what_a_teacher_keeps_in_float32_stays_so(tmp_path):
    """T5 overflows in float16 without its `wo`."""
    teacher = loaded_in(torch.float16, tiny.tiny_t5(), tmp_path)
    student = make_student(teacher, dtype=torch.float16)
    assert student.decoder.block[0].layer[2].DenseReluDense.wo.weight.dtype == torch.float32
    assert dtypes_of(student) == dtypes_of(teacher)
    by_hand = tiny.tiny_llama().to(torch.bfloat16)
    by_hand.model.norm.float()
    assert dtypes_of(make_student(by_hand)) == dtypes_of(by_hand)


@pytest.mark.parametrize("dtype", ["float32", torch.int64, torch.float8_e4m3fn])
def test_a_dtype_that_does_not_train_is_refused(dtype):
    with pytest.raises(ValueError, match=r"`dtype` is .*, but must be a dtype that trains"):
        make_student(tiny.tiny_llama(), dtype=dtype)


def test_settings_of_generation_come_along():
    teacher = tiny.tiny_llama()
    teacher.generation_config.max_new_tokens = 7
    student = make_student(teacher, num_layers=1)
    assert student.generation_config.max_new_tokens == 7
    assert student.generation_config is not teacher.generation_config


@pytest.mark.parametrize("name", ["llama", "t5", "vit", "distilbert", "mixtral", "gpt2"])
def test_all_weights_of_a_student_of_a_frozen_teacher_train(name):
    frozen = getattr(tiny, f"tiny_{name}")().requires_grad_(False)
    assert all(parameter.requires_grad for parameter in make_student(frozen).parameters())
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


def test_a_head_that_is_tied_anew_takes_the_embeddings_and_says_so(caplog):
    teacher = tiny.tiny_gpt2(tie_word_embeddings=False)
    student = make_student(teacher, tie_word_embeddings=True)
    assert "The student ties transformer.wte.weight and lm_head.weight, which differ in the teacher" in caplog.text
    assert student.lm_head.weight is student.transformer.wte.weight
    assert torch.equal(student.transformer.wte.weight, teacher.transformer.wte.weight)


def test_a_student_of_an_offloaded_teacher_has_its_weights():
    teacher = tiny.tiny_llama()
    offloaded = cpu_offload(copy.deepcopy(teacher), execution_device=torch.device("cpu"))
    assert torch.equal(logits_of(make_student(offloaded)), logits_of(teacher))
