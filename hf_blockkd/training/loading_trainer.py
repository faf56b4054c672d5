"""A `Trainer` whose batches are as distillation needs them: `LoadingTrainer`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.data_loader import DataLoaderShard
from torch.utils.data import DataLoader

from ..data.calibration import calibration_batches, calibration_rows
from ..data.captured import CapturedCollator
from ..data.checks import check_dropped_columns
from ..data.example_keys import KeyedCollator
from ..data.seeding import restored_random_states
from ..data.streams import ReadAhead
from ..data.unlabelled import LabelFilling, is_unlabelled
from ..losses.rows import IGNORED
from ..pairing.pair import Pair
from ..saving.resumable_trainer import ResumableTrainer
from .on_policy import with_completions


class LoadingTrainer(ResumableTrainer):
    """Rows may lack labels, some of them may be looked at before the first step, and examples may have keys.

    What a server captured of the teacher is read, and the student completes prompts itself, where that is asked for.

    Attributes:
        pair: The models.
        trains_unlabelled: Whether rows without a label teach anything.
        is_keyed: Whether the batches of a run say which examples they are of.
    """

    pair: Pair
    trains_unlabelled: bool = True
    is_keyed: bool = False
    _read_ahead: ReadAhead | None = None
    _loader_is_due: bool = False

    @contextmanager
    def _collating(self, trains: bool = False, keyed: bool = False) -> Iterator[None]:
        """Loaders that are made meanwhile read what was captured, fill labels in, and give keys."""
        usual, columns = self.data_collator, self.args.captured_columns
        collator = usual if columns is None else CapturedCollator(usual, columns, self.pair.common_classes)
        filling = LabelFilling(collator, self.pair.task, trains and self.trains_unlabelled)
        self.data_collator = KeyedCollator(filling) if keyed else filling
        try:
            yield
        finally:
            self.data_collator = usual

    def calibration_rows(self) -> Any:
        """Some examples of the training set, those of a stream read once, and given to the next run once more."""
        dataset, ahead = self.train_dataset, self._read_ahead
        if dataset is None:
            return []
        if ahead is not None and ahead.stream is dataset:
            return ahead.rows
        rows = calibration_rows(dataset, self.args.seed_of_data, num_workers=self.args.dataloader_num_workers)
        if not isinstance(rows, ReadAhead):
            return rows
        self._read_ahead = rows
        return rows.rows

    def calibration_batches(self) -> Iterator[dict[str, Any]]:
        """Batches of `calibration_rows`, on the device."""
        with self._collating(trains=True):
            collate = self._get_collator_with_removed_columns(self.data_collator, description="training")
        return map(self._prepare_inputs, calibration_batches(self.calibration_rows(), collate, self.args.seed_of_data))

    def keyed_batches(self) -> DataLoader[Any]:
        """All of the training set in its order, with keys."""
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            with self._collating(trains=True, keyed=True):
                return super().get_test_dataloader(self.train_dataset)
        finally:
            self.args.dataloader_drop_last = drop_last

    def begin_run(self) -> None:
        """The next loader of training batches is the run's own: it goes on with what was read ahead, and has keys."""
        self._loader_is_due = True

    def get_train_dataloader(self) -> DataLoader[Any]:
        is_own, self._loader_is_due = self._loader_is_due, False
        dataset = self.train_dataset
        try:
            ahead = self._read_ahead
            if is_own and ahead is not None and ahead.stream is dataset:
                self.train_dataset, self._read_ahead = ahead, None
            with self._collating(trains=True, keyed=is_own and self.is_keyed):
                loader = super().get_train_dataloader()
        finally:
            self.train_dataset = dataset
        # A run's own batches are checked and counted before `_prepare_inputs` brings them to the device, which waits.
        if is_own and isinstance(loader, DataLoaderShard) and not self.args.lmbda:
            loader.device = None
        return loader

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        # What the student writes is written for the whole window before its rows are counted.
        own = self.model, self.args, self.state.global_step, self.accelerator, self.processing_class
        return super().get_batch_samples(with_completions(epoch_iterator, *own), num_batches, device)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        with self._collating():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        with self._collating():
            return super().get_test_dataloader(test_dataset)

    def has_no_labels(self, dataset: Any, surely: bool = False) -> bool:
        """Whether neither the rows of a data set nor the batches that are made of them have labels.

        Args:
            dataset: A data set, or the name of one of several; default: that of the trainer.
            surely: As in `is_unlabelled`.
        """
        dataset = self.eval_dataset if dataset is None else dataset
        dataset = self.eval_dataset[dataset] if isinstance(dataset, str) else dataset
        if self.pair.embeddings is not None:  # for which the teacher makes them
            return False
        if dataset is None or isinstance(dataset, dict) or not is_unlabelled(dataset, self.pair.task, surely):
            return False
        # Collators of language models make labels of the text.
        with restored_random_states(self.accelerator.device):
            batch = next(iter(self.get_eval_dataloader(dataset)))
        labels = [batch.get(name) for name in self.pair.task.label_names]
        return any(one is None or (isinstance(one, torch.Tensor) and bool((one == IGNORED).all())) for one in labels)

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        kept = super()._remove_unused_columns(dataset, description)
        dropped = [name for name in dataset.column_names or () if name not in (kept.column_names or ())]
        if dropped and hasattr(kept, "__len__") and len(kept):
            check_dropped_columns(kept, self.data_collator, dropped)
        return kept

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the columns that the student or the teacher takes, and those that were captured."""
        super()._set_signature_columns_if_needed()
        ours = [*self.pair.columns, *(self.args.captured_columns or ())]
        self._signature_columns += [name for name in ours if name not in self._signature_columns]
