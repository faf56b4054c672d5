"""Random transforms of the data that come out the same after a resume: `seed_batches`."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset


class SeededBatches:
    """A data set and its collator, with random states of their own for every batch.

    What augments or masks then depends on the seed, the epoch and the examples of a batch alone: neither on how often
    the model has drawn dropout, nor on which worker process makes the batch, nor on where a run was interrupted.

    Args:
        dataset: With `__getitem__` by index; all else that it has is found here, too.
        collate: Makes a batch of rows.
        seed: Of the data of a run.

    Attributes:
        epoch: A tensor with the number of the epoch, in memory that worker processes share.
    """

    def __init__(self, dataset: Any, collate: Callable[[list[Any]], Any], seed: int) -> None:
        self.dataset, self.collate, self.seed = dataset, collate, seed
        self.epoch = torch.zeros((), dtype=torch.long).share_memory_()
        self._told: int | None = None  # in this process

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # not there yet: a copy is being made
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __getitems__(self, indices: Sequence[int]) -> Sequence[int]:
        """What a data loader hands to its collator, which is `make`."""
        return indices

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch, of the data set itself, too, if it wants to know."""
        self.epoch.fill_(epoch)
        self._tell(epoch)

    def _tell(self, epoch: int) -> None:
        self._told = epoch
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def make(self, indices: Sequence[int]) -> Any:
        """A batch."""
        epoch = self.epoch.item()
        if epoch != self._told:  # a worker process that lives on, or a loader that does not pass it on
            self._tell(epoch)
        with random_states(f"{self.seed} {epoch} {list(indices)}"):
            if hasattr(self.dataset, "__getitems__"):
                rows = self.dataset.__getitems__(indices)
            else:
                rows = [self.dataset[index] for index in indices]
            return self.collate(rows)


def begin_epoch(loader: DataLoader[Any], epoch: int) -> None:
    """Tell seeded batches the epoch, which `Accelerator`'s loaders give to the sampler instead where they have one."""
    dataset = getattr(getattr(loader, "base_dataloader", loader), "dataset", None)
    if isinstance(dataset, SeededBatches):
        dataset.epoch.fill_(epoch)


def seed_batches(loader: DataLoader[Any], seed: int) -> None:
    """Give every batch of a data loader random states of its own, and the loader its former ones back after each.

    Args:
        loader: As `Accelerator` prepared it; that of a stream, whose batches have no indices, is left as it is.
        seed: Of the data of a run.
    """
    loader = getattr(loader, "base_dataloader", loader)
    if isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None:
        return
    batches = SeededBatches(loader.dataset, loader.collate_fn, seed)
    # A loader refuses another data set than that of its sampler, whose indices and length these batches keep.
    loader.__dict__["dataset"] = batches
    loader.collate_fn = batches.make
    if loader.persistent_workers:
        # They draw their seed once a run, and once more after a resume: not from the state that dropout is drawn from.
        loader.generator = torch.Generator().manual_seed(seed)


@contextmanager
def random_states(key: str, device: torch.device | None = None) -> Iterator[None]:
    """Seed python's, numpy's and torch's global random states by a text, and restore them.

    Args:
        key: The text.
        device: An accelerator whose state is seeded beside the CPU's.
    """
    with restored_random_states(device):
        seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest(), "little")
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)
        if device is not None and device.type != "cpu":
            torch.get_device_module(device).manual_seed(seed)
        yield


@contextmanager
def restored_random_states(device: torch.device | None = None) -> Iterator[None]:
    """Leave python's, numpy's and torch's global random states as they are, whatever is drawn inside.

    Args:
        device: An accelerator whose state is restored, too.
    """
    states = random.getstate(), np.random.get_state()
    devices = [] if device is None or device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type=devices[0].type if devices else "cuda"):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
