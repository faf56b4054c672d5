"""The rules by which any family's default config becomes a tiny one."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers
from torch import nn

from hf_blockkd.routing.dummy_inputs import SEQUENCE_LENGTH

BENCHMARKS = Path(__file__).resolve().parents[2] / "examples" / "benchmarks"


def load(name: str) -> ModuleType:
    """A module of the benchmarks, whose folder is no package."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


rules = load("tiny_configs")


def tiny(name: str, **fields) -> transformers.PreTrainedConfig:
    return rules.tiny_config(getattr(transformers, f"{name}Config")(), **fields)


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("Llama", {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 24}),
        ("Llama", {"vocab_size": 128, "max_position_embeddings": 64, "intermediate_size": 96}),
        ("GPT2", {"n_embd": 96, "n_layer": 4, "n_head": 4, "n_positions": 64}),
        ("T5", {"d_model": 96, "num_layers": 4, "num_decoder_layers": 4, "num_heads": 4, "d_kv": 24, "d_ff": 96}),
        ("Bart", {"encoder_layers": 4, "decoder_layers": 4, "encoder_ffn_dim": 96, "decoder_attention_heads": 4}),
        ("ViT", {"image_size": 64, "patch_size": 16, "num_channels": 3}),
        ("Swin", {"depths": (2, 2, 2, 2), "num_heads": (2, 4, 4, 4), "window_size": 2, "embed_dim": 96}),
        ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    ],
)
def test_sizes_become_small_by_what_they_mean(family, fields):
    config = tiny(family)
    assert {name: getattr(config, name) for name in fields} == fields


def test_what_is_no_size_stays_as_it_is():
    default, config = transformers.Gemma2Config(), tiny("Gemma2")
    for name in ("hidden_activation", "rms_norm_eps", "attn_logit_softcapping", "attention_bias", "rope_parameters"):
        assert getattr(config, name) == getattr(default, name), name
    assert tiny("ConvNext").patch_size == transformers.ConvNextConfig().patch_size == 4


def test_fields_given_by_hand_win():
    assert tiny("Llama", num_hidden_layers=7, pad_token_id=5).to_dict().items() >= {
        ("num_hidden_layers", 7),
        ("pad_token_id", 5),
    }


def test_the_given_config_is_left_alone():
    default = transformers.Gemma3TextConfig()
    rules.tiny_config(default)
    assert default.to_dict() == transformers.Gemma3TextConfig().to_dict()


@pytest.mark.parametrize(("family", "heads"), [("Llama", 4), ("Mistral", 2), ("Gemma", 4), ("Falcon", 4)])
def test_keys_have_fewer_heads_where_they_had_fewer(family, heads):
    default = getattr(transformers, f"{family}Config")()
    shared = getattr(default, "num_key_value_heads", default.num_attention_heads) < default.num_attention_heads
    assert shared == (heads < 4)
    assert getattr(tiny(family), "num_key_value_heads", 4) == heads


@pytest.mark.parametrize("family", ["Gemma3Text", "Qwen3Next", "GptOss", "Lfm2", "MiniMax", "DeepseekV3", "Gemma4Text"])
def test_every_kind_of_layer_of_the_default_config_occurs(family):
    default, config = getattr(transformers, f"{family}Config")(), tiny(family)
    for name in ("layer_types", "mlp_layer_types"):
        if getattr(default, name, None) is not None:
            assert set(getattr(config, name)) == set(getattr(default, name))
            assert len(getattr(config, name)) == config.num_hidden_layers


def test_runs_of_one_kind_are_shortened_so_that_kinds_alternate_within_the_depth():
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "full_attention"] * 2
    default = transformers.Gemma3TextConfig(num_hidden_layers=8, layer_types=kinds)
    assert rules.tiny_config(default).layer_types == ["sliding_attention", "full_attention"] * 2
    kinds = ["sliding_attention"] * 7 + ["full_attention"]
    default = transformers.Gemma3TextConfig(num_hidden_layers=8, layer_types=kinds)
    assert rules.tiny_config(default).layer_types == ["sliding_attention"] + 3 * ["full_attention"]


