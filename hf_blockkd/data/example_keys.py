"""Keys of examples by what they hold: `KeyedCollator`; and of all batches of a loader: `data_fingerprint`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import datasets
import torch
import xxhash
from datasets.fingerprint import Hasher
from torch.utils.data import DataLoader

from ..losses.rows import IGNORED
from ..routing.examples import check_examples
from .unlabelled import LabelFilling

KEYS = "teacher_cache_keys"
"""Entry of a batch that holds the key of each example, (B,) int64."""
HASH = "xxh3_64"
"""At the speed of memory: an image takes no longer than to be copied into its batch, a fifteenth of blake2b's time."""


class KeyedCollator:
    """A data collator that also gives every example its key.

    Args:
        collator: Makes the batch; examples are the first dimension of all its tensors.
    """

    def __init__(self, collator: Callable[[list[Any]], Mapping[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, examples: list[Any]) -> dict[str, Any]:
        batch = dict(self.collator(examples))
        return {**batch, KEYS: torch.tensor(example_keys(batch, len(examples)))}


def data_fingerprint(loader: DataLoader[Any]) -> str | None:
    """A hash of all that the batches of a loader are made of: rows, transform and collator.

    It says only that a pass over the data may be left out. What a batch holds is told by its examples' own keys, since
    neither data set nor collator knows whether a transform is random, or of files that changed under their names.

    Args:
        loader: Of a `KeyedCollator`.

    Returns:
        `None` where the data set cannot tell (it is no `datasets.Dataset`) or the collator cannot be hashed.
    """
    collator = loader.collate_fn
    while isinstance(collator, (KeyedCollator, LabelFilling)):
        collator = collator.collator
    # Some make decoder inputs by a model, of which a hash would take a copy.
    if not isinstance(loader.dataset, datasets.Dataset) or getattr(collator, "model", None) is not None:
        return None
    try:
        return Hasher.hash((loader.dataset._fingerprint, loader.collate_fn))
    except Exception:
        return None


def example_keys(batch: Mapping[str, Any], num_examples: int) -> list[int]:
    """A 64-bit hash of every example of a batch, the same however much is padded at its end.

    Raises:
        ValueError: If the examples cannot be told apart in one of the tensors.
    """
    tensors = {name: value.detach().cpu() for name, value in sorted(batch.items()) if isinstance(value, torch.Tensor)}
    check_examples(tensors, num_examples, "`teacher_cache`")
    keys = []
    for example in range(num_examples):
        digest = xxhash.xxh3_64()
        for name, row in _without_padding({name: tensor[example] for name, tensor in tensors.items()}).items():
            digest.update(f"{name}{tuple(row.shape)}{row.dtype}".encode())
            digest.update(bytes_of(row))
        keys.append(int.from_bytes(digest.digest(), "little", signed=True))
    return keys


def _without_padding(example: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Integers without what comes after the last token, and decoder inputs without what comes after the last label."""
    mask, labels = example.get("attention_mask"), example.get("labels")
    # A mask of several sequences (multiple choice) ends where the longest does.
    ends = (
        {mask.shape[-1]: _end(mask.flatten(0, -2).any(0) if mask.ndim > 1 else mask != 0)} if mask is not None else {}
    )
    cut = {}
    for name, row in example.items():
        if row.is_floating_point() or not row.ndim:
            cut[name] = row
        elif name == "labels" or (name.startswith("decoder_") and labels is not None and labels.ndim):
            cut[name] = row[..., : _end(labels != IGNORED)] if row.ndim == 1 else row
        else:
            cut[name] = row[..., : ends.get(row.shape[-1], row.shape[-1])]
    return cut


def _end(present: torch.Tensor) -> int:
    """One more than the last place that is true."""
    places = present.nonzero()
    return int(places.max()) + 1 if len(places) else 0


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """A tensor's memory, to be hashed."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return memoryview(flat.view(torch.uint8).numpy())
