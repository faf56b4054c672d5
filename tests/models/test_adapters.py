"""Students that train as adapters, and their own base without the adapter as the teacher."""

import copy

import pytest
import torch
import transformers
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file

from hf_blockkd import find_layer_stack
from hf_blockkd.connectors.attached import CONNECTORS_NAME, MODULE_NAME
from hf_blockkd.models.adapters import base_as_teacher

from ..helpers.tiny_models import tiny_bert, tiny_llama, tiny_vit
from ..helpers.training import (
    PLAIN_SGD,
    Gradients,
    assert_same_state,
    batch_of,
    image_rows,
    make_trainer,
    state_of,
    text_rows,
    token_rows,
)
from ..helpers.walks import walk

LLAMA = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "lora_dropout": 0.5}
STUDENTS = {
    "llama-lora": (tiny_llama, token_rows, LoraConfig(**LLAMA)),
    "llama-dora": (tiny_llama, token_rows, LoraConfig(**LLAMA, use_dora=True)),
    "llama-ia3": (
        tiny_llama,
        token_rows,
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
    ),
    "vit-lora-and-head": (
        tiny_vit,
        image_rows,
        LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"]),
    ),
    "bert-lora-and-head": (
        tiny_bert,
        text_rows,
        LoraConfig(r=2, target_modules=["query", "value"], modules_to_save=["classifier"], task_type="SEQ_CLS"),
    ),
}


FAST = {"llama-dora", "vit-lora-and-head"}
CASES = [case if case in FAST else pytest.param(case, marks=pytest.mark.slow) for case in STUDENTS]


def without_labels(rows):
    return {name: tensor for name, tensor in batch_of(rows).items() if name != "labels"}


def parameter_bytes(*models):
    tensors = {p.data_ptr(): p.numel() * p.element_size() for model in models for p in model.parameters()}
    return sum(tensors.values())


@pytest.fixture(params=["peft_config", "wrapped"])
def is_wrapped(request):
    """Whether the student is an adapted model before the trainer gets it."""
    return request.param == "wrapped"


def make_self_taught(folder, base, rows, config, is_wrapped=False, **settings):
    student, given = (get_peft_model(base, config), None) if is_wrapped else (base, config)
    return make_trainer(folder, student, None, rows, peft_config=given, **settings)


@pytest.mark.parametrize("case", CASES)
def test_an_adapted_student_trains_and_loads_by_plain_peft_merged_and_not(tmp_path, case):
    build, rows, config = STUDENTS[case]
    base, teacher = build(num_hidden_layers=2), build()
    untouched = copy.deepcopy(base)
    batch = without_labels(rows(3, seed=5))
    settings = {"save_strategy": "steps", "save_steps": 3, "max_steps": 3, "learning_rate": 0.05}
    trainer = make_trainer(tmp_path, base, teacher, rows(8), peft_config=config, **settings)
    connectors = state_of(trainer.connectors)
    trainer.train()
    with torch.no_grad():
        expected = trainer.model.eval()(**batch).logits
        loaded = PeftModel.from_pretrained(copy.deepcopy(untouched), tmp_path / "checkpoint-3").eval()
        assert torch.equal(loaded(**batch).logits, expected)
        assert torch.allclose(loaded.merge_and_unload()(**batch).logits, expected, atol=1e-5)
        assert (expected - untouched(**batch).logits).abs().max() > 1e-3
    assert not any(MODULE_NAME in name for name in load_file(tmp_path / "checkpoint-3" / "adapter_model.safetensors"))
    saved = load_file(tmp_path / "checkpoint-3" / CONNECTORS_NAME)
    assert_same_state(saved, state_of(trainer.connectors))
    assert all(not torch.equal(tensor, connectors[name]) for name, tensor in saved.items())


# ---- The base as its own student's teacher ----


