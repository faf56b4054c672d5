from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import BertModel

from hf_blockkd import UnsupportedArchitectureError, check_routing, find_layer_stack
from hf_blockkd.routing.dummy_inputs import dummy_inputs
from hf_blockkd.routing.entering import capture_states, enter_at, record_extras
from hf_blockkd.routing.logits import main_outputs

from ..helpers import tiny_models as tiny

VISION = {
    "vit": tiny.tiny_vit,
    "deit": tiny.tiny_deit,
    "deit with teacher": lambda: tiny.tiny_deit("ImageClassificationWithTeacher"),
    "beit": tiny.tiny_beit,
    "beit relative": lambda: tiny.tiny_beit(use_relative_position_bias=True),
    "beit shared relative": lambda: tiny.tiny_beit(use_shared_relative_position_bias=True),
    "dinov2": tiny.tiny_dinov2,
    "siglip": tiny.tiny_siglip,
    "clip": tiny.tiny_clip,
    "swin": tiny.tiny_swin,
    "resnet": tiny.tiny_resnet,
    "swin padded": lambda: tiny.tiny_stages("Swin", image_size=(35, 21)),
    "swin v2": lambda: tiny.tiny_stages("Swinv2"),
    "pvt": lambda: tiny.tiny_stages("Pvt"),
    "pvt v2": lambda: tiny.tiny_stages("PvtV2"),
    "pvt v2 padded": lambda: tiny.tiny_stages("PvtV2", image_size=(30, 50)),
    "convnext": lambda: tiny.tiny_stages("ConvNext"),
    "mobilevit": lambda: tiny.tiny_stages("MobileViT"),
    "poolformer": lambda: tiny.tiny_stages("PoolFormer"),
    "cvt": lambda: tiny.tiny_stages("Cvt"),
}
ENCODERS = {
    "bert": tiny.tiny_bert,
    "bert qa": lambda: tiny.tiny_bert("QuestionAnswering"),
    "bert masked": lambda: tiny.tiny_bert("MaskedLM"),
    "bert tokens": lambda: tiny.tiny_bert("TokenClassification"),
    "roberta": tiny.tiny_roberta,
    "distilbert": tiny.tiny_distilbert,
    "modernbert": tiny.tiny_modernbert,
    "deberta": tiny.tiny_deberta,
    "albert": tiny.tiny_albert,
    "xlnet": tiny.tiny_xlnet,
}
DECODERS = {
    "gpt2": tiny.tiny_gpt2,
    "llama": tiny.tiny_llama,
    "qwen3": tiny.tiny_qwen3,
    "gemma3": tiny.tiny_gemma3,
    "mistral": tiny.tiny_mistral,
}
ENCODER_DECODERS = {"t5": tiny.tiny_t5, "bart": tiny.tiny_bart, "fsmt": tiny.tiny_fsmt}
TEXT = {**ENCODERS, **DECODERS, **ENCODER_DECODERS}
MODELS = {**VISION, **TEXT, "bert multiple choice": lambda: tiny.tiny_bert("MultipleChoice")}


def other_inputs(model: nn.Module, **changes: torch.Tensor) -> dict[str, torch.Tensor]:
    """Inputs unlike the dummy ones; encoder-decoders keep those of the encoder."""
    inputs = dummy_inputs(model)
    key = "decoder_input_ids" if "decoder_input_ids" in inputs else model.main_input_name
    inputs[key] = -inputs[key] if inputs[key].is_floating_point() else 3 + (inputs[key] + 7) % 50
    return {**inputs, **changes}


def padded_inputs(model: nn.Module, side: str) -> dict[str, torch.Tensor]:
    """Two rows, of which the second has three tokens of padding; long enough for sliding windows to matter."""
    ids = torch.randint(3, tiny.VOCABULARY, (2, 12))
    mask = torch.ones_like(ids)
    padding = slice(0, 3) if side == "left" else slice(9, 12)
    ids[1, padding], mask[1, padding] = 0, 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if model.config.is_encoder_decoder:
        inputs |= {"decoder_input_ids": ids.flip(0), "decoder_attention_mask": mask.flip(0)}
    return inputs


