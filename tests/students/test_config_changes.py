"""Fields of a student's config are set where they are read, or refused by name."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from hf_blockkd import find_layer_stack, make_student

from ..helpers import tiny_models as tiny


def tiny_llava() -> PreTrainedModel:
    vision = transformers.CLIPVisionConfig(**{**tiny.VISION, "num_hidden_layers": 2})
    text = transformers.LlamaConfig(**tiny.DECODER)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=60)
    return transformers.LlavaForConditionalGeneration(config)


def tiny_bert_to_bert() -> PreTrainedModel:
    encoder, decoder = transformers.BertConfig(**tiny.TEXT), transformers.BertConfig(**tiny.TEXT)
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    return transformers.EncoderDecoderModel(config)


@pytest.mark.parametrize(
    ("teacher", "field", "near"),
    [
        (tiny.tiny_bert, "intermediate_sizes", "intermediate_size"),
        (tiny.tiny_vit, "num_attention_head", "num_attention_heads"),
        (tiny.tiny_gpt2, "n_embed", "n_embd"),
        (tiny_llava, "intermediate_sizes", "intermediate_size"),
        (tiny_llava, "patchsize", "patch_size"),
    ],
)
def test_a_field_that_no_part_has_is_refused_with_the_nearest(teacher, field, near):
    with pytest.raises(ValueError, match=f"`{field}` is no field of .*; did you mean `{near}`"):
        make_student(teacher(), 2, **{field: 16})


@pytest.mark.parametrize("field", ["to_dict", "model_type", "quux"])
def test_what_a_config_has_beside_its_fields_is_refused(field):
    with pytest.raises(ValueError, match=f"`{field}` is no field of BertConfig"):
        make_student(tiny.tiny_bert(), 2, **{field: 16})


def test_the_dtype_is_no_field_that_is_set():
    with pytest.raises(ValueError, match="pass `dtype`"):
        make_student(tiny.tiny_bert(), torch_dtype="float32")


def test_a_field_of_several_parts_is_set_on_that_of_the_layers():
    student = make_student(tiny_llava(), 2, intermediate_size=16)
    assert student.model.language_model.layers[0].mlp.up_proj.out_features == 16
    assert student.config.vision_config.intermediate_size == 24
    path = "model.vision_tower.encoder.layers"
    student = make_student(tiny_llava(), 1, layers_path=path, intermediate_size=16)
    assert student.model.vision_tower.encoder.layers[0].mlp.fc1.out_features == 16
    assert student.config.text_config.intermediate_size == 24


def test_of_an_encoder_and_a_decoder_alike_the_one_with_the_layers_changes():
    student = make_student(tiny_bert_to_bert(), 2, intermediate_size=16)
    assert (student.config.decoder.intermediate_size, student.config.encoder.intermediate_size) == (16, 24)
    assert (student.config.decoder.num_hidden_layers, student.config.encoder.num_hidden_layers) == (2, 3)


def test_a_field_of_another_part_alone_is_set_there():
    student = make_student(tiny_llava(), 2, patch_size=2)
    assert student.config.vision_config.patch_size == 2
    assert make_student(tiny_llava(), 2, projector_hidden_act="relu").config.projector_hidden_act == "relu"


def test_a_model_without_heads_has_any_smaller_width():
    config = transformers.MambaConfig(hidden_size=16, num_hidden_layers=3, vocab_size=64, state_size=4)
    teacher = tiny.scrambled(transformers.MambaForCausalLM(config))
    student = make_student(teacher, 2, hidden_size=6)
    assert (student.config.hidden_size, student.config.intermediate_size) == (6, 12)
    kept = make_student(teacher, parameters=0.5).config
    assert (kept.num_hidden_layers, kept.hidden_size) == (2, 12)


def test_fields_that_are_derived_from_the_width_follow_it():
    student = make_student(tiny.build("DebertaV2", "SequenceClassification", tiny.TEXT, {}), hidden_size=8)
    assert student.config.pooler_hidden_size == 8
    own = tiny.tiny_deberta(pooler_hidden_size=16, hidden_size=16)
    assert make_student(own, hidden_size=8).config.pooler_hidden_size == 8


def test_heads_of_encoder_and_decoder_keep_their_size_alike():
    config = make_student(tiny.tiny_bart(), hidden_size=8).config
    assert (config.encoder_attention_heads, config.decoder_attention_heads) == (1, 1)
    assert (config.encoder_ffn_dim, config.decoder_ffn_dim) == (12, 12)


def test_layers_that_differ_in_a_config_are_thinned_out_with_it():
    config = transformers.Gemma4TextConfig(
        **{name: value for name, value in tiny.TEXT.items() if name != "num_attention_heads"},
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        global_head_dim=16,
        hidden_size_per_layer_input=0,
        layer_types=["sliding_attention", "full_attention", "full_attention"],
    )
    teacher = tiny.scrambled(transformers.Gemma4ForCausalLM(config)).eval()
    student = make_student(teacher, layers=[0, 2])
    wanted = [layer.self_attn.head_dim for layer in teacher.model.layers]
    assert [layer.self_attn.head_dim for layer in student.model.layers] == [wanted[0], wanted[2]] == [8, 16]
    same = [
        torch.equal(a, b)
        for a, b in zip(
            student.model.layers[1].state_dict().values(), teacher.model.layers[2].state_dict().values(), strict=True
        )
    ]
    assert all(same)


@pytest.mark.parametrize("family", ["swin", "resnet"])
def test_a_model_of_stages_has_no_one_width(family):
    with pytest.raises(
        ValueError, match=r"Config has no one width, .* that `hidden_size` could set; give those of its"
    ):
        make_student(getattr(tiny, f"tiny_{family}")(), hidden_size=8)


def test_the_width_is_that_of_the_part_with_the_layers():
    student = make_student(tiny_llava(), 2, hidden_size=8)
    assert (student.config.text_config.hidden_size, student.config.vision_config.hidden_size) == (8, 16)


def test_fields_that_every_config_has_reach_the_head():
    assert make_student(tiny.tiny_bert(), 2, num_labels=7).classifier.out_features == 7


def test_a_field_may_be_named_as_the_family_names_it():
    student = make_student(tiny.tiny_gpt2(), 2, n_inner=24)
    assert student.transformer.h[0].mlp.c_fc.weight.shape == (16, 24)
    assert make_student(tiny.tiny_gpt2(), hidden_size=8, n_embd=8).config.n_embd == 8


@pytest.mark.parametrize(
    ("teacher", "arguments", "message"),
    [
        ("llama", {"num_layers": 2, "num_hidden_layers": 3}, "`num_hidden_layers` is 3, but .* have 2 layers"),
        ("llama", {"num_hidden_layers": 2}, "`num_hidden_layers` is 2, but the student is to have 3 layers; set its"),
        ("llama", {"num_hidden_layers": 0}, "`num_hidden_layers` is 0"),
        ("qwen3", {"num_layers": 2, "num_hidden_layers": 3}, "`num_hidden_layers` is 3, but .* have 2 layers"),
        ("gpt2", {"num_layers": 2, "n_layer": 3}, "`n_layer` is 3, but .* have 2 layers"),
        ("gpt2", {"num_layers": 2, "num_hidden_layers": 3}, "`num_hidden_layers` is 3, but .* have 2 layers"),
        ("bart", {"num_layers": 2, "decoder_layers": 3}, "`decoder_layers` is 3, but .* have 2 layers"),
        ("t5", {"num_layers": 2, "num_decoder_layers": 3}, "`num_decoder_layers` is 3, but .* have 2 layers"),
        ("gpt2", {"hidden_size": 8, "n_embd": 16}, "`hidden_size` is 8 and `n_embd` is 16, but both set one field of"),
        ("gpt2", {"n_head": 4, "num_attention_heads": 2}, "`n_head` is 4 and `num_attention_heads` is 2, but both"),
        ("bert", {"num_attention_heads": 3}, "With `num_attention_heads=3`, the config builds no .* not a multiple"),
        ("gpt2", {"num_attention_heads": 3}, "With `num_attention_heads=3`, the config builds no GPT2LMHeadModel"),
        ("llama", {"num_attention_heads": 3}, "With `num_attention_heads=3`, .* not a multiple"),
        ("llama", {"num_key_value_heads": 3}, "`num_key_value_heads=3`, .* do not divide into 3 groups"),
        ("qwen3", {"num_key_value_heads": 3}, "`num_key_value_heads=3`, .* do not divide into 3 groups"),
        (
            "qwen3",
            {"num_layers": 2, "layer_types": ["full_attention"] * 3},
            "`layer_types` needs one entry for each of",
        ),
        ("qwen3", {"layer_types": ["full_attention"]}, "each of the student's 3 layers, but has 1"),
        ("qwen3", {"layer_types": ["other"] * 3}, "`layer_types` entries must be in"),
        ("bert", {"intermediate_size": "a"}, "`intermediate_size` is 'a', which BertConfig refuses"),
        ("bert", {"hidden_act": "other"}, "With `hidden_act='other'`, the config builds no"),
        ("bert", {"pad_token_id": 1000}, "With `pad_token_id=1000`, the config builds no"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_sentence(teacher, arguments, message):
    teacher = getattr(tiny, f"tiny_{teacher}")()
    before = copy.deepcopy(teacher.config)
    with pytest.raises(ValueError, match=message) as caught:
        make_student(teacher, **arguments)
    assert "\n" not in str(caught.value)
    assert teacher.config == before


def test_a_depth_that_is_given_twice_alike_is_none_too_many():
    assert len(find_layer_stack(make_student(tiny.tiny_llama(), 2, num_hidden_layers=2))) == 2
    student = make_student(tiny.tiny_bart(), 2, encoder_layers=1)
    assert (student.config.decoder_layers, student.config.encoder_layers) == (2, 1)


@pytest.mark.parametrize("num_layers", [2, 4])
def test_what_the_class_derives_from_a_field_follows_it(num_layers):
    """Layers read `layer_types`, and not the patterns that it is made of where it is not given."""
    teacher = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**{**tiny.DECODER, "num_hidden_layers": 4}))
    student = make_student(teacher, num_layers, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    assert student.config.layer_types == ["full_attention"] + ["sliding_attention"] * (num_layers - 1)
    fields = {"attention_types": [[["global", "local"], 2]], "window_size": 4, "num_heads": 2, "num_layers": 4}
    neo = transformers.GPTNeoForCausalLM(transformers.GPTNeoConfig(hidden_size=16, vocab_size=64, **fields))
    student = make_student(neo, num_layers, attention_types=[[["local"], num_layers]])
    assert student.transformer.h[0].attn.attention_type == "local"
    with pytest.raises(ValueError, match="With `attention_types="):
        make_student(neo, attention_types=[[["local"], 5]])


def test_what_a_teacher_has_of_its_own_does_not_follow():
    teacher = tiny.tiny_qwen3(head_dim=4, num_attention_heads=4)
    config = make_student(teacher, num_attention_heads=2).config
    assert (config.head_dim, config.num_key_value_heads) == (4, 1)
    plain = transformers.LlamaForCausalLM(transformers.LlamaConfig(**tiny.TEXT))
    config = make_student(plain, num_attention_heads=1).config
    assert (config.head_dim, config.num_key_value_heads) == (16, 1)


def test_a_whole_part_of_a_config_is_refused():
    with pytest.raises(ValueError, match="`text_config` is a whole LlamaConfig"):
        make_student(tiny_llava(), 2, text_config={"intermediate_size": 16})


def test_what_is_as_long_as_the_depth_by_chance_stays_whole():
    teacher = tiny.tiny_vit(num_hidden_layers=2, image_size=[8, 12])
    assert make_student(teacher, num_layers=1).config.image_size == [8, 12]
    teacher = tiny.tiny_llama(num_hidden_layers=2, eos_token_id=[2, 3])
    assert make_student(teacher, num_layers=1).config.eos_token_id == [2, 3]


def test_a_pair_of_numbers_of_another_kind_stays_whole_in_a_model_of_two_layers():
    teacher = tiny.build(
        "Bamba", "CausalLM", tiny.DECODER, {"num_hidden_layers": 2, "attn_layer_indices": [0, 1], "mamba_n_heads": 4}
    )
    assert make_student(teacher, layers=[1]).config.time_step_limit == teacher.config.time_step_limit


def test_layers_that_a_reload_makes_others_are_refused():
    kinds = ["sliding_attention", "full_attention"] * 2
    fields = {"num_hidden_layers": 4, "layer_types": kinds, "sliding_window": 4, "hidden_size_per_layer_input": 0}
    config = transformers.Gemma4TextConfig(**{**tiny.DECODER, **fields})
    teacher = transformers.Gemma4ForCausalLM(config).eval()
    with pytest.raises(ValueError, match=r"`layer_types` would be .* makes .* when it is loaded; choose other layers"):
        make_student(teacher, layers=[0, 2])
    assert make_student(teacher, layers=[0, 1]).config.layer_types == kinds[:2]
