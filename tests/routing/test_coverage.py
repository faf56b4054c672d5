"""Routing through a spread of families, each built from its default config alone; the slow tests take all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_blockkd import UnsupportedArchitectureError, check_routing, find_layer_stack
from hf_blockkd.routing.dummy_inputs import dummy_inputs
from hf_blockkd.routing.entering import capture_states, enter_at, record_extras

from ..examples.test_tiny_configs import BENCHMARKS, load

tiny_model = load("tiny_configs").tiny_model
coverage = load("coverage")

FAMILIES = {
    "albert": "SEQUENCE_CLASSIFICATION",  # one layer, shared
    "bart": "SEQ_TO_SEQ_CAUSAL_LM",
    "bros": "TOKEN_CLASSIFICATION",  # needs boxes
    "canine": "SEQUENCE_CLASSIFICATION",  # characters, no vocabulary
    "deberta-v2": "MASKED_LM",
    "encoder-decoder": "SEQ_TO_SEQ_CAUSAL_LM",
    "falcon": "CAUSAL_LM",  # attention and MLP in parallel
    "falcon_h1": "CAUSAL_LM",  # attention and state space in parallel
    "funnel": "TOKEN_CLASSIFICATION",  # states as queries, keys and values
    "gemma3": "CAUSAL_LM",  # images and text
    "gemma3n_text": "CAUSAL_LM",  # per-layer inputs, keys and values shared between layers
    "git": "CAUSAL_LM",  # images and text, without a decoder by name
    "gpt_neox": "CAUSAL_LM",
    "granitemoehybrid": "CAUSAL_LM",
    "jamba": "CAUSAL_LM",  # state space, attention and experts
    "mamba": "CAUSAL_LM",
    "mixtral": "CAUSAL_LM",
    "mobilenet_v2": "IMAGE_CLASSIFICATION",
    "openai-gpt": "CAUSAL_LM",  # layers that return lists
    "qwen3_moe": "CAUSAL_LM",
    "rwkv": "CAUSAL_LM",
    "siglip2": "IMAGE_CLASSIFICATION",  # images as lists of patches
    "t5": "SEQ_TO_SEQ_CAUSAL_LM",
}


def routed(model: nn.Module, depth: int, states: torch.Tensor, extras: Any, **inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), enter_at(find_layer_stack(model), depth, states, extras):
        return model(**inputs, use_cache=False).logits


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_family_is_exact_at_every_depth_and_other_states_make_other_logits(model_type):
    model = tiny_model(FAMILIES[model_type], model_type)
    report = check_routing(model)
    assert report.max_abs_error == 0.0
    assert report.num_layers == (1 if model_type == "albert" else len(find_layer_stack(model)))
    assert coverage.insensitive_depths(model) == ([], [])


@pytest.mark.parametrize(
    ("model_type", "task", "obstacle"),
    [
        (
            "xlm",
            "MASKED_LM",
            r"XLMWithLMHeadModel keeps the parts of each layer in lists .* \(attentions, ",
        ),
        ("reformer", "CAUSAL_LM", "ReformerModelWithLMHead in 'reformer.encoder.layers' hand on 2 streams"),
        ("hrm_text", "CAUSAL_LM", "HrmTextForCausalLM calls layer 0 of 'model.L_module.layers' after layer 3"),
        ("squeezebert", "MASKED_LM", "SqueezeBertForMaskedLM does not call layer 0 of 'transformer.encoder.layers'"),
        ("mllama", "CAUSAL_LM", "MllamaForCausalLM does not call layer [0-9] of 'model.layers'"),
    ],
)
def test_a_refusal_names_the_obstacle(model_type, task, obstacle):
    with pytest.raises(UnsupportedArchitectureError, match=obstacle):
        check_routing(tiny_model(task, model_type))


@pytest.mark.parametrize(
    ("model_type", "path"),
    [("t5", "encoder.block"), ("bart", "model.encoder.layers"), ("fsmt", "model.encoder.layers")],
)
def test_the_encoder_of_an_encoder_decoder_is_exact_by_its_path(model_type, path):
    model = tiny_model("SEQ_TO_SEQ_CAUSAL_LM", model_type)
    assert "decoder" in check_routing(model).layers_path
    report = check_routing(model, layers_path=path)
    assert (report.layers_path, report.max_abs_error) == (path, 0.0)


@pytest.mark.parametrize("path", [None, "model.encoder.layers"])
def test_sound_is_routed_where_inputs_are_given(path):
    config = load("tiny_configs").tiny_config(transformers.WhisperConfig())
    model = transformers.WhisperForConditionalGeneration(config).eval()
    inputs = {
        "input_features": torch.randn(2, config.num_mel_bins, 2 * config.max_source_positions),
        "decoder_input_ids": torch.randint(3, 100, (2, 5)),
    }
    report = check_routing(model, inputs, path)
    assert (report.layers_path, report.max_abs_error) == (path or "model.decoder.layers", 0.0)


@pytest.mark.parametrize(
    ("model_type", "task", "targets"),
    [
        ("llama", "CAUSAL_LM", ["q_proj", "v_proj"]),
        ("mixtral", "CAUSAL_LM", ["q_proj", "v_proj"]),
        ("t5", "SEQ_TO_SEQ_CAUSAL_LM", ["q", "v"]),
        ("deberta-v2", "SEQUENCE_CLASSIFICATION", ["query_proj"]),
        ("vit", "IMAGE_CLASSIFICATION", ["q_proj"]),
    ],
)
def test_a_model_inside_an_adapter_is_exact(model_type, task, targets):
    model = tiny_model(task, model_type)
    stack, inputs = find_layer_stack(model), dummy_inputs(model)
    wrapped = get_peft_model(model, LoraConfig(target_modules=targets, init_lora_weights=False))
    report = check_routing(wrapped)
    assert report.max_abs_error == 0.0
    assert report.layers_path == f"base_model.model.{stack.path}"
    assert all(torch.equal(tensor, inputs[name]) for name, tensor in dummy_inputs(wrapped).items())


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "jamba"])
def test_the_losses_of_routers_are_as_they_were(model_type):
    model = tiny_model("CAUSAL_LM", model_type)
    model.config.output_router_logits = True
    inputs = dummy_inputs(model)
    with torch.no_grad():
        before = model(**inputs, labels=inputs["input_ids"])
        assert check_routing(model).max_abs_error == 0.0
        after = model(**inputs, labels=inputs["input_ids"])
    assert model.config.output_router_logits
    assert before.aux_loss > 0
    assert torch.equal(before.aux_loss, after.aux_loss)
    assert torch.equal(before.loss, after.loss)


def test_layers_that_share_keys_and_values_get_those_of_the_clean_pass_where_their_owner_is_skipped():
    model = tiny_model("CAUSAL_LM", "gemma3n_text")
    stack = find_layer_stack(model)
    ours, theirs = dummy_inputs(model), dummy_inputs(model, batch_size=5)
    theirs = {name: tensor[3:] for name, tensor in theirs.items()}
    runs = []
    for inputs in (ours, theirs):
        with capture_states(stack, [3]) as states, record_extras(stack) as extras, torch.no_grad():
            clean = model(**inputs, use_cache=False).logits
        runs.append((clean, states[3], extras))
    (own, states, extras), (_, _, other_extras) = runs
    assert torch.equal(routed(model, 3, states, extras, **ours), own)
    assert not torch.equal(routed(model, 3, states, other_extras, **ours), own)


def test_the_text_model_is_found_beside_a_larger_tower_for_images():
    model = tiny_model("CAUSAL_LM", "gemma3")
    tower = next(path for path, one in model.named_modules() if path.endswith("encoder.layers"))
    text = find_layer_stack(model)
    assert "language_model" in text.path
    assert "vision" in tower
    model.get_submodule(tower).extend(model.get_submodule(tower)[0] for _ in range(40))
    assert find_layer_stack(model).path == text.path


def test_a_crash_or_a_hang_of_one_pair_is_a_row_and_not_the_end():
    def examine(task: str, model_type: str) -> dict[str, Any]:
        if model_type == "crashes":
            os._exit(3)
        while model_type == "hangs":
            pass
        if model_type == "eats":
            return {"size": len(bytearray(2**31))}
        return {"task": task, "model_type": model_type, "status": "exact"}

    pairs = [("CAUSAL_LM", name) for name in ("crashes", "hangs", "eats", "works")]
    rows = {row["model_type"]: row for row in coverage.examine_all(examine, pairs, 2, 2.0, 1.0)}
    assert {name: row["status"] for name, row in rows.items()} == {
        "crashes": "broken",
        "hangs": "broken",
        "eats": "broken",
        "works": "exact",
    }
    assert rows["crashes"]["reason"] == "the process ended with exit code 3"
    assert rows["hangs"]["reason"] == "not finished after 2 s"


def test_the_table_counts_every_row_and_gives_every_reason():
    rows = [
        {"task": "CAUSAL_LM", "model_type": "a", "status": "exact", "encoder_max_abs_error": 0.0},
        {"task": "CAUSAL_LM", "model_type": "b", "status": "refused", "reason": "no list in B", "model": "B"},
        {"task": "MASKED_LM", "model_type": "b", "status": "refused", "reason": "no list in BLM", "model": "BLM"},
        {"task": "MASKED_LM", "model_type": "c", "status": "not built", "reason": "ImportError: c"},
    ]
    lines = coverage.table(rows).splitlines()
    assert "| causal lm | 2 | 1 | 1 | 0 | 0 |" in lines
    assert "| masked lm | 2 | 0 | 1 | 1 | 0 |" in lines
    assert "| all | 4 | 1 | 2 | 1 | 0 |" in lines
    assert "- encoders of encoder-decoders, named by their path: 1 of 1 exact" in lines
    assert "- b (causal lm), b (masked lm): no list in the model" in lines
    assert "- c (masked lm): ImportError: c" in lines


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_pair_of_the_auto_mappings_is_exact_or_says_why_not(tmp_path):
    subprocess.run([sys.executable, BENCHMARKS / "coverage.py", "--output_dir", tmp_path], check=True)
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    counts = Counter(row["status"] for row in rows)
    tasks = load("tiny_configs").TASKS
    assert len(rows) == sum(len(load("tiny_configs").model_types(task)) for task in tasks)
    assert counts["exact"] >= 450
    assert not [row for row in rows if row["status"] == "broken"]
    assert all(row["reason"] for row in rows if row["status"] != "exact")
