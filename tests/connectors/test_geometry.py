"""Students and teachers that stand otherwise on the image: grids, special tokens, stages, sizes."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import ResNetConfig, ResNetForImageClassification

from hf_blockkd import BlockMap, find_layer_stack
from hf_blockkd.connectors.attached import CONNECTORS_NAME
from hf_blockkd.connectors.bridges import Bridge, BridgedConnector, resample
from hf_blockkd.connectors.geometry import Geometry, resize
from hf_blockkd.connectors.maps import make_connectors
from hf_blockkd.connectors.token_layout import TokenLayout
from hf_blockkd.pairing.pair import Pair

from ..helpers import tiny_models as tiny
from ..helpers.training import assert_same_state, batch_of, differs, make_trainer, state_of, step_logs

SIZE = (32, 32)


def rows(count: int = 8, size: tuple[int, int] = SIZE, channels: int = 1) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, channels, *size, generator=generator)
    return [{"pixel_values": image, "labels": torch.tensor(i * 3 % tiny.LABELS)} for i, image in enumerate(images)]


def vit(**config) -> nn.Module:
    return tiny.tiny_vit(**{"image_size": 32, "patch_size": 8, **config})


def resnet(**config) -> nn.Module:
    return tiny.tiny_resnet(**{"hidden_sizes": [4, 8, 12], "depths": [1, 1, 1], **config})


def stages(family: str, **config):
    return lambda: tiny.tiny_stages(family, **config)


MODELS = {
    "vit": vit,
    "vit fine": lambda: vit(patch_size=4),
    "deit": lambda: tiny.tiny_deit(image_size=32, patch_size=8),
    "registers": lambda: tiny.build(
        "Dinov2WithRegisters", "ImageClassification", {**tiny.VISION, "image_size": 32}, {"num_register_tokens": 2}
    ),
    "siglip": lambda: tiny.tiny_siglip(image_size=32, patch_size=8),
    "swin": stages("Swin"),
    "swin v2": stages("Swinv2"),
    "pvt v2": stages("PvtV2"),
    "convnext": stages("ConvNext"),
    "mobilevit": stages("MobileViT"),
    "resnet": resnet,
}


def geometry_of(student: nn.Module, teacher: nn.Module, num_blocks: int = 2) -> Geometry:
    ours, theirs = find_layer_stack(student), find_layer_stack(teacher)
    block_map = BlockMap.even(len(ours), len(theirs), num_blocks)
    return Geometry(student, ours, teacher, theirs, block_map.student, block_map.teacher)


# ---- Resampling ----


def triangle(source: int, target: int) -> np.ndarray:
    """Weights of an antialiased linear resize, by its definition: a triangle as wide as the larger of both steps."""
    scale = source / target
    reach = max(scale, 1.0)
    centers = (np.arange(target) + 0.5) * scale
    weights = np.maximum(0, 1 - np.abs(np.arange(source) + 0.5 - centers[:, None]) / reach)
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize(("source", "target"), [((4, 4), (2, 2)), ((2, 3), (5, 4)), ((7, 5), (4, 9)), ((3, 2), (1, 1))])
def test_grids_are_resized_as_images_are(source, target):
    tokens = torch.randn(2, source[0] * source[1], 3)
    maps = tokens.double().numpy().reshape(2, *source, 3)
    expected = np.einsum("ih,jw,bhwd->bijd", triangle(source[0], target[0]), triangle(source[1], target[1]), maps)
    resampled = resample(tokens, source, target)
    np.testing.assert_allclose(resampled.numpy().reshape(expected.shape), expected, atol=1e-6)


def test_an_equal_grid_is_the_same_tensor():
    tokens = torch.randn(2, 6, 3)
    assert resample(tokens, (2, 3), (2, 3)) is tokens
    images = torch.randn(2, 3, 6, 5)
    assert resize(images, (6, 5)) is images


def test_a_plane_stays_a_plane_and_comes_back():
    """Linear resizing keeps what is linear, away from the borders."""
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    plane = (2 * rows - columns).reshape(1, 64, 1)
    coarse = resample(plane, (8, 8), (4, 4)).view(4, 4)
    assert torch.allclose(coarse[1:-1, 1:-1], plane.view(4, 2, 4, 2).mean((1, 3))[1:-1, 1:-1], atol=1e-5)
    back = resample(coarse.reshape(1, 16, 1), (4, 4), (8, 8)).view(8, 8)
    assert torch.allclose(back[3:5, 3:5], plane.view(8, 8)[3:5, 3:5], atol=1e-5)


# ---- Roles ----


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        (("class",), ("class",), "c"),
        (("class", "distillation"), ("class",), "c"),
        (("class",), ("class", "distillation"), "cm"),
        (("class", "distillation"), ("distillation", "class"), "dc"),
        ((), ("class",), "m"),
        (("class",), (), ""),
        (("class", "register", "register"), ("class", "register"), "cr"),
        (("class", "register"), ("class", "register", "register"), "crm"),
        (("register", "class", "register"), ("class", "register", "register"), "crR"),
    ],
)
def test_special_tokens_go_by_their_roles_and_the_mean_stands_in(ours, theirs, expected):
    tokens = torch.randn(2, len(ours) + 4, 3)
    patches = tokens[:, len(ours) :]
    named = {"c": "class", "d": "distillation", "r": "register"}
    own = {letter: tokens[:, ours.index(role)] for letter, role in named.items() if role in ours}
    own |= {"m": patches.mean(1), "R": tokens[:, 2]}
    bridge = Bridge(TokenLayout((2, 2), ours), TokenLayout((2, 2), theirs))
    bridged = bridge(tokens, nn.Identity())
    assert bridged.shape == (2, len(expected) + 4, 3)
    for index, letter in enumerate(expected):
        assert torch.equal(bridged[:, index], own[letter])
    assert torch.equal(bridged[:, len(expected) :], patches)


def test_a_connector_maps_the_width_of_maps_and_of_sequences_alike():
    linear, maps = nn.Linear(3, 5), torch.randn(2, 3, 4, 4)
    bridged = Bridge(TokenLayout((4, 4), channels=1), TokenLayout((4, 4), channels=1))(maps, linear)
    assert torch.allclose(bridged, F.conv2d(maps, linear.weight[:, :, None, None], linear.bias), atol=1e-6)


# ---- Equal geometry changes nothing ----


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_every_stone_of_an_identical_student_is_the_teacher_to_the_bit(name, tmp_path):
    teacher = MODELS[name]()
    trainer = make_trainer(tmp_path, copy.deepcopy(teacher), teacher)
    batch = batch_of(rows(3))
    clean = teacher(batch["pixel_values"]).logits
    for logits in trainer.stepping_stone_logits(batch).values():
        assert torch.equal(logits, clean)


@pytest.mark.parametrize("name", ["vit", "deit", "registers", "siglip", "swin", "swin v2"])
def test_equal_sequences_get_plain_connectors(name):
    pair = Pair(MODELS[name](), MODELS[name](), num_blocks=2)
    assert not any(isinstance(connector, BridgedConnector) for connector in pair.connectors)


def test_tokens_in_an_order_of_their_own_go_over_as_they_are_to_a_model_that_makes_as_many():
    config = {"image_size": [64, 64], "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "num_query_pool": 1}
    teacher, student = (
        tiny.build("Hiera", "ImageClassification", {"num_channels": 1, **config, "mlp_ratio": ratio}, {})
        for ratio in (2.0, 4.0)
    )
    geometry = geometry_of(student, teacher)
    assert geometry.bridges == {}
    assert geometry.widths == ([8, 16], [8, 16])


# ---- Pairs ----


@pytest.mark.parametrize(
    ("student", "teacher", "bridges"),
    [
        ("resnet", "vit", ["8x8 -> class + 4x4", "2x2 -> class + 4x4"]),
        ("vit", "resnet", ["class + 4x4 -> 8x8", "class + 4x4 -> 2x2"]),
        ("vit", "convnext", ["class + 4x4 -> 4x4", "class + 4x4 -> 1x1"]),
        ("swin", "vit", ["8x8 -> class + 4x4", "4x4 -> class + 4x4"]),
        ("vit", "swin v2", ["class + 4x4 -> 8x8", "class + 4x4 -> 4x4"]),
        ("vit", "vit fine", ["class + 4x4 -> class + 8x8"] * 2),
        ("deit", "registers", ["class + distillation + 4x4 -> class + 2 register + 8x8"] * 2),
        ("siglip", "deit", ["4x4 -> class + distillation + 4x4"] * 2),
        ("pvt v2", "vit", ["4x4 -> class + 4x4", "1x1 -> class + 4x4"]),
        ("mobilevit", "pvt v2", ["8x8 -> 4x4", "1x1 -> 1x1"]),
        ("convnext", "resnet", ["4x4 -> 8x8", "1x1 -> 2x2"]),
    ],
)
def test_pairs_train_and_gradients_reach_connectors_and_student(student, teacher, bridges, tmp_path):
    student, teacher = MODELS[student](), MODELS[teacher]()
    trainer = make_trainer(tmp_path, student, teacher, rows(8), max_steps=2)
    assert [str(bridge) for bridge in trainer.pair.geometry.bridges.values()] == bridges
    parts = [*find_layer_stack(student).layers, *trainer.connectors]
    before, teacher_before = [state_of(part) for part in parts], state_of(teacher)
    trainer.train()
    assert all(torch.isfinite(torch.tensor(log["loss"])) for log in step_logs(trainer))
    assert_same_state(state_of(teacher), teacher_before)
    assert all(differs(state_of(part), old) for part, old in zip(parts, before, strict=True))


@pytest.mark.parametrize(
    ("objective", "student", "teacher"),
    [
        ("hint", "resnet", "vit"),
        ("simkd", "vit", "pvt v2"),
        ("fcfd", "resnet", "vit"),
        ("theseus", "resnet", "vit"),
        ("theseus", "vit", "pvt v2"),
        ("block_kd+hint", "vit", "pvt v2"),
    ],
)
def test_every_objective_trains_between_layouts(objective, student, teacher, tmp_path):
    trainer = make_trainer(tmp_path, MODELS[student](), MODELS[teacher](), rows(8), max_steps=2, objective=objective)
    before = state_of(trainer.pair.all_connectors)
    trainer.train()
    assert differs(state_of(trainer.pair.all_connectors), before)
    assert all(torch.isfinite(torch.tensor(log["loss"])) for log in step_logs(trainer))


def test_a_stone_is_student_prefix_connector_bridge_and_teacher_suffix(tmp_path):
    student, teacher = resnet(), vit(num_hidden_layers=4)
    trainer = make_trainer(tmp_path, student, teacher, num_blocks=3)
    batch = batch_of(rows(2))
    with torch.no_grad():
        stones = trainer.stepping_stone_logits(batch)
        hidden = student.resnet.embedder(batch["pixel_values"])
        for index, stage in enumerate(student.resnet.encoder.stages, start=1):
            hidden = stage(hidden)
            linear = trainer.connectors[index - 1].width
            tokens = linear(hidden.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            resized = F.interpolate(tokens, (4, 4), mode="bilinear", antialias=True, align_corners=False)
            states = torch.cat([tokens.mean((2, 3))[:, None], resized.flatten(2).transpose(1, 2)], dim=1)
            for layer in teacher.vit.layers[BlockMap.even(3, 4, 3).teacher[index - 1] :]:
                states = layer(states)
            by_hand = teacher.classifier(teacher.vit.layernorm(states)[:, 0])
            torch.testing.assert_close(stones[index], by_hand)


def test_stones_on_some_of_the_examples_and_a_cache_work_between_layouts(tmp_path):
    settings = {"stepping_stones": "share", "teacher_cache": str(tmp_path / "cache")}
    trainer = make_trainer(tmp_path / "run", resnet(), vit(), rows(8), max_steps=2, **settings)
    trainer.train()
    assert len(step_logs(trainer)) == 2


def test_bridged_connectors_are_saved_and_resumed_to_the_bit(tmp_path):
    settings = {"save_strategy": "epoch", "num_train_epochs": 2}
    student = resnet()
    whole = make_trainer(tmp_path, copy.deepcopy(student), vit(), rows(8), **settings)
    teacher = copy.deepcopy(whole.teacher)
    whole.train()
    again = make_trainer(tmp_path, student, teacher, rows(8), **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert (tmp_path / "checkpoint-2" / CONNECTORS_NAME).is_file()
    assert_same_state(state_of(again.model), state_of(whole.model))


# ---- Sizes of images ----


def test_the_teacher_sees_images_in_its_own_size_and_the_student_as_they_come(tmp_path):
    student, teacher = vit(), vit(image_size=48, patch_size=16)
    trainer = make_trainer(tmp_path, student, teacher, rows(4))
    batch = batch_of(rows(4))
    seen = trainer.pair.inputs_for("teacher", batch)["pixel_values"]
    expected = F.interpolate(batch["pixel_values"], (48, 48), mode="bilinear", antialias=True, align_corners=False)
    assert torch.equal(seen, expected)
    assert trainer.pair.inputs_for("student", batch)["pixel_values"] is batch["pixel_values"]
    assert str(trainer.pair.geometry.bridges[1]) == "class + 4x4 -> class + 3x3"
    trainer.train()


def test_images_of_equal_size_are_handed_over_untouched():
    for student, teacher in ((vit(), vit()), (resnet(), resnet()), (stages("ConvNext")(), stages("ConvNext")())):
        batch = batch_of(rows(2, (24, 24)))
        pair = Pair(student, teacher, num_blocks=2)
        assert pair.inputs_for("teacher", batch)["pixel_values"] is batch["pixel_values"]


def test_bridges_follow_the_size_of_the_images(tmp_path):
    student, teacher = resnet(), resnet(downsample_in_first_stage=True)
    trainer = make_trainer(tmp_path, student, teacher, rows(4, (64, 32)), max_steps=1)
    trainer.train()
    assert str(trainer.pair.geometry.bridges[2]) == "4x2 -> 2x1"
    clean = teacher(torch.randn(2, 1, 96, 64)).logits
    stones = trainer.stepping_stone_logits(batch_of(rows(2, (96, 64))))
    assert [str(bridge) for bridge in trainer.pair.geometry.bridges.values()] == ["24x16 -> 12x8", "6x4 -> 3x2"]
    assert all(logits.shape == clean.shape for logits in stones.values())


@torch.no_grad()
def test_images_of_another_size_give_the_stones_of_a_pair_made_for_that_size():
    student, teacher = resnet(), resnet(downsample_in_first_stage=True)
    batch = batch_of(rows(2, (48, 64)))
    logits = []
    for sizes in ((), ((64, 32), (48, 64), (20, 20))):
        pair = Pair(student, teacher, num_blocks=2)
        for size in sizes:
            pair.complete(batch_of(rows(1, size)))
        inputs = pair.complete(batch)
        _, extras = pair.stones.teach(pair.inputs_for("teacher", inputs))
        with pair.stones.capture([1, 2]) as states:
            student(inputs["pixel_values"])
        logits.append([pair.stones.run(i, states, pair.inputs_for("teacher", inputs), extras).logits for i in (1, 2)])
    assert all(torch.equal(one, other) for one, other in zip(*logits, strict=True))


def test_a_cache_of_images_in_another_size_is_refused(tmp_path):
    teacher = stages("ConvNext")()
    settings = {"teacher_cache": str(tmp_path / "cache"), "max_steps": 1}
    make_trainer(tmp_path / "a", vit(), teacher, rows(4), **settings).train()
    with pytest.raises(ValueError, match=r"was filled with image_size None, but this run has \[32, 32\]"):
        make_trainer(tmp_path / "b", resnet(), teacher, rows(4), **settings).train()


# ---- What is refused ----


def hiera() -> nn.Module:
    config = {"image_size": [64, 64], "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "num_query_pool": 1}
    return tiny.build("Hiera", "ImageClassification", {"num_channels": 1, **config, "num_labels": tiny.LABELS}, {})


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (
            lambda: vit(image_size=64),
            hiera,
            r"stone 1 the student ViT.* shape \(65, 16\) and the teacher Hiera.* \(HieraForImageClassification: its "
            r"tokens do not stand on the image row by row\); choose a student that makes as many tokens",
        ),
        (hiera, resnet, "HieraForImageClassification: its tokens do not stand"),
        (stages("Pvt"), vit, r"PvtForImageClassification: its 2 tokens, 0 of them special, are not 32x32"),
        (vit, lambda: vit(num_channels=3), "`num_channels` is 1 for the student ViT.* and 3 for the teacher ViT"),
        (
            vit,
            resnet,
            r"Student ViT.* and teacher ResNet.* cannot be cut.*`num_blocks` is 4, but the student has only 3",
        ),
        (
            lambda: vit(num_hidden_layers=6),
            resnet,
            r"Student ViT.* and teacher ResNet.* cannot be cut.*`num_blocks` is 4, but the teacher has only 3 layers; "
            "set `num_blocks` to 3 or less",
        ),
    ],
)
def test_pairs_that_cannot_be_matched_are_refused_in_one_sentence(student, teacher, message):
    num_blocks = 4 if "cut" in message else 2
    with pytest.raises(ValueError, match=message) as refused:
        Pair(student(), teacher(), num_blocks=num_blocks)
    assert "\n" not in str(refused.value)


def test_texts_must_have_as_many_tokens():
    student, teacher = tiny.tiny_bert(), tiny.tiny_bert()
    assert geometry_of(student, teacher).bridges == {}
    teacher.bert.encoder.layer[-1].register_forward_hook(lambda layer, args, output: torch.cat([output, output], 1))
    with pytest.raises(ValueError, match=r"stone 2 the student Bert.* \(8, 16\) and the teacher Bert.* \(16, 16\)"):
        geometry_of(student, teacher)


def test_images_that_the_student_cannot_take_are_refused_before_training(tmp_path):
    trainer = make_trainer(tmp_path, vit(), stages("ConvNext")(), rows(4, (48, 48)), max_steps=1)
    with pytest.raises(ValueError, match=r"does not run on images of 48x48 .* resize them, or set `image_size`"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_connectors_that_were_made_without_a_bridge_are_not_used_where_one_is_needed():
    student, teacher = stages("Swin")(), stages("Swin")()
    geometry = geometry_of(student, teacher)
    connectors = geometry.bridge(make_connectors("identity", *geometry.widths, seed=0))
    assert not any(isinstance(connector, BridgedConnector) for connector in connectors)
    geometry._known[(24, 24)] = {1: Bridge(TokenLayout((6, 6)), TokenLayout((5, 5)))}
    with pytest.raises(ValueError, match=r"On images of 24x24, unlike on those of 32x32.*6x6 -> 5x5; resize all"):
        geometry.fit(batch_of(rows(1, (24, 24))))


def test_a_size_that_is_new_leaves_every_module_in_its_mode():
    config = ResNetConfig(num_channels=1, embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1])
    pair = Pair(*(ResNetForImageClassification(config) for _ in range(2)), num_blocks=2)
    next(module for module in pair.student.eval().modules() if isinstance(module, nn.BatchNorm2d)).train()
    modes = [module.training for module in pair.student.modules()]
    assert pair.geometry.size != (32, 32)
    pair.geometry.fit({"pixel_values": torch.zeros(1, 1, 32, 32)})
    assert [module.training for module in pair.student.modules()] == modes
