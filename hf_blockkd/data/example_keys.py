"""A key for every example of a batch, by what it holds: `KeyedCollator`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..losses.rows import IGNORED
from ..routing.examples import check_examples

KEYS = "teacher_cache_keys"
"""Entry of a batch that holds the key of each example, (B,) int64."""


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


def example_keys(batch: Mapping[str, Any], num_examples: int) -> list[int]:
    """A 64-bit hash of every example of a batch, the same however much is padded at its end.

    Raises:
        ValueError: If the examples cannot be told apart in one of the tensors.
    """
    tensors = {name: value.detach().cpu() for name, value in sorted(batch.items()) if isinstance(value, torch.Tensor)}
    check_examples(tensors, num_examples, "`teacher_cache`")
    keys = []
    for example in range(num_examples):
        digest = hashlib.blake2b(digest_size=8)
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
