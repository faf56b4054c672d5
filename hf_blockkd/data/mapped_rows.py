"""Rows of tensors by key, in files that are mapped into memory and never read as a whole: `MappedRows`."""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.utils import logging

logger = logging.get_logger(__name__)

SHARD_BYTES = 2**26
"""Size at which what was added is written out, so that an interruption loses no more than that."""


class MappedRows:
    """A folder of shards, safetensors files that hold some rows of every example under its key.

    A shard has `keys` (E,) int64, `ends` (E,) int64, where the rows of each example end, and tensors whose first
    dimension is rows, example after example. It is there whole or not at all; one that was torn later, by a full disk
    or an aborted copy, is passed over with a warning. Processes write to one folder at the same time, each its own
    shards, and shards of several folders may be put together. Where an example lies in more than one, the first by name
    counts, for every process alike.

    Shards are mapped: the system reads the pages that are asked for, and drops them when memory is short. The process
    itself holds what is not written yet, `SHARD_BYTES` at most, and 16 bytes an example, in which a key is found by
    bisection.

    Args:
        folder: Which exists.

    Raises:
        ValueError: If there are safetensors files of another kind.

    Example:
        ```python
        >>> import tempfile, torch
        >>> from hf_blockkd.data.mapped_rows import MappedRows
        >>> rows = MappedRows(tempfile.mkdtemp())
        >>> rows.add([7, 8], [1, 2], {"logits": torch.tensor([[0.0], [1.0], [2.0]])})
        >>> rows.write()
        >>> rows.counts([8, 7, 9]), rows.take([8, 7])["logits"].flatten().tolist()
        ([2, 1, None], [1.0, 2.0, 0.0])

        ```
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._shards: dict[str, dict[str, torch.Tensor]] = {}
        self._new: dict[int, dict[str, torch.Tensor]] = {}
        self._new_bytes = 0
        self._index([])
        self.read()

    def __contains__(self, key: int) -> bool:
        return key in self._new or self._find([key])[0] >= 0

    def __len__(self) -> int:
        """Number of examples."""
        return len(self._keys) + len(self._new)

    @property
    def shards(self) -> list[str]:
        """Names of the files that were found whole."""
        return list(self._shards)

    def add(self, keys: Sequence[int], counts: Sequence[int], rows: Mapping[str, torch.Tensor]) -> None:
        """Take in those examples of a batch that are not known yet.

        Args:
            keys: Of its examples.
            counts: Number of rows of each.
            rows: All of them, example after example.
        """
        rows = {name: tensor.cpu() for name, tensor in rows.items()}
        ends = np.cumsum(counts).tolist()
        for key, count, end in zip(keys, counts, ends, strict=True):
            if key not in self:
                # Clones: a slice would keep the whole batch alive.
                self._new[key] = {name: tensor[end - count : end].clone() for name, tensor in rows.items()}
                self._new_bytes += sum(part.nbytes for part in self._new[key].values())
        if self._new_bytes > SHARD_BYTES:
            self.write()

    def write(self) -> None:
        """Write what no process has written yet."""
        self.read()
        keys = [key for key, place in zip(self._new, self._find(list(self._new)), strict=True) if place < 0]
        if keys:
            parts = [self._new[key] for key in keys]
            tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            tensors["keys"] = torch.tensor(keys)
            tensors["ends"] = torch.tensor([len(next(iter(part.values()))) for part in parts]).cumsum(0)
            name = hashlib.blake2b(tensors["keys"].numpy().tobytes(), digest_size=8).hexdigest()
            replace(self.folder / f"{name}.safetensors", lambda temporary: save_file(tensors, temporary))
        self._new, self._new_bytes = {}, 0
        self.read()

    def read(self) -> None:
        """Find what lies in the folder by now, of other processes, too."""
        found = dict(self._shards)
        for path in self.folder.glob("*.safetensors"):
            if path.name in found:
                continue
            try:
                tensors = load_file(path)
            except SafetensorError as error:
                logger.warning_once(f"{path} is torn ({error}) and left out; what it held is computed again.")
                continue
            if not {"keys", "ends"} <= tensors.keys():
                raise ValueError(f"{path} holds no rows by key; name a folder that has nothing else in it.")
            for name, tensor in tensors.items():
                # Else every row that is asked for brings megabytes around it.
                _advise(tensor, "MADV_RANDOM")
                if name in ("keys", "ends"):
                    _advise(tensor, "MADV_WILLNEED")
            found[path.name] = tensors
        if len(found) > len(self._shards):
            self._shards = dict(sorted(found.items()))
            self._index([shard["keys"].numpy() for shard in self._shards.values()])

    def _index(self, keys: list[np.ndarray]) -> None:
        self._starts = np.cumsum([0, *map(len, keys)])
        self._tensors = list(self._shards.values())
        # Of equal keys the first.
        self._keys, self._places = np.unique(np.concatenate([np.empty(0, np.int64), *keys]), return_index=True)

    def _find(self, keys: Sequence[int]) -> np.ndarray:
        """The place of each key among the examples of all shards, one after the other; -1 where it is in none."""
        if not len(self._keys):
            return np.full(len(keys), -1)
        wanted = np.asarray(keys, np.int64)
        nearest = np.searchsorted(self._keys, wanted).clip(max=len(self._keys) - 1)
        return np.where(self._keys[nearest] == wanted, self._places[nearest], -1)

    def _locate(self, place: int) -> tuple[dict[str, torch.Tensor], slice]:
        """The shard of an example, and its rows there."""
        shard = int(np.searchsorted(self._starts, place, side="right")) - 1
        tensors, position = self._tensors[shard], int(place - self._starts[shard])
        start = tensors["ends"][position - 1].item() if position else 0
        return tensors, slice(start, tensors["ends"][position].item())

    def counts(self, keys: Sequence[int]) -> list[int | None]:
        """Number of rows of each example, `None` where it is not in a shard."""
        places = [None if place < 0 else self._locate(place)[1] for place in self._find(keys)]
        return [place and place.stop - place.start for place in places]

    def take(self, keys: Sequence[int]) -> dict[str, torch.Tensor]:
        """Rows, example after example.

        Args:
            keys: Of one example or more, all in shards.
        """
        parts = [self._locate(place) for place in self._find(keys)]
        names = [name for name in parts[0][0] if name not in ("keys", "ends")]
        found = {name: [tensors[name][rows] for tensors, rows in parts] for name in names}
        # The disk reads them all at once, not one after the other.
        for piece in (piece for pieces in found.values() for piece in pieces):
            _advise(piece, "MADV_WILLNEED")
        return {name: torch.cat(pieces) for name, pieces in found.items()}


def _advise(tensor: torch.Tensor, advice: str) -> None:
    """Tell the system, where it wants to know, how the pages of a mapped tensor will be read."""
    if hasattr(mmap, advice) and tensor.nbytes:
        before = tensor.data_ptr() % mmap.PAGESIZE
        address, size = ctypes.c_void_p(tensor.data_ptr() - before), ctypes.c_size_t(tensor.nbytes + before)
        ctypes.CDLL(None).madvise(address, size, getattr(mmap, advice))


def replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file so that it is there whole or not at all, also after a power failure.

    Args:
        path: Of the file.
        write: Writes it under another name.
    """
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    write(temporary)
    with temporary.open("r+b") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
