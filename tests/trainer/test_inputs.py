"""Models of sounds, videos, and of images before a decoder train like all others."""

import pytest
import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from hf_blockkd.routing.dummy_inputs import dummy_inputs

from ..helpers import tiny_models as tiny
from ..helpers.training import QUIET, make_trainer

MODELS = {
    "spectrograms": tiny.tiny_ast,
    "waves": tiny.tiny_waves,
    "waves, layers that are told their index": lambda **config: tiny.tiny_waves("WavLM", **config),
    "features": lambda **config: tiny.tiny_whisper("AudioClassification"),
    "speech to text": lambda **config: tiny.tiny_whisper(),
    "videos": tiny.tiny_videomae,
    "images to text": tiny.tiny_captioner,
}


def rows_for(model, labels=None):
    inputs = dummy_inputs(model, batch_size=8)
    generates = inputs.pop("decoder_input_ids", None) is not None
    rows = []
    for i in range(8):
        label = torch.tensor([3 + i, 4, 5, 2]) if generates else torch.tensor(i % tiny.LABELS)
        rows.append({**{name: tensor[i] for name, tensor in inputs.items()}, "labels": label})
    return rows


@pytest.mark.parametrize("kind", MODELS)
def test_it_trains_and_evaluates(tmp_path, kind):
    student, teacher = MODELS[kind](), MODELS[kind]()
    rows = rows_for(student)
    trainer = make_trainer(tmp_path, student, teacher, rows, eval_dataset=rows, max_steps=1, stepping_stones="all")
    trainer.train()
    assert trainer.state.log_history[0]["stone_1/distill"] > 0
    assert trainer.evaluate()["eval_loss"] > 0


def test_speech_to_text_goes_through_the_encoder_by_its_path(tmp_path):
    student, teacher, path = tiny.tiny_whisper(), tiny.tiny_whisper(encoder_layers=4), "model.encoder.layers"
    paths = {"student_layers_path": path, "teacher_layers_path": path}
    settings = {"max_steps": 1, "stepping_stones": "all", "learning_rate": 0.0, "logging_steps": 1, **paths}
    errors = []
    for ignored in (0, 9):
        # As many labels as the encoder has frames, which they have nothing to do with.
        rows = [{**row, "labels": torch.tensor([-100] * ignored + [5] * (10 - ignored))} for row in rows_for(student)]
        trainer = make_trainer(tmp_path, student, teacher, rows, state_weight=1.0, **settings)
        trainer.train()
        errors.append(trainer.state.log_history[0]["loss_state"])
    assert list(trainer.block_map.teacher) == [2, 4]
    assert errors[0] == pytest.approx(errors[1], rel=1e-4)


def test_layers_that_are_dropped_cannot_be_read_by_stones(tmp_path):
    models = tiny.tiny_waves(layerdrop=0.1), tiny.tiny_waves()
    with pytest.raises(ValueError, match=r"`layerdrop` is 0\.1 in the config of the student Wav2Vec2"):
        make_trainer(tmp_path, *models, rows_for(models[0]))
    make_trainer(tmp_path, *models, rows_for(models[0]), objective="kd", max_steps=1).train()


def test_labels_longer_than_a_decoder_that_slices_its_positions(tmp_path):
    models = tiny.tiny_whisper(), tiny.tiny_whisper(max_target_positions=8)
    rows = [{**row, "labels": torch.full((9,), 5)} for row in rows_for(models[0])]
    with pytest.raises(ValueError, match=r"9 tokens in `decoder_input_ids`.*teacher Whisper.*8"):
        make_trainer(tmp_path, *models, rows, max_steps=1).train()


def test_a_decoder_without_a_first_token_is_told_of_it(tmp_path):
    models = tiny.tiny_whisper(), tiny.tiny_whisper()
    vars(models[0].config)["decoder_start_token_id"] = None
    with pytest.raises(
        ValueError, match=r"`decoder_input_ids` missing from the batch, and `decoder_start_token_id` of"
    ):
        make_trainer(tmp_path, *models, rows_for(models[0]), max_steps=1).train()


def test_so_is_one_whose_config_has_no_such_field_unless_a_batch_needs_none(tmp_path):
    models = tiny.tiny_t5(num_decoder_layers=2), tiny.tiny_t5()
    for model in models:
        del model.config.decoder_start_token_id
    rows = [{"input_ids": torch.full((4,), 5), "labels": torch.full((4,), 6)} for _ in range(4)]
    with pytest.raises(ValueError, match="`decoder_start_token_id` of T5ForConditionalGeneration is None"):
        make_trainer(tmp_path, *models, rows, max_steps=1).train()
    make_trainer(tmp_path, *models, [{**row, "decoder_input_ids": row["labels"]} for row in rows], max_steps=1).train()


def test_encoders_of_other_images_before_decoders_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`image_size` is \(8, 8\) for the encoder of the student .*\(16, 16\)"):
        make_trainer(tmp_path, tiny.tiny_captioner(), tiny.tiny_captioner(image_size=16))


def tiny_qwen2_vl():
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 16, "num_heads": 2, "patch_size": 4, "in_channels": 3}
    special = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 58, "vision_end_token_id": 59}
    text = {**tiny.DECODER, "rope_parameters": rope}
    return Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(text_config=text, vision_config={**vision, "mlp_ratio": 2}, **special)
    )


def with_images(batch):
    ids = torch.tensor([[1, 58, 60, 60, 60, 60, 59, 5, 6]] * len(batch))
    return {
        "input_ids": ids,
        "labels": ids.masked_fill(ids > 57, -100),
        "mm_token_type_ids": (ids == 60).long(),
        "pixel_values": torch.randn(len(batch) * 16, 96),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * len(batch)),
    }


@pytest.mark.parametrize(
    ("settings", "setting"),
    [
        ({"stepping_stones": "last_two"}, None),
        ({"stepping_stones": "share"}, "`stepping_stones='share'`"),
        ({"stone_fraction": 0.5}, "`stone_fraction=0.5`"),
    ],
)
def test_images_in_one_list_are_not_shared_out(tmp_path, settings, setting):
    rows = [{"input_ids": torch.ones(1)}] * 8
    settings = {"max_steps": 1, "remove_unused_columns": False, **settings}
    trainer = make_trainer(tmp_path, tiny_qwen2_vl(), tiny_qwen2_vl(), rows, **QUIET | settings)
    trainer.data_collator = with_images
    if setting is None:
        trainer.train()
        return
    with pytest.raises(ValueError, match=f"{setting} tells the 4 examples of a batch apart, but `pixel_values` has"):
        trainer.train()
