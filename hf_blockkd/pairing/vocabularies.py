"""Whether a token id means the same to both models: `check_vocabularies`."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

MOST_PADDING = 1024
"""Rows by which two vocabularies may differ unseen: models pad theirs to a multiple of up to this many."""


def check_vocabularies(student: PreTrainedModel, teacher: PreTrainedModel, processing_class: Any = None) -> None:
    """Both models read the same token ids, up to rows of padding at the end of the larger vocabulary.

    Vocabularies of different sizes are compared on what they have in common; where the tokenizers of both models can
    be had (the student's as `processing_class` or beside its weights, the teacher's beside its weights), they must
    agree on it.

    Args:
        student: The student.
        teacher: The teacher.
        processing_class: The tokenizer of the run, if it is one.

    Raises:
        ValueError: If the tokenizers disagree, or none can be compared and the sizes differ by more than padding.
    """
    if student.main_input_name != "input_ids" or teacher.main_input_name != "input_ids":
        return
    sizes = [model.get_input_embeddings().weight.shape[0] for model in (student, teacher)]
    is_tokenizer = isinstance(processing_class, PreTrainedTokenizerBase)
    ours = processing_class if is_tokenizer else _tokenizer_of(student)
    theirs = _tokenizer_of(teacher)
    if ours is not None and theirs is not None:
        _check_tokenizers(ours, theirs, min(sizes))
    elif abs(sizes[0] - sizes[1]) > MOST_PADDING:
        raise ValueError(
            f"The vocabulary has {sizes[0]} rows for the student {type(student).__name__} and {sizes[1]} for the "
            f"teacher {type(teacher).__name__}, which is more than padding; use models of one tokenizer."
        )


def _check_tokenizers(ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase, common: int) -> None:
    tokens = [{index: token for token, index in tokenizer.get_vocab().items()} for tokenizer in (ours, theirs)]
    for index in range(common):
        a, b = tokens[0].get(index), tokens[1].get(index)
        if a != b:
            raise ValueError(
                f"The tokenizers differ: token {index} is {a!r} for the student's {type(ours).__name__} and {b!r} for "
                f"the teacher's {type(theirs).__name__}; use models of one tokenizer."
            )


def _tokenizer_of(model: PreTrainedModel) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside a model's weights, as far as it is on this machine."""
    if not model.name_or_path:
        return None
    try:
        return AutoTokenizer.from_pretrained(model.name_or_path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError):
        return None