@torch.no_grad()
def clean_run(model: nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[Any, dict, dict]:
    stack = find_layer_stack(model)
    with capture_states(stack, range(len(stack) + 1)) as states, record_extras(stack) as extras:
        logits = torch.cat(main_outputs(model(**inputs)))
    return logits, states, extras


def routed(model: nn.Module, inputs: dict, depth: int, states: torch.Tensor, extras: dict) -> torch.Tensor:
    with enter_at(find_layer_stack(model), depth, states, extras):
        return torch.cat(main_outputs(model(**inputs)))


def without(
    model: nn.Module, inputs: dict, dropped: list[int], depth: int = 0, until: int | None = None
) -> torch.Tensor:
    _, states, extras = clean_run(model, inputs)
    with torch.no_grad(), enter_at(find_layer_stack(model), depth, states[depth], extras, until, without=dropped):
        return torch.cat(main_outputs(model(**inputs)))


def condition(model: nn.Module) -> list[tuple]:
    """Everything about the modules that routing touches on its way."""
    return [
        (name, dict(m._forward_hooks), dict(m._forward_pre_hooks), vars(m).get("forward"), m.training)
        for name, m in model.named_modules()
    ]


@pytest.mark.parametrize("name", MODELS)
def test_a_model_entered_at_any_depth_gives_its_own_logits_to_the_bit(name):
    report = check_routing(MODELS[name]())
    assert report.max_abs_error == 0.0
    assert report.technique == "own forward"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", TEXT)
def test_routing_is_exact_with_padding(name, side):
    model = TEXT[name]()
    assert check_routing(model, padded_inputs(model, side)).max_abs_error == 0.0


@pytest.mark.parametrize("name", MODELS)
def test_routing_is_exact_under_bf16_autocast(name):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert check_routing(MODELS[name]()).max_abs_error == 0.0


@pytest.mark.parametrize("name", MODELS)
def test_the_states_of_another_batch_give_the_logits_of_that_batch(name):
    """So at every depth the states that are handed in, and nothing else of the inputs, decide the logits."""
    model = MODELS[name]()
    ours, theirs = dummy_inputs(model), other_inputs(model)
    our_logits, _, extras = clean_run(model, ours)
    their_logits, states, _ = clean_run(model, theirs)
    assert not torch.equal(our_logits, their_logits)
    if name == "deberta":
        del states[0]  # its convolution reads the embeddings beside layer 0
    for depth, state in states.items():
        with torch.no_grad():
            assert torch.equal(routed(model, ours, depth, state, extras), their_logits), f"depth {depth}"


@pytest.mark.parametrize("name", MODELS)
def test_gradients_reach_the_states_and_no_weight_of_a_frozen_model(name):
    model = MODELS[name]().requires_grad_(False)
    inputs = dummy_inputs(model)
    clean, states, extras = clean_run(model, inputs)
    for depth, state in states.items():
        foreign = (state + 0.3 * torch.randn_like(state)).requires_grad_()
        logits = routed(model, inputs, depth, foreign, extras)
        assert not torch.equal(logits, clean), f"depth {depth}"
        (logits * torch.randn_like(logits)).sum().backward()
        assert foreign.grad.abs().max() > 0, f"depth {depth}"
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_gradient_of_the_states_is_that_of_the_remaining_layers():
    model = tiny.tiny_vit().requires_grad_(False)
    inputs = dummy_inputs(model)
    _, states, extras = clean_run(model, inputs)
    direction = torch.randn(2, tiny.LABELS)
    ours, by_hand = (states[1].clone().requires_grad_() for _ in range(2))
    (routed(model, inputs, 1, ours, extras) * direction).sum().backward()
    hidden = by_hand
    for layer in model.vit.layers[1:]:
        hidden = layer(hidden)
    logits = model.classifier(model.vit.layernorm(hidden)[:, 0])
    (logits * direction).sum().backward()
    assert torch.equal(ours.grad, by_hand.grad)


@pytest.mark.parametrize("name", [*TEXT, "vit", "siglip", "beit", "dinov2"])
def test_a_model_that_misses_no_layer_or_the_last_ones_is_as_ever(name):
    model = MODELS[name]()
    inputs = dummy_inputs(model)
    clean, _, _ = clean_run(model, inputs)
    depth = len(find_layer_stack(model))
    assert torch.equal(without(model, inputs, []), clean)
    for end in range(depth):
        last_ones = list(range(end, depth))
        assert torch.equal(without(model, inputs, last_ones), without(model, inputs, [], until=end)), f"from {end}"


@pytest.mark.parametrize("dropped", [[0], [1], [2], [0, 2], [1, 2], [0, 1, 2]])
@pytest.mark.parametrize("name", ["vit", "bert", "distilbert", "gpt2", "llama", "bart"])
def test_a_model_without_layers_is_one_that_never_had_them(name, dropped):
    model = MODELS[name]()
    inputs = dummy_inputs(model)
    ours = without(model, inputs, dropped)
    # Those below the first that goes need not run.
    assert torch.equal(without(model, inputs, dropped, depth=dropped[0]), ours)
    stack = find_layer_stack(model)
    parent, _, attribute = stack.path.rpartition(".")
    kept = [layer for index, layer in enumerate(stack.layers) if index not in dropped]
    setattr(model.get_submodule(parent), attribute, nn.ModuleList(kept))
    model.config.num_hidden_layers, model.config.use_cache = len(kept), False  # layers know their places in a cache
    with torch.no_grad():
        assert torch.equal(torch.cat(main_outputs(model(**inputs))), ours)


def test_captured_states_are_those_between_the_layers_and_before_the_final_norm():
    model = tiny.tiny_vit()
    inputs = dummy_inputs(model)
    _, states, _ = clean_run(model, inputs)
    with torch.no_grad():
        hidden = model.vit.embeddings(inputs["pixel_values"])
        assert torch.equal(states[0], hidden)
        for depth, layer in enumerate(model.vit.layers, start=1):
            hidden = layer(hidden)
            assert torch.equal(states[depth], hidden)
    assert sorted(states) == [0, 1, 2, 3]


@pytest.mark.parametrize("groups", [1, 2])
def test_a_layer_called_several_times_is_entered_at_its_first_call(groups):
    model = tiny.tiny_albert(num_hidden_layers=4, num_hidden_groups=groups)
    _, states, extras = clean_run(model, dummy_inputs(model))
    calls = []
    handle = model.albert.encoder.albert_layer_groups[-1].register_forward_hook(lambda *_: calls.append(1))
    routed(model, dummy_inputs(model), groups - 1, states[groups - 1], extras)
    handle.remove()
    assert len(calls) == 4 // groups
    first_layers = 4 - 4 // groups
    with torch.no_grad():
        hidden = model.albert.embeddings(dummy_inputs(model)["input_ids"])
        hidden = model.albert.encoder.embedding_hidden_mapping_in(hidden)
        for _ in range(first_layers):
            hidden = model.albert.encoder.albert_layer_groups[0](hidden, None)
    torch.testing.assert_close(states[groups - 1], hidden)


def test_states_take_on_the_dtype_of_the_model():
    model = tiny.tiny_llama().to(torch.bfloat16)
    inputs = dummy_inputs(model)
    logits, states, extras = clean_run(model, inputs)
    for depth, state in states.items():
        assert torch.equal(routed(model, inputs, depth, state.float(), extras), logits)


@pytest.mark.parametrize("name", ["vit", "t5", "gpt2"])
@pytest.mark.parametrize("training", [True, False])
def test_a_check_leaves_model_and_random_state_as_they_were(name, training):
    model = MODELS[name]().train(training)
    before, random_state = condition(model), torch.get_rng_state()
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    check_routing(model)
    assert condition(model) == before
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_failed_check_leaves_the_model_as_it_was():
    model = tiny.tiny_bert().train()
    before = condition(model)
    with pytest.raises(IndexError):
        check_routing(model, {"input_ids": torch.tensor([[tiny.VOCABULARY]])})
    assert condition(model) == before


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_a_forward_that_fails_midway_leaves_the_model_as_it_was(depth):
    model = tiny.tiny_bert()
    before = condition(model)
    _, states, extras = clean_run(model, dummy_inputs(model))
    with pytest.raises(RuntimeError):
        routed(model, dummy_inputs(model), depth, states[depth][..., :-1], extras)
    assert condition(model) == before


def test_a_forward_of_the_instance_survives():
    model = tiny.tiny_vit()
    layer = model.vit.layers[0]
    layer.forward = own = layer.forward
    before = condition(model)
    assert check_routing(model).max_abs_error == 0.0
    assert condition(model) == before
    assert vars(layer)["forward"] is own


def test_layers_path_overrides_the_search():
    model = tiny.tiny_bart()
    report = check_routing(model, layers_path="model.encoder.layers")
    assert (report.layers_path, report.num_layers, report.max_abs_error) == ("model.encoder.layers", 2, 0.0)


def test_a_stack_that_the_forward_does_not_call_is_refused():
    model = tiny.tiny_vit()
    model.vit.unused = nn.ModuleList(type(model.vit.layers[0])(model.config) for _ in range(2))
    with pytest.raises(UnsupportedArchitectureError, match="ViTForImageClassification does not call layer 0 of"):
        check_routing(model, layers_path="vit.unused")


def test_layers_that_run_again_after_later_ones_are_refused():
    """One layer in two places of the stack cannot be passed through in the first and run in the second."""
    model = tiny.tiny_vit(num_hidden_layers=4)
    first, second = model.vit.layers[:2]
    model.vit.layers = nn.ModuleList([first, second, first, second])
    with pytest.raises(UnsupportedArchitectureError, match=r"ViTForImageClassification calls layer 1 .* after layer 2"):
        check_routing(model)


def test_layers_that_talk_past_the_hidden_states_have_an_error_in_the_report():
    model = tiny.tiny_vit(num_hidden_layers=4)
    first, _, third, _ = model.vit.layers
    said = []
    first.register_forward_hook(lambda layer, args, output: said.append(output))
    third.register_forward_pre_hook(lambda layer, args: (args[0] + said.pop(), *args[1:]))
    report = check_routing(model)
    assert report.max_abs_error > 1e-3
    assert report.worst_depth > 0


@pytest.mark.parametrize(("value", "error"), [(float("-inf"), 0.0), (float("nan"), float("inf"))])
def test_equal_infinities_are_no_error_and_nan_is_an_infinite_one(value, error):
    model = tiny.tiny_vit()
    with torch.no_grad():
        model.classifier.bias[1] = value
    assert check_routing(model).max_abs_error == error


def test_a_model_without_a_head_is_compared_in_its_first_output():
    model = BertModel(tiny.tiny_bert().config)
    assert check_routing(model).max_abs_error == 0.0
    inputs = dummy_inputs(model)
    outputs = model.eval()(**inputs)
    assert main_outputs(outputs)[0] is outputs.last_hidden_state
    assert main_outputs((outputs.last_hidden_state,))[0] is outputs.last_hidden_state


def tiny_upernet():
    """Over stages that hand the head what they do not hand on."""
    sizes = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1] * 4, "num_heads": [1, 2, 2, 2]}
    stages = transformers.SwinConfig(
        **sizes, num_channels=1, window_size=2, out_features=[f"stage{i}" for i in (1, 2, 3, 4)]
    )
    sizes = {"hidden_size": 8, "pool_scales": [1, 2], "auxiliary_channels": 8, "auxiliary_in_channels": 32}
    config = transformers.UperNetConfig(backbone_config=stages, num_labels=5, **sizes)
    return tiny.scrambled(transformers.UperNetForSemanticSegmentation(config)).eval()


