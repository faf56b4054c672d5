"""Which positions of its last states a head reads, for heads of every kind."""

import pytest
import torch
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BeitConfig,
    BeitForImageClassification,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    GPT2Config,
    GPT2ForSequenceClassification,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
)

from hf_blockkd.pairing.positions import position_mask
from hf_blockkd.routing.entering import capture_states, enter_at, record_extras
from hf_blockkd.routing.head_positions import LAST, head_positions, read_by_head
from hf_blockkd.routing.layers import find_layer_stack

from ..helpers import tiny_models as tiny

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
GPT2_CONFIG = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=99, pad_token_id=0)
IMAGE = {"image_size": 16, "patch_size": 8}
BART = {
    f"{part}_{name}": value
    for part in ("encoder", "decoder")
    for name, value in {"layers": 2, "attention_heads": 2, "ffn_dim": 32}.items()
}


@pytest.mark.parametrize(
    ("make", "positions"),
    [
        (tiny.tiny_vit, 1),
        (tiny.tiny_bert, 1),
        (lambda: DeiTForImageClassificationWithTeacher(DeiTConfig(**SMALL, **IMAGE)), 2),
        (lambda: BeitForImageClassification(BeitConfig(**SMALL, **IMAGE, use_mean_pooling=True)), None),
        (lambda: GPT2ForSequenceClassification(GPT2_CONFIG), LAST),
        (lambda: BartForSequenceClassification(BartConfig(d_model=16, vocab_size=99, **BART)), LAST),
        (lambda: Wav2Vec2ForSequenceClassification(Wav2Vec2Config(**SMALL, conv_dim=(16,) * 7)), None),
        (tiny.tiny_llama, None),
    ],
    ids=["vit", "bert", "deit", "beit, mean", "gpt2", "bart", "wav2vec2, mean", "llama"],
)
def test_positions_are_those_that_change_the_outputs(make, positions):
    model = make().eval()
    assert head_positions(model, find_layer_stack(model)) == positions


def test_nothing_is_known_of_a_head_without_gradients():
    class Detached(torch.nn.Linear):
        def forward(self, states):
            return super().forward(states).detach()

    model = tiny.tiny_bert().eval()
    model.classifier = Detached(model.config.hidden_size, 3)
    assert head_positions(model, find_layer_stack(model)) is None


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        (None, [[1, 1, 0, 0], [0, 1, 1, 1]]),
        (1, [[1, 0, 0, 0], [1, 0, 0, 0]]),
        (2, [[1, 1, 0, 0], [1, 1, 0, 0]]),
        (LAST, [[0, 1, 0, 0], [0, 0, 0, 1]]),
    ],
)
def test_padding_moves_what_a_head_reads_at_the_end_and_not_at_the_start(positions, expected):
    real = torch.tensor([[1.0, 1, 0, 0], [0, 1, 1, 1]])
    assert read_by_head(positions, real).tolist() == expected


def test_the_last_position_of_an_encoder_decoder_is_where_its_inputs_end():
    model = BartForSequenceClassification(BartConfig(d_model=16, vocab_size=99, **BART)).eval()
    stack, end = find_layer_stack(model), model.config.eos_token_id
    padding = model.config.pad_token_id
    ids = torch.tensor([[5, 6, 7, 8, 9, end], [5, 6, end, padding, padding, padding]])
    batch = {"input_ids": ids, "attention_mask": (ids != padding).long()}
    with torch.no_grad(), capture_states(stack, [2]) as captured, record_extras(stack) as extras:
        model(**batch)
    states = captured[2].requires_grad_()
    with enter_at(stack, 2, states, extras):
        model(**batch).logits.sum().backward()
    read = states.grad.ne(0).any(-1).long()
    real = position_mask(model, stack.path, batch, states)
    assert real.tolist() == [[1] * 6, [1, 1, 1, 1, 0, 0]]
    assert read_by_head(LAST, real, batch["attention_mask"]).tolist() == read.tolist()


@pytest.mark.parametrize("make", [tiny.tiny_bert, lambda: GPT2ForSequenceClassification(GPT2_CONFIG)])
@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_of_padded_texts_are_those_that_change_the_outputs(make, side):
    model = make().eval()
    stack = find_layer_stack(model)
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 8]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1] if side == "left" else [1, 1, 0, 0]])
    inputs = {"input_ids": ids * mask, "attention_mask": mask}
    with torch.no_grad(), capture_states(stack, [len(stack)]) as states, record_extras(stack) as extras:
        clean = model(**inputs).logits
    read = torch.zeros(2, 4)
    for place in range(4):
        changed = states[len(stack)].clone()
        changed[:, place] += 1.0 + torch.arange(changed.shape[-1])
        with torch.no_grad(), enter_at(stack, len(stack), changed, extras):
            read[:, place] = (model(**inputs).logits != clean).any(-1)
    assert torch.equal(read_by_head(head_positions(model, stack), mask.float()), read)