@pytest.mark.parametrize("case", CASES)
def test_without_a_teacher_the_base_teaches_and_its_logits_never_change(tmp_path, case, is_wrapped):
    build, rows, config = STUDENTS[case]
    base = build()
    untouched = copy.deepcopy(base)
    batch = without_labels(rows(3, seed=5))
    with torch.no_grad():
        expected = untouched(**batch).logits
    trainer = make_self_taught(tmp_path, base, rows(8), config, is_wrapped, max_steps=3, learning_rate=0.05)

    def teacher_logits():
        return trainer.pair.stones.teach(batch)[0].logits

    assert torch.equal(teacher_logits(), expected)
    trainer.train()
    assert torch.equal(teacher_logits(), expected)
    assert_same_state(state_of(trainer.teacher), state_of(untouched))
    with torch.no_grad():
        assert (trainer.model.eval()(**batch).logits - expected).abs().max() > 1e-3
        with trainer.model.disable_adapter():
            assert torch.equal(trainer.model(**batch).logits, expected)


def test_the_weights_of_the_base_are_in_memory_once(tmp_path, is_wrapped):
    base = tiny_llama()
    alone = parameter_bytes(base)
    trainer = make_self_taught(tmp_path, base, token_rows(4), LoraConfig(**LLAMA), is_wrapped, max_steps=1)
    trainer.train()
    adapters = sum(p.numel() * 4 for n, p in trainer.model.named_parameters() if "lora_" in n or MODULE_NAME in n)
    assert adapters > 0
    assert parameter_bytes(trainer.model, trainer.teacher) == alone + adapters


def test_before_any_training_every_stone_of_an_adapted_base_answers_as_the_base_does(tmp_path, is_wrapped):
    base = tiny_llama()
    batch = without_labels(token_rows(3, seed=5))
    with torch.no_grad():
        expected = base(**batch).logits
    trainer = make_self_taught(tmp_path, base, token_rows(4), LoraConfig(**LLAMA), is_wrapped, num_blocks=3)
    stones = trainer.stepping_stone_logits(batch)
    assert all(torch.equal(logits, expected) for logits in stones.values())