def test_lists_of_kinds_are_shortened_together_so_that_no_combination_gets_lost():
    attention = ["full_attention", "sliding_attention"] * 4
    mlp = ["dense"] * 3 + ["sparse"] * 5
    default = transformers.MiMoV2FlashConfig(num_hidden_layers=8, layer_types=attention, mlp_layer_types=mlp)
    config = rules.tiny_config(default)
    before = set(zip(attention, mlp, strict=True))
    assert set(zip(config.layer_types, config.mlp_layer_types, strict=True)) == before
    assert config.num_hidden_layers == len(config.layer_types) == 4


@pytest.mark.parametrize("family", ["Jamba", "Zamba"])
def test_layers_that_alternate_by_a_period_do_so_within_the_depth(family):
    config = tiny(family)
    assert len(set(config.layers_block_type)) == 2


def test_windows_are_shorter_than_the_dummy_inputs():
    assert tiny("Mistral").sliding_window < SEQUENCE_LENGTH
    assert tiny("ModernBert").local_attention < SEQUENCE_LENGTH


def test_nested_configs_become_small_too():
    config = tiny("Gemma3")
    assert (config.text_config.hidden_size, config.vision_config.hidden_size) == (96, 96)
    assert config.image_token_id < config.text_config.vocab_size == 128


def test_widths_that_hang_together_stay_together():
    for config in (transformers.Mamba2Config(), tiny("Mamba2")):
        assert config.num_heads * config.head_dim == config.expand * config.hidden_size
    for config in (transformers.BambaConfig(), tiny("Bamba")):
        assert config.mamba_n_heads * config.mamba_d_head == config.mamba_expand * config.hidden_size
    assert sum(tiny("Reformer").axial_pos_embds_dim) == tiny("Reformer").hidden_size


def test_widths_can_be_kept():
    config = rules.tiny_config(transformers.EfficientNetConfig(), keep_widths=True)
    assert config.hidden_dim == 2560
    assert config.image_size == 64
    config = rules.tiny_config(transformers.LlamaConfig(), keep_widths=True)
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (4096, 4, 128)


def test_fields_that_a_default_config_leaves_open_are_filled():
    assert transformers.LlamaConfig().pad_token_id is None
    assert tiny("Llama").pad_token_id == 0
    assert tiny("Esm").vocab_size == 128


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deberta-v2", "mamba"])
def test_no_parameter_of_a_tiny_model_is_neutral(model_type):
    task = "MASKED_LM" if model_type == "deberta-v2" else "CAUSAL_LM"
    model = rules.tiny_model(task, model_type)
    assert not model.training
    assert all(parameter.numel() < 2 or parameter.std() > 0 for parameter in model.parameters())


def test_a_tiny_model_is_the_same_every_time():
    first, second = (rules.tiny_model("CAUSAL_LM", "llama").state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_batch_norms_know_the_dummy_inputs():
    model = rules.tiny_model("IMAGE_CLASSIFICATION", "resnet")
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    assert all(not norm.running_mean.eq(0).all() for norm in norms)


def test_bert_as_a_causal_language_model_sees_nothing_that_comes_next():
    model = rules.tiny_model("CAUSAL_LM", "bert")
    ids = torch.randint(3, 100, (1, 8))
    changed = ids.clone()
    changed[0, -1] = (ids[0, -1] + 1) % 100
    with torch.no_grad():
        assert torch.equal(model(ids).logits[:, :-1], model(changed).logits[:, :-1])


def test_a_package_that_is_missing_is_named():
    if importlib.util.find_spec("natten"):
        pytest.skip("natten is installed")
    with pytest.raises(ImportError, match="natten"):
        rules.tiny_model("IMAGE_CLASSIFICATION", "dinat")


def test_a_default_config_that_builds_no_model_is_to_blame():
    with pytest.raises(ValueError, match=r"its default config builds no model: .*config\.layer_types\[layer_idx\]"):
        rules.tiny_model("CAUSAL_LM", "lfm2_moe")
