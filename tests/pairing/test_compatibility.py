from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn
from transformers import BertForSequenceClassification, BertModel, ViTModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from hf_blockkd import LayerStack, find_layer_stack
from hf_blockkd.connectors.geometry import block_shapes
from hf_blockkd.pairing.compatibility import auto_tasks, check_models
from hf_blockkd.pairing.pair import Pair
from hf_blockkd.routing.dummy_inputs import dummy_inputs

from ..helpers import tiny_models as tiny

LABELS = {"num_labels": 2, "id2label": {0: "cat", 1: "dog"}, "label2id": {"cat": 0, "dog": 1}}
SWAPPED = {"num_labels": 2, "id2label": {0: "dog", 1: "cat"}, "label2id": {"dog": 0, "cat": 1}}


def shapes(model: nn.Module) -> list[torch.Size]:
    stack = find_layer_stack(model)
    return block_shapes(model, stack, range(1, len(stack) + 1), dummy_inputs(model, batch_size=1))


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (lambda: tiny.tiny_vit(num_hidden_layers=1), tiny.tiny_vit),
        (tiny.tiny_vit, lambda: tiny.tiny_deit("ImageClassificationWithTeacher")),
        (tiny.tiny_distilbert, tiny.tiny_bert),
        (tiny.tiny_bert, lambda: tiny.tiny_llama("SequenceClassification", num_labels=tiny.LABELS)),
        (lambda: tiny.tiny_distilbert("QuestionAnswering"), lambda: tiny.tiny_bert("QuestionAnswering")),
        (tiny.tiny_gpt2, tiny.tiny_llama),
        (lambda: tiny.tiny_vit(**LABELS), lambda: tiny.tiny_vit(**LABELS)),
        (lambda: tiny.tiny_bert(problem_type="regression"), tiny.tiny_bert),
    ],
)
def test_models_for_one_task_and_one_set_of_classes_fit(student, teacher):
    assert check_models(student(), teacher()) is None


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (
            tiny.tiny_bert,
            lambda: BertModel(tiny.tiny_bert().config),
            "`teacher_model` is a BertModel, which has no head for .*sequence classification",
        ),
        (
            tiny.tiny_bert,
            lambda: tiny.tiny_bert("TokenClassification"),
            "student BertForSequenceClassification is made for .* but the teacher BertForTokenClassification for token",
        ),
        (tiny.tiny_vit, tiny.tiny_bert, "both need a head for the same task"),
        (lambda: tiny.tiny_vit(num_labels=3), tiny.tiny_vit, "`num_labels` is 3 for the student and 5 for the teacher"),
        (
            lambda: tiny.tiny_vit(**LABELS),
            lambda: tiny.tiny_vit(**SWAPPED),
            r"`id2label\[0\]` is 'cat' for the student and 'dog' for the teacher",
        ),
        (
            lambda: tiny.tiny_bert(problem_type="regression"),
            lambda: tiny.tiny_bert(problem_type="multi_label_classification"),
            "`problem_type` is 'regression' for the student and 'multi_label_classification' for the teacher",
        ),
    ],
)
def test_models_that_do_not_fit_are_refused_by_name(student, teacher, message):
    with pytest.raises(ValueError, match=message):
        check_models(student(), teacher())


