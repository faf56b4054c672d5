"""What a student can be made of: models, their names, and adapted ones."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from peft import (
    AdaptionPromptConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
    inject_adapter_in_model,
)

from hf_blockkd import make_student

from ..helpers import tiny_models as tiny
from .test_student import logits_of, same

TARGETS = ["query", "value"]
ADAPTERS = {
    "lora": LoraConfig(target_modules=TARGETS),
    "dora": LoraConfig(target_modules=TARGETS, use_dora=True),
    "with a head of its own": LoraConfig(target_modules=TARGETS, modules_to_save=["classifier"]),
    "with biases": LoraConfig(target_modules=TARGETS, bias="all"),
    "with tokens": LoraConfig(target_modules=TARGETS, trainable_token_indices={"word_embeddings": [1, 2]}),
    "ia3": IA3Config(target_modules=TARGETS, feedforward_modules=[]),
    "loha": LoHaConfig(target_modules=TARGETS),
}


def adapted(config, base=None):
    model = get_peft_model(tiny.tiny_bert() if base is None else base, copy.deepcopy(config))
    with torch.no_grad():
        for parameter in (one for one in model.parameters() if one.requires_grad):
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


@torch.no_grad()
def logits_of_text(model):
    return model(input_ids=torch.arange(1, 13).view(2, 6)).logits


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_student_of_an_adapted_teacher_starts_from_the_merged_weights(name):
    teacher = adapted(ADAPTERS[name])
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    trained = [parameter.requires_grad for parameter in teacher.parameters()]
    student = make_student(teacher)
    assert type(student) is transformers.BertForSequenceClassification
    torch.testing.assert_close(logits_of_text(student), logits_of_text(teacher), rtol=1e-4, atol=1e-5)
    with teacher.disable_adapter():
        assert not torch.allclose(logits_of_text(student), logits_of_text(teacher), rtol=1e-3, atol=1e-3)
    assert all(parameter.requires_grad for parameter in student.parameters())

    assert same(before, teacher.state_dict())
    assert [parameter.requires_grad for parameter in teacher.parameters()] == trained
    shared = {p.data_ptr() for p in student.parameters()} & {p.data_ptr() for p in teacher.parameters()}
    assert not shared
    assert len(make_student(teacher, 2).bert.encoder.layer) == 2


def test_tied_embeddings_of_an_adapted_teacher_stay_tied():
    teacher = adapted(LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True), tiny.tiny_gpt2())
    student = make_student(teacher, 2)
    assert student.lm_head.weight is student.transformer.wte.weight


def test_an_adapter_that_is_switched_off_is_left_out():
    teacher = adapted(LoraConfig(target_modules=TARGETS, modules_to_save=["classifier"]))
    with teacher.disable_adapter():
        assert torch.equal(logits_of_text(make_student(teacher)), logits_of_text(teacher))


@pytest.mark.parametrize(
    ("base", "config"),
    [
        (tiny.tiny_bert, PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)),
        (tiny.tiny_bert, PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)),
        (tiny.tiny_llama, AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=2, adapter_layers=2)),
    ],
)
def test_an_adapter_that_is_none_of_weights_is_refused_by_name(base, config):
    with pytest.raises(ValueError, match=f"is {type(config).__name__}, which cannot be merged into weights"):
        make_student(get_peft_model(base(), config))


def test_adapters_without_their_wrapper_are_refused():
    model = inject_adapter_in_model(LoraConfig(target_modules=TARGETS), tiny.tiny_bert())
    with pytest.raises(ValueError, match="BertForSequenceClassification has adapters inside, but is no PeftModel"):
        make_student(model)


@pytest.mark.parametrize("as_text", [True, False])
def test_a_teacher_may_be_a_folder(as_text, tmp_path):
    teacher = tiny.tiny_bert()
    teacher.save_pretrained(tmp_path)
    student = make_student(str(tmp_path) if as_text else tmp_path)
    assert torch.equal(logits_of(student), logits_of(teacher))


@pytest.mark.parametrize(
    ("teacher", "kind"),
    [
        (5, "int"),
        (None, "NoneType"),
        (transformers.BertConfig(), "BertConfig"),
        (transformers.BertModel, "type"),
        (torch.nn.Linear(2, 2), "Linear"),
        ({}, "dict"),
    ],
)
def test_what_is_no_model_is_refused(teacher, kind):
    with pytest.raises(ValueError, match=f"`teacher` is of type {kind}, but must be a transformers model"):
        make_student(teacher)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_layers": "even"}, "`num_layers` is 'even', but must be a whole number"),
        ({"num_layers": 2.0}, "`num_layers` is 2.0, but must be a whole number"),
        ({"num_layers": torch.nn.Linear(2, 2)}, "`num_layers` is of type Linear, but must be a whole number"),
        ({"hidden_size": "8"}, "`hidden_size` is '8', but must be a whole number"),
        ({"layers": 2}, "`layers` is of type int; choose 'even', 'outer'"),
        ({"layers": [0.5]}, "`layers` is of type list; choose 'even', 'outer'"),
    ],
)
def test_arguments_of_other_types_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_student(tiny.tiny_bert(), **arguments)


def test_weights_in_packed_numbers_are_refused():
    teacher = tiny.tiny_bert()
    # As bitsandbytes leaves it: codes of the weight's own shape.
    weight = teacher.classifier.weight
    teacher.classifier.weight = torch.nn.Parameter(weight.detach().to(torch.int8), requires_grad=False)
    teacher.is_quantized = True
    with pytest.raises(ValueError, match=r"quantized, e.g. 'classifier.weight', .* call its `dequantize"):
        make_student(teacher)