@pytest.mark.parametrize("build", [tiny_bert, tiny_llama])
def test_gradients_pass_through_the_base_into_the_adapters_below(tmp_path, build):
    """Against stones put together by hand: adapted layers, then the same layers of a copy without any adapter."""
    rows = (text_rows if build is tiny_bert else token_rows)(4)
    for row in rows:
        row["attention_mask"] = torch.ones_like(row["attention_mask"])
    batch, config = batch_of(rows), LoraConfig(r=2, target_modules=r".*\.(query|value|q_proj|v_proj)")
    base = build(**({"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} if build is tiny_bert else {}))
    apart = copy.deepcopy(base).requires_grad_(False)
    watch = Gradients()
    trainer = make_self_taught(
        tmp_path,
        base,
        rows,
        config,
        max_steps=1,
        task_weight=0.0,
        temperature=1.0,
        stepping_stones=[1],
        callbacks=[watch],
        **PLAIN_SGD,
    )
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    student = copy.deepcopy(trainer.model.get_base_model())
    connector = copy.deepcopy(trainer.connectors[0])
    trainer.train()

    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    adapted, bare = walk(student, batch), walk(apart, batch)
    states = adapted.states
    end = trainer.block_map.student[0]
    for layer in find_layer_stack(student).layers[:end]:
        states = adapted.call(layer, states)
    states = connector(states)
    for layer in bare.layers[trainer.block_map.teacher[0] :]:
        states = bare.call(layer, states)
    with torch.no_grad():
        clean = apart(**inputs).logits
    kept = batch["labels"][..., 1:] != -100 if build is tiny_llama else slice(None)

    def divergence(logits):
        logits, target = (logits, clean) if build is tiny_bert else (logits[:, :-1][kept], clean[:, :-1][kept])
        log_p, log_q = target.log_softmax(-1), logits.log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1).mean()

    # The weight of stone 1 of 2 is one half.
    (divergence(student(**inputs).logits) + 0.5 * divergence(bare.head(states))).backward()
    expected = {f"base_model.model.{n}": p.grad for n, p in student.named_parameters() if p.grad is not None}
    expected |= {f"{MODULE_NAME}.0.{n}": p.grad for n, p in connector.named_parameters()}
    found = {name: gradient for name, gradient in watch.steps[0].items() if f"{MODULE_NAME}.1" not in name}
    assert found.keys() == expected.keys()
    assert any("lora_A" in name for name in found)
    for name, gradient in found.items():
        assert torch.allclose(gradient, expected[name], atol=1e-6), name
    assert all(parameter.grad is None for parameter in trainer.teacher.parameters())


def test_the_teacher_of_an_adapted_model_keeps_the_original_of_a_module_that_trains():
    base = tiny_vit()
    student = get_peft_model(copy.deepcopy(base), STUDENTS["vit-lora-and-head"][2])
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    teacher = base_as_teacher(student)
    assert type(teacher) is type(base)
    assert_same_state(state_of(teacher), state_of(base))
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert any(parameter.requires_grad for parameter in student.parameters())


def test_an_adapted_teacher_teaches_with_its_adapter(tmp_path):
    teacher = get_peft_model(tiny_vit(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()
    batch = without_labels(image_rows(3, seed=5))
    with torch.no_grad():
        expected = teacher(**batch).logits
        with teacher.disable_adapter():
            assert not torch.equal(teacher(**batch).logits, expected)
    trainer = make_trainer(tmp_path, tiny_vit(num_hidden_layers=2), teacher, image_rows(4), max_steps=1)
    trainer.train()
    assert torch.equal(trainer.pair.stones.teach(batch)[0].logits, expected)


def test_a_base_that_teaches_itself_resumes_with_the_same_bits(tmp_path):
    config = LoraConfig(**LLAMA)
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 0.05}
    states = []
    for checkpoint in (None, str(tmp_path / "checkpoint-2")):
        torch.manual_seed(0)
        trainer = make_self_taught(tmp_path, tiny_llama(), token_rows(8), config, **settings)
        trainer.train(resume_from_checkpoint=checkpoint)
        states.append(state_of(trainer.model))
    assert_same_state(*states)


# ---- What is refused ----


def merged():
    student = get_peft_model(tiny_llama(), LoraConfig(**LLAMA))
    student.merge_adapter()
    return student


def not_trainable():
    return get_peft_model(tiny_llama(), LoraConfig(**LLAMA, inference_mode=True))


PROMPT = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 2}


@pytest.mark.parametrize(
    ("student", "peft_config", "match"),
    [
        (tiny_llama, None, "`teacher_model` is None, which stands for .* LlamaForCausalLM has none; pass a teacher"),
        (merged, None, "an adapter is merged into the student's base, e.g. in .*unmerge_adapter"),
        (not_trainable, None, "No weight of the adapted `model` requires gradients.*is_trainable=True"),
        (lambda: get_peft_model(tiny_bert(), LoraConfig(target_modules=["query"], bias="all")), None, "bias='none'"),
        (tiny_bert, LoraConfig(target_modules=["query"], bias="all"), "trains .* of the base's own weights, e.g. "),
        (
            lambda: get_peft_model(tiny_llama(), LoraConfig(**LLAMA)),
            LoraConfig(**LLAMA),
            "an adapter around an adapter",
        ),
        (tiny_llama, PromptTuningConfig(**PROMPT), "PromptTuningConfig, whose virtual tokens .* LoraConfig"),
        (lambda: get_peft_model(tiny_llama(), PromptTuningConfig(**PROMPT)), None, "PromptTuningConfig, whose virtual"),
    ],
)
def test_adapters_that_cannot_be_distilled_into_are_refused(tmp_path, student, peft_config, match):
    with pytest.raises(ValueError, match=match):
        make_trainer(tmp_path / "run", student(), None, token_rows(4), peft_config=peft_config)
    assert not (tmp_path / "run").exists()


def test_the_adapter_of_a_student_does_not_replace_its_teacher(tmp_path):
    base = tiny_llama()
    with pytest.raises(ValueError, match="same object; pass a copy as the teacher, or None with an adapter"):
        make_trainer(tmp_path, base, base, token_rows(4), peft_config=LoraConfig(**LLAMA))


def test_frozen_weights_may_be_shared_with_the_teacher(tmp_path):
    student, teacher = tiny_vit(num_hidden_layers=2), tiny_vit()
    student.vit.embeddings = teacher.vit.embeddings.requires_grad_(False)
    trainer = make_trainer(tmp_path, student, teacher, image_rows(4), max_steps=1)
    embeddings = state_of(teacher.vit.embeddings)
    trainer.train()
    assert_same_state(state_of(trainer.model.vit.embeddings), embeddings)
    loaded = transformers.ViTForImageClassification.from_pretrained
    trainer.save_model(str(tmp_path / "saved"))
    assert_same_state(state_of(loaded(tmp_path / "saved").vit.embeddings), embeddings)
