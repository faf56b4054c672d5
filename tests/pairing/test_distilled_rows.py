"""Which rows are compared with the teacher."""

import pytest
import torch

from hf_blockkd.pairing.distilled_rows import distilled_rows, rows_of_logits
from hf_blockkd.pairing.tasks import Task

from ..helpers.tiny_models import tiny_bert, tiny_ctc, tiny_dpt, tiny_llama, tiny_vit


def rows_of(model, inputs, everywhere=False):
    return distilled_rows(model, Task.of(model), inputs, everywhere).long().tolist()


TEXTS = {
    "input_ids": torch.randint(3, 60, (3, 5)),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 1, 1, 1]]),
    "labels": torch.tensor([[-100, -100, -100, 4, 5], [-100] * 5, [-100] * 5]),
}


def test_every_image_is_distilled_whatever_its_label():
    assert rows_of(tiny_vit(), {"labels": torch.tensor([1, -100])}) == [1, 1]


def test_a_text_without_any_label_is_distilled_where_it_is_no_padding_and_others_where_they_have_labels():
    expected = [[0, 0, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1]]
    assert rows_of(tiny_llama(), TEXTS) == expected


def test_prompts_are_distilled_if_asked_for():
    assert rows_of(tiny_llama(), TEXTS, everywhere=True)[0] == [1, 1, 1, 1]


def test_tokens_that_predict_themselves_are_rows_of_their_own():
    model = tiny_bert("TokenClassification")
    assert rows_of(model, TEXTS) == [[0, 0, 0, 1, 1], [1, 1, 1, 0, 0], [0, 0, 1, 1, 1]]


@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("left", [False, True])
def test_what_is_distilled_does_not_depend_on_padding(padding, left):
    def padded(value, tensor):
        more = torch.full((1, padding), value)
        return torch.cat([more, tensor] if left else [tensor, more], dim=1)

    inputs = {
        "attention_mask": padded(0, torch.ones(1, 4, dtype=torch.long)),
        "labels": padded(-100, torch.full((1, 4), -100)),
    }
    assert sum(rows_of(tiny_llama(), inputs)[0]) == 3


def test_a_batch_may_say_itself_which_tokens_are_distilled():
    inputs = {**TEXTS, "distill_mask": torch.tensor([[0, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0] * 5])}
    assert rows_of(tiny_llama(), inputs) == [[1, 0, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("family", ["Wav2Vec2", "Hubert"])
def test_the_frames_of_a_sound_count_as_far_as_the_model_makes_them_of_no_padding(family):
    model, mask = tiny_ctc(family), torch.ones(2, 100, dtype=torch.long)
    mask[1, 60:] = 0
    sounds = {"input_values": torch.randn(2, 100), "attention_mask": mask}
    counted = rows_of_logits(model, sounds, model(**sounds).logits)
    whole, cut = (model(input_values=torch.randn(1, length)).logits.shape[1] for length in (100, 60))
    assert counted.sum(1).tolist() == [whole, cut]
    assert counted[1, :cut].all()


def test_every_pixel_of_the_logits_is_a_row():
    logits = torch.randn(2, 4, 4, 5)
    assert rows_of_logits(tiny_dpt(), {"pixel_values": torch.randn(2, 1, 16, 16)}, logits).shape == (2, 4, 4)
