"""A stepping stone generates with one cache for two models whose layers keep keys of other kinds and windows."""

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

from hf_blockkd.ladder.making import stone_model
from hf_blockkd.ladder.stone_model import CACHES, SteppingStone
from hf_blockkd.pairing.pair import Pair

from ..helpers.tiny_models import (
    DECODER,
    TEXT,
    build,
    tiny_bart,
    tiny_gemma3,
    tiny_gpt2,
    tiny_llama,
    tiny_mistral,
)

NARROW = {"num_hidden_layers": 2, "hidden_size": 8}
LINEAR = {
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}


def tiny_qwen3_next(kinds, **config):
    types = {"l": "linear_attention", "f": "full_attention"}
    fields = {"num_hidden_layers": len(kinds), "layer_types": [types[kind] for kind in kinds]}
    return build("Qwen3Next", "CausalLM", {**DECODER, **LINEAR}, {**fields, **config})


def tiny_deepseek(**config):
    """Its first layers are dense, and none of the others can take their place: it is not cut in depth."""
    sizes = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "n_shared_experts": 1}
    fields = {**TEXT, "num_key_value_heads": 2, **sizes, **experts, "moe_intermediate_size": 8}
    return build("DeepseekV3", "CausalLM", {**fields, "num_hidden_layers": 4, "first_k_dense_replace": 2}, config)


def tiny_mamba(**config):
    fields = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 4, "state_size": 4, "time_step_rank": 2}
    return build("Mamba", "CausalLM", {**fields, "pad_token_id": 0}, config)


PAIRS = {
    "window, none": lambda: (tiny_mistral(**NARROW), tiny_llama()),
    "none, window": lambda: (tiny_llama(**NARROW), tiny_mistral()),
    "longer window": lambda: (tiny_mistral(**NARROW, sliding_window=8), tiny_mistral()),
    "shorter window": lambda: (tiny_mistral(**NARROW, sliding_window=3), tiny_mistral(sliding_window=8)),
    "kinds of one model": lambda: (tiny_gpt2(n_layer=2), tiny_gemma3()),
    "skipped layers": lambda: (tiny_deepseek(hidden_size=8), tiny_deepseek()),
    "linear attention in one": lambda: (tiny_qwen3_next("lf", hidden_size=8), tiny_qwen3_next("lllf")),
    "linear attention in the other": lambda: (tiny_llama(**NARROW), tiny_qwen3_next("flll")),
}


