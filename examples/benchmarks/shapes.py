"""The teachers, students and batches of the step benchmark."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """A pair of models, the student about a quarter of its teacher, and a batch.

    Attributes:
        name: For the table.
        is_language_model: Whether the labels are the next tokens.
        make_model: Builds the teacher (`True`) or the student (`False`).
        make_batch: Builds a batch with labels.
    """

    name: str
    is_language_model: bool
    make_model: Callable[[bool], PreTrainedModel]
    make_batch: Callable[[], Batch]


def _vit(width: int, is_teacher: bool) -> PreTrainedModel:
    width = width if is_teacher else width * 2 // 3
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_attention_heads=width // 64,
            num_hidden_layers=8 if is_teacher else 4,
            image_size=64,
            patch_size=8,
            num_labels=1000,
        )
    )


def _bert(is_teacher: bool) -> PreTrainedModel:
    width = 384 if is_teacher else 256
    return BertForSequenceClassification(
        BertConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_attention_heads=width // 32,
            num_hidden_layers=8 if is_teacher else 4,
        )
    )


def _llama(is_teacher: bool) -> PreTrainedModel:
    width = 384 if is_teacher else 256
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8192,
            hidden_size=width,
            intermediate_size=3 * width,
            num_attention_heads=width // 64,
            num_key_value_heads=width // 64,
            num_hidden_layers=8 if is_teacher else 4,
        )
    )


def _images(count: int) -> Batch:
    return {"pixel_values": torch.randn(count, 3, 64, 64), "labels": torch.randint(1000, (count,))}


def _sentences(count: int, length: int) -> Batch:
    token_ids = torch.randint(1000, 30_000, (count, length))
    return {
        "input_ids": token_ids,
        "attention_mask": torch.ones_like(token_ids),
        "labels": torch.randint(2, (count,)),
    }


def _text(count: int, length: int) -> Batch:
    token_ids = torch.randint(8192, (count, length))
    return {"input_ids": token_ids, "attention_mask": torch.ones_like(token_ids), "labels": token_ids}


SHAPES = (
    Shape("ViT-tiny", False, lambda is_teacher: _vit(192, is_teacher), lambda: _images(16)),
    Shape("ViT-small", False, lambda is_teacher: _vit(384, is_teacher), lambda: _images(16)),
    Shape("BERT", False, _bert, lambda: _sentences(32, 32)),
    Shape("Llama", True, _llama, lambda: _text(16, 64)),
)