PART = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 2}
CONVOLUTIONS = {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
SOUND = {**PART, **CONVOLUTIONS, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
OTHER_TASKS = {
    "object detection": lambda: transformers.ConditionalDetrForObjectDetection(
        transformers.ConditionalDetrConfig(
            backbone_config=tiny.tiny_detr().config.backbone_config, encoder_layers=1, decoder_layers=1
        )
    ),
    "zero shot image classification": lambda: transformers.CLIPModel(
        transformers.CLIPConfig(text_config={**PART, "vocab_size": 64}, vision_config={**PART, "image_size": 32})
    ),
    "masked image modeling": lambda: transformers.ViTForMaskedImageModeling(tiny.tiny_vit().config),
    "audio frame classification": lambda: transformers.Wav2Vec2ForAudioFrameClassification(
        transformers.Wav2Vec2Config(**SOUND)
    ),
    "visual question answering": lambda: transformers.ViltForQuestionAnswering(transformers.ViltConfig(**PART)),
}


@pytest.mark.parametrize("task", OTHER_TASKS)
def test_tasks_whose_outputs_are_no_rows_of_logits_are_refused_by_name(task):
    model = OTHER_TASKS[task]()
    with pytest.raises(ValueError, match=f"{type(model).__name__} is made for .*{task}.* distil its encoder instead"):
        check_models(model, copy.deepcopy(model))


def test_logits_that_are_maps_are_refused_whatever_the_class_is_called():
    class Maps(type(tiny.tiny_vit())):
        def forward(self, pixel_values=None, **kwargs):
            outputs = super().forward(pixel_values, **kwargs)
            outputs.logits = outputs.logits[..., None, None].expand(-1, -1, 8, 8)
            return outputs

    with pytest.raises(ValueError, match=r"Maps returns logits of shape \(1, 5, 8, 8\) instead of a row of classes"):
        Pair(Maps(tiny.tiny_vit().config), Maps(tiny.tiny_vit().config), num_blocks=2)


def test_one_model_cannot_be_both():
    model = tiny.tiny_vit()
    with pytest.raises(ValueError, match="same object; pass a copy"):
        check_models(model, model)
    assert check_models(model, copy.deepcopy(model)) is None


def test_shared_parameters_are_refused():
    student, teacher = tiny.tiny_vit(), tiny.tiny_vit()
    student.vit.embeddings = teacher.vit.embeddings
    with pytest.raises(ValueError, match="share parameters"):
        check_models(student, teacher)


def test_tasks_are_those_of_the_auto_classes():
    assert auto_tasks(tiny.tiny_vit()) == {"IMAGE_CLASSIFICATION"}
    assert "CAUSAL_LM" in auto_tasks(tiny.tiny_llama())
    assert "IMAGE_CLASSIFICATION" in auto_tasks(tiny.tiny_deit("ImageClassificationWithTeacher"))
    assert auto_tasks(ViTModel(tiny.tiny_vit().config)) == set()


@pytest.mark.parametrize("training", [True, False])
def test_the_shapes_at_the_ends_of_blocks_are_those_of_one_example(training):
    model = tiny.tiny_vit(hidden_size=24, num_hidden_layers=4).train(training)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    # Four patches and the class token.
    assert block_shapes(model, find_layer_stack(model), [1, 4], dummy_inputs(model, batch_size=1)) == [(5, 24), (5, 24)]
    assert model.training is training
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


def test_stages_of_different_widths_are_seen():
    # 8 x 8 patches of width 8, merged into 4 x 4 of width 16.
    assert shapes(tiny.tiny_swin()) == [(16, 16), (16, 16)]


class Silent(BertForSequenceClassification):
    """A model whose head is never asked."""

    def forward(self, **inputs):
        return self.bert(**inputs)


class Pooled(BertModel):
    """A body that keeps its states to itself."""

    def forward(self, **inputs):
        return BaseModelOutputWithPooling(pooler_output=super().forward(**inputs).pooler_output)


@pytest.mark.parametrize(
    ("model_class", "match"),
    [
        (Silent, "Silent returns last_hidden_state, .*but no logits"),
        (Pooled, "Pooled has no head and returns pooler_output, but no states"),
    ],
)
def test_a_model_with_neither_logits_nor_states_has_no_shapes(model_class, match):
    with pytest.raises(ValueError, match=match):
        shapes(model_class(tiny.tiny_bert().config))


def test_a_model_without_a_head_has_the_shapes_of_its_states():
    assert shapes(tiny.tiny_vit(None)) == [(5, 16)] * 3


def test_a_layer_that_is_not_called_is_named():
    model = tiny.tiny_vit()
    stack = LayerStack("vit.copies", copy.deepcopy(model.vit.layers))
    with pytest.raises(ValueError, match=r"ViTForImageClassification does not call layer 2 of 'vit\.copies'"):
        block_shapes(model, stack, [2], dummy_inputs(model))


def tiny_parakeet():
    """Mel bins whose number is in the config of the encoder."""
    encoder = {**PART, "num_mel_bins": 16, "subsampling_conv_channels": 8, "conv_kernel_size": 3}
    return transformers.ParakeetForCTC(transformers.ParakeetCTCConfig(vocab_size=12, encoder_config=encoder))


def tiny_moonshine():
    """Convolutions that no config tells."""
    sizes = {
        f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("num_hidden_layers", "num_attention_heads")
    }
    return transformers.MoonshineForConditionalGeneration(
        transformers.MoonshineConfig(hidden_size=16, intermediate_size=16, vocab_size=64, **sizes)
    )


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (tiny.tiny_vit, {"pixel_values": (3, 1, 8, 8)}),
        (tiny.tiny_clip, {"pixel_values": (3, 1, 8, 8)}),
        (tiny.tiny_bert, {"input_ids": (3, 8), "attention_mask": (3, 8)}),
        (lambda: tiny.tiny_bert("MultipleChoice"), {"input_ids": (3, 2, 8), "attention_mask": (3, 2, 8)}),
        (tiny.tiny_bart, {"input_ids": (3, 8), "attention_mask": (3, 8), "decoder_input_ids": (3, 8)}),
        (tiny.tiny_ctc, {"input_values": (3, 210)}),
        (tiny.tiny_ast, {"input_values": (3, 16, 8)}),
        (lambda: tiny.tiny_whisper("AudioClassification"), {"input_features": (3, 8, 20)}),
        (tiny_parakeet, {"input_features": (3, 64, 16)}),
        (tiny_moonshine, {"input_values": (3, 4096), "decoder_input_ids": (3, 8)}),
    ],
)
def test_dummy_inputs_have_the_shapes_that_the_model_takes(model, expected):
    model = model()
    before = torch.get_rng_state()
    inputs, again = dummy_inputs(model, batch_size=3), dummy_inputs(model, batch_size=3)
    assert {name: tuple(tensor.shape) for name, tensor in inputs.items()} == expected
    assert all(torch.equal(inputs[name], again[name]) for name in inputs)
    assert torch.equal(torch.get_rng_state(), before)


def test_dummy_tokens_avoid_special_ones_and_end_with_the_end():
    ids = dummy_inputs(tiny.tiny_bart(), batch_size=50)["input_ids"]
    assert (ids[:, -1] == 2).all()
    assert set(ids[:, :-1].flatten().tolist()) == set(range(3, tiny.VOCABULARY))


def test_what_no_dummy_input_can_be_made_of_is_said_without_internal_names():
    config = transformers.TimeSeriesTransformerConfig(prediction_length=4, context_length=8, d_model=16)
    with pytest.raises(ValueError, match="takes 'past_values', of which no example can be made from its config; hf_"):
        dummy_inputs(transformers.TimeSeriesTransformerForPrediction(config))


def test_dummy_tokens_avoid_the_placeholders_of_images():
    model = tiny.tiny_llama()
    model.config.image_token_id = 40
    assert 40 not in dummy_inputs(model, batch_size=50)["input_ids"]


def test_a_model_of_text_and_images_gets_text():
    model = tiny.tiny_bert()

    def forward(pixel_values: torch.Tensor, input_ids: torch.Tensor) -> None: ...

    model.forward = forward
    assert list(dummy_inputs(model)) == ["input_ids"]
