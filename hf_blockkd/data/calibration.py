"""Some examples to measure models on, and to fit maps to, before anything trains: rows and batches of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, Subset

from .seeding import random_states
from .streams import ReadAhead

NUM_EXAMPLES = 256
"""Training examples that connectors, and the weights of a narrower student, are fitted to."""
BATCH_SIZE = 8
"""Not the run's, so that what is fitted is alike however its batches are split."""


def calibration_rows(dataset: Any, seed: int, num_examples: int = NUM_EXAMPLES) -> Any:
    """Some examples of a data set, the same ones on every rank; of a stream, the first ones.

    Args:
        dataset: A data set, a list of rows, or a stream.
        seed: Of the data of the run.
        num_examples: How many, or all where there are fewer.

    Returns:
        A data set of its own, or what `ReadAhead` read of a stream, which goes on from there.

    Example:
        ```python
        >>> from hf_blockkd.data.calibration import calibration_rows
        >>> len(calibration_rows([{"labels": i} for i in range(20)], seed=0, num_examples=8))
        8

        ```
    """
    # These keys draw what rows do at random: with others, connectors of older runs would begin elsewhere.
    if is_stream(dataset):
        with random_states(f"connectors {seed}"):
            return ReadAhead(dataset, num_examples)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = order[:num_examples]
    return dataset.select(chosen) if hasattr(dataset, "select") else Subset(dataset, chosen)


def calibration_batches(rows: Any, collate: Callable, seed: int) -> Iterator[dict[str, Any]]:
    """Batches of `calibration_rows`, with random transforms drawn from states of their own.

    Args:
        rows: A data set or a list.
        collate: Makes a batch of rows, without columns that no model takes.
        seed: Of the data of the run.

    Example:
        ```python
        >>> from hf_blockkd.data.calibration import calibration_batches
        >>> [batch for batch in calibration_batches(list(range(12)), collate=sum, seed=0)]
        [28, 38]

        ```
    """
    # Without a generator of its own, a loader draws from the global one.
    batches = iter(DataLoader(rows, BATCH_SIZE, collate_fn=collate, generator=torch.Generator()))
    for number in range(-(-len(rows) // BATCH_SIZE)):
        with random_states(f"connectors {seed} {number}"):
            batch = next(batches)
        yield batch


def is_stream(dataset: Any) -> bool:
    """Whether the rows of a data set have no indices."""
    return isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__")