def prompts():
    """Two of unequal length, padded on the left."""
    ids, mask = torch.randint(3, 60, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    ids[0, :3] = mask[0, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


def stone_of(pair, index):
    stone = stone_model(pair, index)
    for parameter in stone.connector.parameters():
        torch.nn.init.normal_(parameter)
    stone.generation_config.update(eos_token_id=None, pad_token_id=0)
    return stone


def logits(model, inputs, **options):
    options |= {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    return torch.stack(model.generate(**inputs, **options).logits)


@pytest.mark.parametrize("index", [1, 2])
@pytest.mark.parametrize("name", PAIRS)
def test_two_models_of_other_kinds_of_layers_share_a_cache(name, index):
    stone, inputs = stone_of(Pair(*PAIRS[name](), num_blocks=2), index), prompts()
    expected = logits(stone, inputs, use_cache=False)
    torch.testing.assert_close(logits(stone, inputs, use_cache=True), expected, rtol=1e-4, atol=1e-4)
    if "linear" not in name:
        static = logits(stone, inputs, cache_implementation="static")
        torch.testing.assert_close(static, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("index", [1, 2])
def test_models_without_attention_whose_kinds_of_layers_cannot_be_set(index):
    stone, inputs = stone_of(Pair(tiny_mamba(hidden_size=8), tiny_mamba(), num_blocks=2), index), prompts()
    expected = logits(stone, inputs, use_cache=False)
    torch.testing.assert_close(logits(stone, inputs, use_cache=True), expected, rtol=1e-4, atol=1e-4)


MIXED = {
    "states, keys": lambda: (tiny_mamba(hidden_size=8), tiny_llama()),
    "keys, states": lambda: (tiny_llama(**NARROW), tiny_mamba()),
    "none that counts": lambda: (tiny_qwen3_next("ll", hidden_size=8), tiny_qwen3_next("lflf")),
}


@pytest.mark.parametrize("index", [1, 2])
@pytest.mark.parametrize("name", MIXED)
def test_padding_stays_unseen_where_one_model_has_no_attention_or_none_that_runs(name, index):
    ends = {"teacher_boundaries": [2, 4]} if name == "none that counts" else {}
    stone, inputs = stone_of(Pair(*MIXED[name](), num_blocks=2, **ends), index), prompts()
    expected = logits(stone, inputs, use_cache=False)
    torch.testing.assert_close(logits(stone, inputs, use_cache=True), expected, rtol=1e-4, atol=1e-4)
    unpadded = {key: value[:1, 3:] for key, value in inputs.items()}
    torch.testing.assert_close(logits(stone, unpadded)[:, 0], expected[:, 0], rtol=1e-4, atol=1e-4)


def tiny_rwkv(width=16):
    fields = {"vocab_size": 64, "hidden_size": width, "attention_hidden_size": width, "num_hidden_layers": 4}
    return build("Rwkv", "CausalLM", fields, {"intermediate_size": 24, "context_length": 40})


@pytest.mark.parametrize("teacher", [tiny_rwkv, tiny_llama])
def test_a_model_with_a_cache_of_its_own_kind_generates_without_one(teacher):
    stone = stone_of(Pair(tiny_rwkv(8), teacher(), num_blocks=2), 1)
    inputs = {"input_ids": torch.randint(3, 60, (2, 9))}
    with pytest.raises(ValueError, match=r"a DynamicCache, which .* of RwkvForCausalLM and .* cannot fill .* leave it"):
        stone(**inputs, past_key_values=DynamicCache())
    cached, expected = (logits(stone, inputs, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached, expected)


@pytest.mark.parametrize("name", ["window, none", "none, window"])
@pytest.mark.parametrize("index", [1, 2])
def test_a_stone_drafts_and_is_drafted_for(name, index):
    student, teacher = PAIRS[name]()
    stone, options = stone_of(Pair(student, teacher, num_blocks=2), index), {"max_new_tokens": 8, "do_sample": False}
    ids = {"input_ids": prompts()["input_ids"][1:], "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(stone.generate(**ids, **options, assistant_model=student), stone.generate(**ids, **options))
    assert torch.equal(teacher.generate(**ids, **options, assistant_model=stone), teacher.generate(**ids, **options))


@torch.no_grad()
def test_a_cache_of_ones_own_is_filled_and_goes_on():
    stone, inputs = stone_of(Pair(tiny_mistral(**NARROW), tiny_llama(), num_blocks=2), 1), prompts()
    whole = stone(**inputs, use_cache=False).logits
    for cache in (DynamicCache(), StaticCache(config=stone.config, max_cache_len=12)):
        head = stone(
            input_ids=inputs["input_ids"][:, :5], attention_mask=inputs["attention_mask"][:, :5], past_key_values=cache
        )
        rest = stone(
            input_ids=inputs["input_ids"][:, 5:], attention_mask=inputs["attention_mask"], past_key_values=cache
        )
        found = torch.cat([head.logits, rest.logits], 1)
        seen = inputs["attention_mask"].bool()
        torch.testing.assert_close(found[seen], whole[seen], rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("as_tuple", [False, True])
def test_what_a_forward_returns_goes_on_in_the_next(as_tuple):
    stone, ids = stone_of(Pair(tiny_mistral(**NARROW), tiny_llama(), num_blocks=2), 1), prompts()["input_ids"]
    options = {"use_cache": True, "return_dict": not as_tuple}
    head = stone(input_ids=ids[:, :5], **options)
    rest = stone(input_ids=ids[:, 5:], past_key_values=head[1], **options)
    expected = stone(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(torch.cat([head[0], rest[0]], 1), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_so_it_does_with_an_encoder():
    stone = stone_of(Pair(tiny_bart(decoder_layers=2, d_model=8), tiny_bart(), num_blocks=2), 1)
    inputs, written = prompts(), torch.randint(3, 60, (2, 6))
    head = stone(**inputs, decoder_input_ids=written[:, :4], use_cache=True)
    assert isinstance(head.past_key_values, EncoderDecoderCache)
    rest = stone(**inputs, decoder_input_ids=written[:, 4:], past_key_values=head.past_key_values)
    expected = stone(**inputs, decoder_input_ids=written).logits
    torch.testing.assert_close(torch.cat([head.logits, rest.logits], 1), expected, rtol=1e-4, atol=1e-4)


def test_the_cache_of_another_model_is_refused():
    teacher = tiny_llama()
    stone, inputs = stone_of(Pair(tiny_llama(**NARROW), teacher, num_blocks=2), 1), prompts()
    with pytest.raises(ValueError, match="DynamicCache of 3 layers that hold what another model wrote; pass an empty"):
        stone(**inputs, past_key_values=teacher(**inputs, use_cache=True).past_key_values)
    teacher = tiny_mamba()  # whose layers keep states in place of keys
    stone = stone_of(Pair(tiny_mamba(hidden_size=8), teacher, num_blocks=2), 1)
    outputs = teacher(**inputs, use_cache=True)
    with pytest.raises(ValueError, match="DynamicCache of 4 layers that hold what another model wrote"):
        stone(**inputs, past_key_values=next(outputs[name] for name in CACHES if name in outputs))
    sliding = stone_of(Pair(tiny_llama(**NARROW), tiny_mistral(), num_blocks=2), 1)
    cache = StaticCache(config=sliding.config, max_cache_len=12)  # whose layers know of their windows alone
    with pytest.raises(ValueError, match=r"StaticCache of .* layers of which those of two models cannot be made"):
        sliding(**inputs, past_key_values=cache)


@pytest.mark.parametrize("index", [1, 2])
def test_so_do_an_encoder_and_a_decoder_whose_cache_is_static(index):
    stone = stone_of(Pair(tiny_bart(decoder_layers=2, d_model=8), tiny_bart(), num_blocks=2), index)
    assert isinstance(stone, SteppingStone)
    stone.generation_config.update(forced_eos_token_id=None)
    inputs = prompts()
    expected = logits(stone, inputs, use_cache=False)
    for options in ({"use_cache": True}, {"cache_implementation": "static"}):
        torch.testing.assert_close(logits(stone, inputs, **options), expected, rtol=1e-4, atol=1e-4)
