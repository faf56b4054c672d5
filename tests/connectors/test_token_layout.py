"""How states stand on the image, found by running a model, against what its architecture says."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_blockkd import LayerStack, find_layer_stack
from hf_blockkd.connectors.token_layout import TokenLayout, token_layouts
from hf_blockkd.routing.dummy_inputs import dummy_inputs

from ..helpers import tiny_models as tiny

VISION = {**tiny.VISION, "image_size": 32, "patch_size": 8}


def layouts(model: nn.Module) -> list[TokenLayout | str]:
    """After the embeddings, and after each layer."""
    stack = find_layer_stack(model)
    return token_layouts(model, stack, range(len(stack) + 1), dummy_inputs(model, batch_size=1))


@pytest.mark.parametrize(
    ("family", "config", "expected"),
    [
        ("ViT", {}, "class + 4x4"),
        ("ViT", {"image_size": (16, 40)}, "class + 2x5"),
        ("ViT", {"image_size": (40, 8)}, "class + 5x1"),
        ("ViT", {"image_size": (8, 40)}, "class + 1x5"),
        ("ViT", {"image_size": 38}, "class + 4x4"),  # the last pixels are cut off
        ("ViT", {"patch_size": (16, 4)}, "class + 2x8"),  # as many patches as 4x4
        ("DeiT", {}, "class + distillation + 4x4"),
        ("Beit", {}, "class + 4x4"),
        ("Beit", {"use_absolute_position_embeddings": True}, "class + 4x4"),
        ("Dinov2", {"image_size": 40}, "class + 5x5"),
        ("Dinov2WithRegisters", {"num_register_tokens": 3}, "class + 3 register + 4x4"),
        ("ViTMSN", {}, "class + 4x4"),
        ("IJepa", {}, "4x4"),
    ],
)
def test_plain_transformers_have_special_tokens_and_a_grid(family, config, expected):
    found = layouts(tiny.build(family, "ImageClassification", VISION, config))
    assert [str(layout) for layout in found] == [expected] * 4
    assert {layout.channels for layout in found} == {-1}


@pytest.mark.parametrize(
    ("model", "expected"), [(tiny.tiny_siglip, "4x4"), (tiny.tiny_clip, "class + 4x4")], ids=["siglip", "clip"]
)
def test_vision_models_inside_others_have_them_too(model, expected):
    assert {str(layout) for layout in layouts(model(image_size=32, patch_size=8))} == {expected}


@pytest.mark.parametrize(
    ("family", "config", "expected"),
    [
        ("Swin", {}, ["16x16", "8x8", "4x4", "4x4"]),
        ("Swin", {"image_size": (36, 20), "patch_size": 4}, ["9x5", "5x3", "3x2", "3x2"]),  # odd sides are padded
        ("Swinv2", {}, ["16x16", "8x8", "4x4", "4x4"]),
        ("ConvNext", {}, ["8x8 map", "8x8 map", "4x4 map", "2x2 map", "1x1 map"]),
        ("MobileViT", {}, ["16x16 map", "16x16 map", "8x8 map", "4x4 map", "2x2 map", "1x1 map"]),
        ("PvtV2", {}, ["32x32 map", "8x8 map", "4x4 map", "2x2 map", "1x1"]),
        ("PvtV2", {"image_size": (30, 50)}, ["30x50 map", "8x13 map", "4x7 map", "2x4 map", "1x2"]),
    ],
)
def test_stages_have_maps_or_grids_that_get_coarser(family, config, expected):
    found = layouts(tiny.tiny_stages(family, **config))
    assert [f"{layout}{'' if layout.channels == -1 else ' map'}" for layout in found] == expected
    assert {layout.channels for layout in found} <= {-1, 1}


def test_maps_with_their_width_last_are_told_by_the_shape_of_the_image():
    class WidthLast(type(tiny.tiny_resnet())):
        def __init__(self, config):
            super().__init__(config)
            self.turned = nn.ModuleList([nn.Identity()])
            self.resnet.encoder.register_forward_hook(self.turn)

        def turn(self, encoder, args, output):
            output.last_hidden_state = self.turned[0](output.last_hidden_state.movedim(1, -1)).movedim(-1, 1)
            return output

    model = WidthLast(tiny.tiny_resnet(hidden_sizes=[4, 12]).config).eval()
    inputs = {"pixel_values": torch.randn(1, 1, 32, 64)}
    stack = LayerStack("turned", model.turned)
    assert token_layouts(model, stack, [0, 1], inputs) == [TokenLayout((4, 8), channels=3)] * 2


def test_a_stem_that_overlaps_its_patches_has_a_grid():
    sizes = {"hidden_sizes": [16, 24, 32], "num_attention_heads": [2, 2, 2], "key_dim": [8, 8, 8]}
    sizes |= {"depths": [1, 1, 1], "num_channels": 1, "num_labels": tiny.LABELS}
    found = layouts(tiny.build("Levit", "ImageClassification", {"image_size": 64, **sizes}, {}))
    assert [str(layout) for layout in found] == ["4x4", "2x2", "1x1", "1x1"]


def test_tokens_in_another_order_are_not_taken_for_rows():
    config = {"image_size": [64, 64], "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "num_query_pool": 1}
    found = layouts(tiny.build("Hiera", "ImageClassification", {"num_channels": 1, **config}, {}))
    assert found == ["its tokens do not stand on the image row by row"] * 3


@pytest.mark.parametrize("family", ["Pvt", "Cvt"])
def test_a_class_token_that_comes_late_leaves_no_grid(family):
    found = layouts(tiny.tiny_stages(family))
    assert str(found[0]) == "32x32" or family == "Cvt"
    assert isinstance(found[-1], str)
    assert "tokens, 0 of them special, are not" in found[-1]


def test_tokens_that_have_all_seen_one_another_are_no_grid():
    class Mixed(type(tiny.tiny_vit())):
        def __init__(self, config):
            super().__init__(config)
            self.vit.embeddings.register_forward_hook(lambda module, args, output: output + output.mean(1, True))

    assert layouts(Mixed(tiny.tiny_vit().config).eval()) == ["its tokens do not stand on the image row by row"] * 4


def test_looking_leaves_the_model_as_it_was():
    def condition() -> list[tuple]:
        return [(len(m._forward_hooks), len(m._forward_pre_hooks), vars(m).get("forward")) for m in model.modules()]

    model = tiny.tiny_deit().requires_grad_(False)
    before, weights = condition(), {name: parameter.clone() for name, parameter in model.named_parameters()}
    layouts(model)
    assert condition() == before
    assert all(torch.equal(weights[name], parameter) for name, parameter in model.named_parameters())


def test_tokens_and_states_are_each_others_inverse():
    states = torch.randn(2, 6, 3, 4)
    for layout, turned in ((TokenLayout((3, 4), channels=1), states), (TokenLayout((3, 4), channels=3), None)):
        turned = states.movedim(1, -1) if turned is None else turned
        tokens = layout.tokens(turned)
        assert torch.equal(tokens[:, 1 * 4 + 2], states[:, :, 1, 2])
        assert torch.equal(layout.states(tokens), turned)
        assert layout.states(tokens).is_contiguous()
