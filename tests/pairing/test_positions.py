"""Padding is found where a model's layers have it."""

import torch

from hf_blockkd.pairing.positions import rows_without_padding

from ..helpers.tiny_models import tiny_bert, tiny_xlnet


def test_rows_of_layers_that_take_steps_first_are_those_of_the_same_tokens():
    batch = {"attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}
    states = torch.randn(2, 3, 4)
    (expected,) = rows_without_padding(tiny_bert(), "", batch, states)
    (found,) = rows_without_padding(tiny_xlnet(), "transformer.layer.0.ff.layer_1", batch, states.transpose(0, 1))
    assert torch.equal(expected, states[batch["attention_mask"] > 0])
    assert torch.equal(found, expected)


def test_rows_of_heads_behind_such_layers_are_those_of_their_examples():
    batch = {"attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}
    states = torch.randn(2, 3, 4)
    (of_tokens,) = rows_without_padding(tiny_xlnet("TokenClassification"), "classifier", batch, states)
    assert torch.equal(of_tokens, states[batch["attention_mask"] > 0])
    (of_texts,) = rows_without_padding(tiny_xlnet(), "logits_proj", batch, states[:, 0])
    assert torch.equal(of_texts, states[:, 0])