HEADS = {
    "ctc": tiny.tiny_ctc,
    "ctc hubert": lambda: tiny.tiny_ctc("Hubert"),
    "dpt": tiny.tiny_dpt,
    "segformer": tiny.tiny_segformer,
    "upernet": tiny_upernet,
    "yolos": tiny.tiny_yolos,
    "detr": tiny.tiny_detr,
}


@pytest.mark.parametrize("name", HEADS)
def test_heads_whose_labels_have_another_form_are_routed_to_the_bit(name):
    assert check_routing(HEADS[name]()).max_abs_error == 0.0


@torch.no_grad()
def test_a_head_that_reads_levels_gets_the_foreign_states_as_one_and_the_clean_ones_before():
    model = tiny.tiny_dpt()
    stack, inputs, read = find_layer_stack(model), dummy_inputs(model), {}
    model.neck.register_forward_pre_hook(lambda module, args, kwargs: read.update(kwargs), with_kwargs=True)
    with record_extras(stack) as extras, capture_states(stack, [2]) as states:
        model(**inputs)
    clean, foreign = read["hidden_states"], torch.randn_like(states[2])
    with enter_at(stack, 2, foreign, extras):
        model(**inputs)
    levels = read["hidden_states"]
    assert torch.equal(levels[0], clean[0])
    assert torch.equal(levels[1], foreign)
    assert not torch.equal(levels[2], clean[2])
    assert not torch.equal(levels[3], clean[3])
