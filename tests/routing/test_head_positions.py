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

from hf_blockkd.routing.head_positions import LAST, head_positions, read_by_head
from hf_blockkd.routing.layers import find_layer_stack

from ..helpers import tiny_models as tiny

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
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
        (lambda: GPT2ForSequenceClassification(GPT2Config(n_embd=16, n_layer=2, n_head=2, pad_token_id=0)), LAST),
        (lambda: BartForSequenceClassification(BartConfig(d_model=16, vocab_size=99, **BART)), LAST),
        (lambda: Wav2Vec2ForSequenceClassification(Wav2Vec2Config(**SMALL, conv_dim=(16,) * 7)), None),
        (tiny.tiny_llama, None),
    ],
    ids=["vit", "bert", "deit", "beit, mean", "gpt2", "bart", "wav2vec2, mean", "llama"],
)
def test_positions_are_those_that_change_the_outputs(make, positions):
    model = make().eval()
    assert head_positions(model, find_layer_stack(model)) == positions


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        (None, [[1, 1, 0, 0], [0, 1, 1, 1]]),
        (1, [[1, 0, 0, 0], [0, 0, 0, 0]]),
        (2, [[1, 1, 0, 0], [0, 1, 0, 0]]),
        (LAST, [[0, 1, 0, 0], [0, 0, 0, 1]]),
    ],
)
def test_padding_is_never_read(positions, expected):
    real = torch.tensor([[1.0, 1, 0, 0], [0, 1, 1, 1]])
    assert read_by_head(positions, real).tolist() == expected
