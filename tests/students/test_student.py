from __future__ import annotations

import pytest
import torch
import transformers
from transformers import AutoModelForImageClassification

from hf_blockkd import UnsupportedArchitectureError, check_routing, find_layer_stack, make_student
from hf_blockkd.routing.dummy_inputs import dummy_inputs

from ..helpers import tiny_models as tiny

TEACHERS = {
    "vit": tiny.tiny_vit,
    "dinov2": tiny.tiny_dinov2,
    "siglip": tiny.tiny_siglip,
    "bert": tiny.tiny_bert,
    "distilbert": tiny.tiny_distilbert,
    "modernbert": tiny.tiny_modernbert,
    "deberta": tiny.tiny_deberta,
    "gpt2": tiny.tiny_gpt2,
    "llama": tiny.tiny_llama,
    "qwen3": tiny.tiny_qwen3,
    "gemma3": tiny.tiny_gemma3,
    "t5": tiny.tiny_t5,
    "bart": tiny.tiny_bart,
}
NARROW = ("vit", "dinov2", "siglip", "bert", "modernbert", "gpt2", "llama", "qwen3", "gemma3")


@torch.no_grad()
def logits_of(model: torch.nn.Module) -> torch.Tensor:
    return model(**dummy_inputs(model)).logits


def layer_weights(model: torch.nn.Module) -> list[dict[str, torch.Tensor]]:
    return [layer.state_dict() for layer in find_layer_stack(model).layers]


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("name", TEACHERS)
def test_a_student_with_all_layers_gives_the_teachers_logits_to_the_bit(name):
    teacher = TEACHERS[name]()
    student = make_student(teacher)
    assert type(student) is type(teacher)
    assert torch.equal(logits_of(student), logits_of(teacher))
    shared = {p.data_ptr() for p in student.parameters()} & {p.data_ptr() for p in teacher.parameters()}
    assert not shared


@pytest.mark.parametrize("name", TEACHERS)
@pytest.mark.parametrize("chosen", [[0, 2], [0]])
def test_a_student_is_the_teacher_without_the_other_layers(name, chosen):
    teacher = TEACHERS[name]()
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    student = make_student(teacher, layers=chosen)
    kept = layer_weights(teacher)
    assert all(same(ours, kept[i]) for ours, i in zip(layer_weights(student), chosen, strict=True))

    path = find_layer_stack(teacher).path
    outside = {key: value for key, value in student.state_dict().items() if not key.startswith(f"{path}.")}
    assert all(torch.equal(value, teacher.state_dict()[key]) for key, value in outside.items())
    assert same(before, teacher.state_dict())
    assert len(find_layer_stack(teacher)) == tiny.LAYERS
    assert logits_of(student).shape == logits_of(teacher).shape
    assert check_routing(student).max_abs_error == 0.0


def test_a_first_layer_from_further_up_keeps_what_first_layers_alone_have():
    """In T5, layer 0 holds the position bias that all the layers use."""
    teacher = tiny.tiny_t5()
    student = make_student(teacher, layers=[1, 2])
    attention = [model.decoder.block[0].layer[0].SelfAttention for model in (student, teacher)]
    assert torch.equal(attention[0].relative_attention_bias.weight, attention[1].relative_attention_bias.weight)
    assert torch.equal(attention[0].q.weight, teacher.decoder.block[1].layer[0].SelfAttention.q.weight)


def test_stages_are_thinned_out_with_their_depths():
    student = make_student(tiny.tiny_swin(depths=[1, 2]), layers=[1])
    assert (student.config.depths, len(find_layer_stack(student))) == ([2], 1)


@pytest.mark.parametrize(
    ("depth", "num_layers", "layers", "chosen"),
    [
        (6, 3, "even", [0, 2, 5]),
        (6, 2, "even", [0, 5]),
        (6, 1, "even", [0]),
        (6, 6, "even", [0, 1, 2, 3, 4, 5]),
        (6, 3, "outer", [0, 1, 5]),
        (6, 4, "outer", [0, 1, 4, 5]),
        (6, 1, "outer", [0]),
        (6, None, [1, 4], [1, 4]),
        (6, 2, [1, 4], [1, 4]),
    ],
)
def test_layers_are_chosen_as_asked(depth, num_layers, layers, chosen):
    teacher = tiny.tiny_vit(num_hidden_layers=depth)
    student = make_student(teacher, num_layers, layers=layers)
    kept = layer_weights(teacher)
    assert [next(i for i in range(depth) if same(ours, kept[i])) for ours in layer_weights(student)] == chosen


def test_lists_with_an_entry_for_each_layer_are_thinned_out_alike():
    teacher = tiny.tiny_qwen3(num_hidden_layers=4)
    student = make_student(teacher, layers=[1, 2, 3])
    assert student.config.num_hidden_layers == 3
    assert student.config.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]
    assert teacher.config.layer_types == ["full_attention", "sliding_attention"] * 2


def test_the_encoder_of_an_encoder_decoder_stays_whole():
    for teacher in (tiny.tiny_t5(num_layers=3), tiny.tiny_bart(encoder_layers=3)):
        student = make_student(teacher, num_layers=1)
        ours, theirs = student.get_encoder().state_dict(), teacher.get_encoder().state_dict()
        assert same(ours, theirs)
        assert len(find_layer_stack(student)) == 1


def test_the_encoder_is_thinned_out_where_the_path_names_it():
    student = make_student(tiny.tiny_bart(), layers=[1], layers_path="model.encoder.layers")
    assert len(student.model.encoder.layers) == 1
    assert len(student.model.decoder.layers) == 3


