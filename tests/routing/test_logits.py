"""Caches and router logits are left out of teachers and checks, wherever a config keeps the fields for them."""

from __future__ import annotations

import pytest
import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from hf_blockkd.pairing.pair import Pair
from hf_blockkd.routing.dummy_inputs import dummy_inputs
from hf_blockkd.routing.logits import only_logits, turn_off_the_rest

from ..examples.test_tiny_configs import rules
from ..helpers import tiny_models as tiny
from ..helpers.training import make_trainer, token_rows

tiny_model = rules.tiny_model


def tiny_gemma3_with_images() -> torch.nn.Module:
    return Gemma3ForConditionalGeneration(rules.tiny_config(Gemma3Config())).eval()


def test_a_model_fills_no_cache_inside_the_context_and_does_so_again_after_it():
    model = tiny.tiny_llama()
    inputs = {"input_ids": torch.randint(3, tiny.VOCABULARY, (1, 5))}
    assert model(**inputs).past_key_values is not None
    with only_logits(model):
        assert model(**inputs).past_key_values is None
    assert model(**inputs).past_key_values is not None


def test_the_fields_are_put_back_after_an_error():
    model = tiny.tiny_llama()
    with pytest.raises(IndexError), only_logits(model):
        model(input_ids=torch.tensor([[tiny.VOCABULARY]]))
    assert model.config.use_cache


def test_the_field_of_a_nested_config_counts():
    model = tiny_gemma3_with_images()
    assert model.config.text_config.use_cache
    turn_off_the_rest(model)
    assert not model.config.text_config.use_cache
    assert model(input_ids=torch.randint(3, 60, (1, 5))).past_key_values is None


def test_a_teacher_of_text_and_images_fills_no_cache(tmp_path):
    student, teacher = tiny_gemma3_with_images(), tiny_gemma3_with_images()
    pair = Pair(student, teacher, num_blocks=2)
    inputs = pair.inputs_for("teacher", {"input_ids": torch.randint(3, 60, (1, 5))})
    assert pair.teacher(**inputs).past_key_values is None
    assert teacher.config.text_config.use_cache
    assert student.config.text_config.use_cache


def test_experts_teach_experts_with_router_logits_asked_for(tmp_path):
    student, teacher = (tiny_model("CAUSAL_LM", "mixtral") for _ in range(2))
    for model in (student, teacher):
        model.config.output_router_logits = True
    trainer = make_trainer(tmp_path, student, teacher, token_rows(), num_blocks=4, max_steps=2)
    trainer.train()
    assert set(trainer.stepping_stone_logits(dummy_inputs(teacher))) == {1, 2, 3, 4}
    assert student.config.output_router_logits
