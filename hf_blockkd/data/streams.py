"""Rows of a stream that were read ahead of a run, and are the first of it nevertheless: `ReadAhead`."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset


class ReadAhead(IterableDataset):
    """A stream of which some rows were looked at before, and which a run reads from its beginning nevertheless.

    In this process, and in a single worker, its first pass gives those rows and goes on where they end: so a stream
    that runs once loses nothing, and one with a state of its own is not shifted. Several workers begin with the stream
    as it is here, whose business it is how its rows are shared out; so what is looked at is read in a worker process,
    too, and the stream here stays at its beginning. What processes have in common moves on, such as the place in a file
    that the stream holds open: one that opens its files when it is read loses nothing.

    Args:
        stream: Any iterable; all else that it has is found here, too.
        count: Number of rows to read.
        num_workers: Processes that will read the stream in the run.

    Attributes:
        rows: What was read.

    Example:
        ```python
        >>> from hf_blockkd.data.streams import ReadAhead
        >>> once = iter(range(5))
        >>> ahead = ReadAhead(once, 2)
        >>> ahead.rows, list(ahead)
        ([0, 1], [0, 1, 2, 3, 4])

        ```
    """

    def __init__(self, stream: Any, count: int, num_workers: int = 0) -> None:
        self.stream = stream
        self._rest: Iterator[Any] | None = None
        self.rows: list[Any] = []
        # Shared with a worker process, which is started anew for each pass.
        self._begun = torch.zeros((), dtype=torch.bool).share_memory_()
        if num_workers > 1:
            # As bytes, since tensors would come in shared memory, a file each.
            worker = DataLoader(self, batch_size=None, num_workers=1, collate_fn=pickle.dumps)
            self.rows = [pickle.loads(row) for row in itertools.islice(worker, count)]
        else:
            self._rest = iter(stream)
            self.rows = list(itertools.islice(self._rest, count))

    def __iter__(self) -> Iterator[Any]:
        has_begun, self._begun[...], rest, self._rest = self._begun.item(), True, self._rest, None
        return iter(self.stream) if rest is None or has_begun else itertools.chain(self.rows, rest)

    def set_epoch(self, epoch: int) -> None:
        """As the stream has it; the rows of another epoch than the first, which a resumed run begins with, are others.

        Args:
            epoch: From 0.
        """
        if hasattr(self.stream, "set_epoch"):
            self._rest = self._rest if epoch == 0 else None
            self.stream.set_epoch(epoch)

    def __getattr__(self, name: str) -> Any:
        if name == "stream":  # not there yet: a copy is being made
            raise AttributeError(name)
        return getattr(self.stream, name)

    def __getstate__(self) -> dict[str, Any]:
        # An iterator may not be copied into a worker that is started anew; the stream can only begin again there.
        return {"stream": self.stream, "_rest": None, "rows": [], "_begun": self._begun}
