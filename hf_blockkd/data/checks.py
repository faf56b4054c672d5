"""What must hold of the data before anything is trained. Every check raises a `ValueError`."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ..losses.rows import IGNORED


def check_not_empty(dataset: Any) -> None:
    """The training set has rows, as far as it knows its length."""
    if hasattr(dataset, "__len__") and len(dataset) == 0:
        raise ValueError("`train_dataset` is empty; check the file, the split and any filter that it went through.")


def check_label_column(dataset: Any, num_classes: int | None) -> None:
    """Classes of the training set are numbers, none outside the head, as far as it can be seen without making batches.

    Args:
        dataset: A `datasets.Dataset` without a transform of its own, or a list of rows; others are checked batch by
            batch.
        num_classes: Number of classes, or `None` for heads that do not classify examples.
    """
    name = next((name for name in ("labels", "label", "label_ids") if name in _column_names(dataset)), None)
    if num_classes is None or name is None:
        return
    own_format = isinstance(dataset, datasets.Dataset) and dataset.format["type"] == "custom"
    if not own_format and isinstance(text := dataset[0][name], str):
        raise ValueError(
            f"`{name}` holds the text {text!r} in row 0 of the training set, but a class is a number; look each name "
            "up in the teacher's `config.label2id`."
        )
    if isinstance(dataset, datasets.Dataset):
        if own_format or not _is_class_index(dataset.features[name]):
            return
        values = dataset.select_columns(name).with_format("numpy")[:][name]
    elif np.ndim(dataset[0][name]) == 0:
        values = np.asarray([row[name] for row in dataset])
    else:
        return
    if not np.issubdtype(values.dtype, np.integer):
        return
    wrong = np.flatnonzero((values != IGNORED) & ((values < 0) | (values >= num_classes)))
    if len(wrong):
        raise ValueError(
            f"`{name}` holds {values[wrong[0]]} in row {wrong[0]} of the training set, but there are {num_classes} "
            f"classes, 0 to {num_classes - 1} ({IGNORED} is ignored); correct the labels or `num_labels`."
        )


def _column_names(dataset: Any) -> list[str]:
    if isinstance(dataset, datasets.Dataset):
        return dataset.column_names
    return list(dataset[0]) if isinstance(dataset, list) and dataset and isinstance(dataset[0], dict) else []


def _is_class_index(feature: Any) -> bool:
    return isinstance(feature, datasets.ClassLabel) or "int" in str(getattr(feature, "dtype", ""))


def check_padding(data_collator: Callable) -> None:
    """A collator that pads with a tokenizer has a token to pad with."""
    tokenizer = getattr(data_collator, "tokenizer", None)
    if isinstance(tokenizer, PreTrainedTokenizerBase) and tokenizer.pad_token is None:
        raise ValueError(
            f"The {type(tokenizer).__name__} of {type(data_collator).__name__} has no pad token; set "
            "`tokenizer.pad_token = tokenizer.eos_token`, or give it one of its own."
        )


def check_dropped_columns(dataset: Any, data_collator: Callable, dropped: list[str]) -> None:
    """Neither a transform of the data set nor the collator needs a column that `remove_unused_columns` dropped.

    Args:
        dataset: After the columns went; its first row is collated. The torch and python random states stay as they
            were.
        data_collator: As given to the trainer.
        dropped: The columns that went.
    """
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            data_collator([dataset[0]])
    except KeyError as error:
        if error.args and error.args[0] in dropped:
            raise ValueError(
                f"The column {error.args[0]!r} is read when a batch is made, but `remove_unused_columns` dropped it "
                "because neither model takes it; set `remove_unused_columns=False`."
            ) from error
    except Exception:
        pass
    finally:
        random.setstate(state)
