"""The teachers, students and batches of the step benchmark."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

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


def _vit(width: int, is_teacher: bool, depth: int = 8, image_size: int = 64, patch_size: int = 8) -> PreTrainedModel:
    width = width if is_teacher else width * 2 // 3
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_attention_heads=width // 64,
            num_hidden_layers=depth if is_teacher else depth // 2,
            image_size=image_size,
            patch_size=patch_size,
            num_labels=1000,
        )
    )


def _bert(width: int, is_teacher: bool, depth: int = 8) -> PreTrainedModel:
    width = width if is_teacher else width * 2 // 3
    return BertForSequenceClassification(
        BertConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_attention_heads=width // 32,
            num_hidden_layers=depth if is_teacher else depth // 2,
        )
    )


def _llama(width: int, is_teacher: bool, depth: int = 8, vocabulary: int = 8192) -> PreTrainedModel:
    width = width if is_teacher else width * 2 // 3
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=3 * width,
            num_attention_heads=width // 64,
            num_key_value_heads=width // 64,
            num_hidden_layers=depth if is_teacher else depth // 2,
        )
    )


def _images(count: int, size: int = 64) -> Batch:
    return {"pixel_values": torch.randn(count, 3, size, size), "labels": torch.randint(1000, (count,))}


def _sentences(count: int, length: int) -> Batch:
    token_ids = torch.randint(1000, 30_000, (count, length))
    return {
        "input_ids": token_ids,
        "attention_mask": torch.ones_like(token_ids),
        "labels": torch.randint(2, (count,)),
    }


def _text(count: int, length: int, vocabulary: int = 8192) -> Batch:
    token_ids = torch.randint(vocabulary, (count, length))
    return {"input_ids": token_ids, "attention_mask": torch.ones_like(token_ids), "labels": token_ids}


SHAPES = (
    Shape("ViT-tiny", False, partial(_vit, 192), lambda: _images(16)),
    Shape("ViT-small", False, partial(_vit, 384), lambda: _images(16)),
    Shape("BERT", False, partial(_bert, 384), lambda: _sentences(32, 32)),
    Shape("Llama", True, partial(_llama, 384), lambda: _text(16, 64)),
)
TINY = Shape("tiny", False, partial(_vit, 96, image_size=16), lambda: _images(2, size=16))
"""As many layers as the others, and hardly anything to compute: what is left is Python."""
GPU_SHAPES = (
    Shape(
        "ViT-base", False, partial(_vit, 768, depth=12, image_size=224, patch_size=16), lambda: _images(64, size=224)
    ),
    Shape("BERT-base", False, partial(_bert, 768, depth=12), lambda: _sentences(64, 128)),
    Shape(
        "Llama-300M",
        True,
        partial(_llama, 1152, depth=16, vocabulary=32_000),
        lambda: _text(8, 1024, vocabulary=32_000),
    ),
)
"""What a GPU is busy with: small shapes would only measure how fast kernels start."""
