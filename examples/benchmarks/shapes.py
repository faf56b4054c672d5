"""The teachers, students and batches of the step benchmark."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
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
        outputs: What both models give: `"classes"`, `"tokens"`, the next ones, or `"vectors"`, one for each sentence.
        make_model: Builds the teacher (`True`) or the student (`False`).
        make_batch: Builds a batch with labels, all of them ignored where there are none.
        num_blocks: Into how many both are cut.
    """

    name: str
    outputs: str
    make_model: Callable[[bool], PreTrainedModel]
    make_batch: Callable[[], Batch]
    num_blocks: int = 4


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


def _minilm(is_teacher: bool) -> PreTrainedModel:
    config = BertConfig(
        hidden_size=384, intermediate_size=1536, num_attention_heads=12, num_hidden_layers=6 if is_teacher else 3
    )
    return BertModel(config, add_pooling_layer=False)


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


def _unlabelled(count: int, length: int) -> Batch:
    return {**_sentences(count, length), "labels": torch.full((count,), -100)}


def _text(count: int, length: int, vocabulary: int = 8192) -> Batch:
    token_ids = torch.randint(vocabulary, (count, length))
    return {"input_ids": token_ids, "attention_mask": torch.ones_like(token_ids), "labels": token_ids}


SHAPES = (
    Shape("ViT-tiny", "classes", partial(_vit, 192), lambda: _images(16)),
    Shape("ViT-small", "classes", partial(_vit, 384), lambda: _images(16)),
    Shape("BERT", "classes", partial(_bert, 384), lambda: _sentences(32, 32)),
    Shape("Llama", "tokens", partial(_llama, 384), lambda: _text(16, 64)),
    Shape("MiniLM", "vectors", _minilm, lambda: _unlabelled(32, 64), num_blocks=3),
)
TINY = Shape("tiny", "classes", partial(_vit, 96, image_size=16), lambda: _images(2, size=16))
"""As many layers as the others, and hardly anything to compute: what is left is Python."""
GPU_SHAPES = (
    Shape(
        "ViT-base",
        "classes",
        partial(_vit, 768, depth=12, image_size=224, patch_size=16),
        lambda: _images(64, size=224),
    ),
    Shape("BERT-base", "classes", partial(_bert, 768, depth=12), lambda: _sentences(64, 128)),
    Shape(
        "Llama-300M",
        "tokens",
        partial(_llama, 1152, depth=16, vocabulary=32_000),
        lambda: _text(8, 1024, vocabulary=32_000),
    ),
    Shape("MiniLM", "vectors", _minilm, lambda: _unlabelled(256, 128), num_blocks=3),
)
"""What a GPU is busy with: small shapes would only measure how fast kernels start."""