@pytest.mark.parametrize("name", NARROW)
def test_a_narrower_student_keeps_the_size_of_a_head_and_what_fits(name):
    teacher = TEACHERS[name]()
    student = make_student(teacher, num_layers=2, hidden_size=8)
    inputs = dummy_inputs(teacher)
    with torch.no_grad():
        assert student(**inputs).logits.shape == teacher(**inputs).logits.shape
    shrunk = sum(p.numel() for p in student.parameters()) / sum(p.numel() for p in teacher.parameters())
    assert shrunk < 0.75
    ours, theirs = student.state_dict(), teacher.state_dict()
    stack = find_layer_stack(student).path
    for key in ours.keys() & theirs.keys():
        if not key.startswith(f"{stack}.") and ours[key].shape == theirs[key].shape:
            assert torch.equal(ours[key], theirs[key]), key
    assert check_routing(student).max_abs_error == 0.0


def test_the_heads_of_a_narrower_student_and_its_mlp_shrink_in_proportion():
    teacher = tiny.tiny_llama(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64)
    config = make_student(teacher, hidden_size=16).config
    assert (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size) == (2, 1, 32)
    assert config.head_dim == 8
    # Three heads are no part of two groups of two.
    with pytest.raises(UnsupportedArchitectureError, match=r"q_proj.weight would have the shape \(24, 24\) .* no part"):
        make_student(teacher, hidden_size=24)


def test_more_fields_of_the_config_can_be_given():
    student = make_student(tiny.tiny_vit(), num_layers=2, intermediate_size=8)
    assert student.config.intermediate_size == 8
    assert logits_of(student).shape == (2, tiny.LABELS)


def test_tied_embeddings_stay_tied_and_untied_ones_untied():
    for tied in (True, False):
        student = make_student(tiny.tiny_gpt2(tie_word_embeddings=tied), num_layers=2)
        assert (student.lm_head.weight is student.transformer.wte.weight) is tied


@pytest.mark.parametrize("training", [True, False])
def test_a_student_has_the_teachers_mode_dtype_and_labels(training):
    names = {0: "cat", 1: "dog"}
    teacher = tiny.tiny_vit(id2label=names, label2id={"cat": 0, "dog": 1}, num_labels=2)
    student = make_student(teacher.to(torch.bfloat16).train(training), num_layers=1)
    assert student.training is training
    assert {parameter.dtype for parameter in student.parameters()} == {torch.bfloat16}
    assert student.config.id2label == names
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_a_student_of_a_frozen_teacher_trains():
    student = make_student(tiny.tiny_vit().requires_grad_(False), num_layers=1)
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_a_student_can_be_saved_and_loaded(tmp_path):
    student = make_student(tiny.tiny_vit(), num_layers=2, hidden_size=8)
    student.save_pretrained(tmp_path)
    loaded, info = AutoModelForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(logits_of(loaded), logits_of(student))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_layers": 4}, "`num_layers` is 4, but must be from 1 to the teacher's depth, 3"),
        ({"num_layers": 0}, "`num_layers` is 0"),
        ({"layers": []}, r"`layers` is \[\], but must be a rising list of layer indices from 0 to 2"),
        ({"layers": [1, 1]}, r"`layers` is \[1, 1\]"),
        ({"layers": [2, 1]}, r"`layers` is \[2, 1\]"),
        ({"layers": [-1, 1]}, r"`layers` is \[-1, 1\]"),
        ({"layers": [0, 3]}, r"`layers` is \[0, 3\]"),
        ({"layers": [0, 1], "num_layers": 3}, "`num_layers` is 3, but `layers` names 2 layers"),
        ({"layers": "odd"}, "`layers` is 'odd'; choose 'even', 'outer'"),
        ({"hidden_size": 12}, "`hidden_size` is 12, but must be a multiple of the teacher's head size, 8"),
        ({"hidden_size": 24}, "`hidden_size` is 24, .* at most its width, 16"),
        ({"hidden_size": 0}, "`hidden_size` is 0"),
    ],
)
def test_what_does_not_fit_the_teacher_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_student(tiny.tiny_vit(), **arguments)


def test_a_depth_that_no_field_of_the_config_sets_is_refused():
    teacher = tiny.tiny_resnet()
    with pytest.raises(ValueError, match=r"ResNetForImageClassification has no field that sets the depth of 'resnet\."):
        make_student(teacher, num_layers=1)
    assert teacher.config.depths == [1, 1]


def test_layers_of_which_no_model_can_be_built_are_refused():
    """The first layers of Zamba that share weights are alone, once the others are gone."""
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "mamba_d_state": 4, "n_mamba_heads": 2, "vocab_size": 64}
    kinds = {"num_hidden_layers": 4, "layers_block_type": ["hybrid", "mamba", "hybrid", "mamba"]}
    config = transformers.ZambaConfig(**sizes, **kinds, intermediate_size=24)
    teacher = tiny.scrambled(transformers.ZambaForCausalLM(config))
    with pytest.raises(
        ValueError, match=r"ZambaForCausalLM cannot be built of the layers \[0\] alone: .*; choose other"
    ):
        make_student(teacher, layers=[0])


def test_tensors_of_a_chosen_layer_without_a_place_are_named(caplog):
    """ModernBERT's first layer has no norm before its attention, so the norm of a layer that becomes the first goes."""
    with caplog.at_level("WARNING", logger="hf_blockkd"):
        make_student(tiny.tiny_modernbert(), layers=[1, 2])
    assert "no place for 1 of the tensors in the layers [1, 2]" in caplog.text
    assert "attn_norm" in caplog.text
