"""Rows of a stream that were read ahead of a run, and are the first of it nevertheless: `ReadAhead`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

MOST_WORKERS = 1024


class ReadAhead(IterableDataset):
    """A stream of which some rows were looked at before: its first pass gives those, and goes on where they end.

    So a stream that runs once loses nothing, and one with a state of its own is not shifted. Of several worker
    processes, each begins anew, as with the stream itself, whose business it is how its rows are shared out; where it
    gives one and the same iterator each time, all of them go on with that, as they would have done.

    Args:
        stream: Any iterable; all else that it has is found here, too.
        count: Number of rows to read.

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

    def __init__(self, stream: Any, count: int) -> None:
        self.stream = stream
        self._rest: Iterator[Any] | None = iter(stream)
        self.rows = list(itertools.islice(self._rest, count))
        # Shared with worker processes, which are started anew for each pass.
        self._begun = torch.zeros(MOST_WORKERS, dtype=torch.bool).share_memory_()

    def __iter__(self) -> Iterator[Any]:
        worker, rest = get_worker_info(), self._rest
        place = 0 if worker is None else worker.id
        has_begun, self._begun[place], self._rest = self._begun[place].item(), True, None
        if rest is None or has_begun:
            return iter(self.stream)
        if worker is None or worker.num_workers == 1:
            return itertools.chain(self.rows, rest)
        fresh = iter(self.stream)
        return itertools.chain(self.rows, rest) if fresh is rest else fresh

    def __getattr__(self, name: str) -> Any:
        if name == "stream":  # not there yet: a copy is being made
            raise AttributeError(name)
        return getattr(self.stream, name)

    def __getstate__(self) -> dict[str, Any]:
        # An iterator may not be copied into a worker that is started anew; the stream can only begin again there.
        return {"stream": self.stream, "_rest": None, "rows": [], "_begun": self._begun}
