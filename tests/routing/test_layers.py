from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_blockkd import LayerStack, UnsupportedArchitectureError, check_routing, find_layer_stack

from ..helpers import tiny_models as tiny


class WithoutStack(PreTrainedModel):
    """Layers under names of their own, and a list that holds no layers of one kind."""

    config_class = PreTrainedConfig

    def __init__(self, config: PreTrainedConfig, *more: nn.Module) -> None:
        super().__init__(config)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.mixed = nn.ModuleList([nn.Linear(4, 4), nn.LayerNorm(4)])
        self.activations = nn.ModuleList([nn.GELU(), nn.GELU()])
        self.empty = nn.ModuleList()


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)


@pytest.mark.parametrize(
    ("model", "path", "depth"),
    [
        (tiny.tiny_vit, "vit.layers", 3),
        (tiny.tiny_dinov2, "dinov2.encoder.layer", 3),
        (tiny.tiny_clip, "vision_model.encoder.layers", 3),
        (tiny.tiny_swin, "swin.encoder.layers", 2),
        (lambda: tiny.tiny_stages("MobileViT"), "mobilevit.encoder.layer", 5),
        (tiny.tiny_bert, "bert.encoder.layer", 3),
        (tiny.tiny_distilbert, "distilbert.transformer.layer", 3),
        (tiny.tiny_gpt2, "transformer.h", 3),
        (tiny.tiny_llama, "model.layers", 3),
        (tiny.tiny_t5, "decoder.block", 3),
        (tiny.tiny_bart, "model.decoder.layers", 3),
    ],
)
def test_the_stack_is_found_by_structure(model, path, depth):
    model = model()
    stack = find_layer_stack(model)
    assert (stack.path, len(stack)) == (path, depth)
    assert stack.layers is model.get_submodule(path)


def test_a_decoder_wins_even_where_the_encoder_is_larger():
    assert find_layer_stack(tiny.tiny_bart(encoder_layers=6)).path == "model.decoder.layers"


def test_the_stack_inside_an_adapter_is_found():
    model = tiny.tiny_bert()
    layers = model.bert.encoder.layer
    wrapped = get_peft_model(model, LoraConfig(target_modules=["query", "value"]))
    assert find_layer_stack(wrapped).layers is layers


def test_the_search_prefers_the_outermost_and_then_the_larger_list():
    model = WithoutStack(PreTrainedConfig())
    model.small = nn.ModuleList(Layer(4) for _ in range(4))
    model.large = nn.ModuleList(Layer(8) for _ in range(2))
    model.large[0].nested = nn.ModuleList(Layer(64) for _ in range(9))
    model.large[1].nested = nn.ModuleList(Layer(64) for _ in range(9))
    assert find_layer_stack(model).path == "large"


def test_layers_inside_stages_do_not_hide_the_stages():
    """The layers of one stage are not the whole model, whatever their class."""
    model = WithoutStack(PreTrainedConfig())
    model.stages = nn.ModuleList(Layer(4) for _ in range(2))
    for stage in model.stages:
        stage.blocks = nn.ModuleList(GradientCheckpointingLayer() for _ in range(3))
    assert find_layer_stack(model).path == "stages"


def test_the_shallower_of_two_stacks_wins_over_the_larger():
    model = WithoutStack(PreTrainedConfig())
    model.tower = nn.Module()
    model.tower.layers = nn.ModuleList(Layer(64) for _ in range(4))
    model.layers = nn.ModuleList(Layer(4) for _ in range(2))
    assert find_layer_stack(model).path == "layers"


def test_what_the_model_calls_its_decoder_wins_over_the_shallower_stack():
    model = WithoutStack(PreTrainedConfig())
    model.layers = nn.ModuleList(Layer(64) for _ in range(4))
    model.text_model = nn.Module()
    model.text_model.layers = nn.ModuleList(Layer(4) for _ in range(2))
    assert find_layer_stack(model).path == "text_model.layers"


def test_a_list_of_lists_is_refused():
    model = WithoutStack(PreTrainedConfig())
    model.blocks = nn.ModuleList(nn.ModuleList(Layer(4) for _ in range(2)) for _ in range(3))
    with pytest.raises(UnsupportedArchitectureError, match="WithoutStack keeps its layers in 'blocks', a list of"):
        find_layer_stack(model)
    assert find_layer_stack(model, "blocks.1").layers is model.blocks[1]


def test_layers_in_parts_are_refused():
    model = WithoutStack(PreTrainedConfig())
    model.attentions = nn.ModuleList(Layer(4) for _ in range(3))
    model.ffns = nn.ModuleList(Layer(8) for _ in range(3))
    with pytest.raises(UnsupportedArchitectureError, match=r"WithoutStack keeps the parts .* \(attentions, ffns\)"):
        find_layer_stack(model)


def test_stages_of_several_kinds_are_a_stack():
    model = WithoutStack(PreTrainedConfig())
    model.stages = nn.ModuleList([Layer(4), nn.LayerNorm(4), Layer(4)])
    for stage in (model.stages[0], model.stages[2]):
        stage.blocks = nn.ModuleList(Layer(4) for _ in range(3))
    assert find_layer_stack(model).path == "stages"


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("vit.nowhere", "names nothing"),
        ("vit", "names a ViTModel"),
        ("vit.layers.0", "names a ViTLayer"),
    ],
)
def test_a_wrong_path_is_refused_and_the_right_ones_are_named(path, found):
    with pytest.raises(
        UnsupportedArchitectureError, match=rf"'{path}' of ViTForImageClassification {found}.*vit\.layers"
    ):
        find_layer_stack(tiny.tiny_vit(), path)


def test_an_empty_list_is_no_stack():
    with pytest.raises(UnsupportedArchitectureError, match="'empty' of WithoutStack"):
        find_layer_stack(WithoutStack(PreTrainedConfig()), "empty")


@pytest.mark.parametrize("use", [find_layer_stack, check_routing])
def test_a_model_without_a_stack_is_refused_by_name(use):
    with pytest.raises(UnsupportedArchitectureError, match=r"WithoutStack has no nn\.ModuleList of layers"):
        use(WithoutStack(PreTrainedConfig()))
    assert issubclass(UnsupportedArchitectureError, ValueError)


def test_a_path_skips_the_search():
    model = WithoutStack(PreTrainedConfig())
    stack = find_layer_stack(model, "mixed")
    assert isinstance(stack, LayerStack)
    assert stack.layers is model.mixed
    assert torch.is_tensor(stack.layers[0].weight)
