"""Rows without labels, which train on the teacher alone: `LabelFilling`, `is_unlabelled`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import datasets
import numpy as np
import torch

from ..losses.rows import IGNORED
from ..pairing.tasks import Task
from .calibration import is_stream

LABEL_KEYS = ("labels", "label", "label_ids")
"""What rows call their label; collators make `labels` of it."""


class LabelFilling:
    """A data collator that gives -100 to rows without a label, in the form that the labels of others have.

    A row has no label where it is missing, `None`, or not a number, as a table with gaps reads in some formats; of
    several values of a row, each may be so by itself. Batches of rows none of which names a label get one only where
    they train.

    Args:
        collator: Makes a batch of rows.
        task: What the heads predict.
        trains: Whether a batch without labels gets some.

    Raises:
        ValueError: For an encoder-decoder that would make its decoder's inputs of labels that are not there.

    Example:
        ```python
        >>> from transformers import ViTConfig, ViTForImageClassification, default_data_collator
        >>> from hf_blockkd.data.unlabelled import LabelFilling
        >>> from hf_blockkd.pairing.tasks import Task
        >>> model = ViTForImageClassification(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
        >>> collate = LabelFilling(default_data_collator, Task.of(model))
        >>> collate([{"x": 0.5, "label": 1}, {"x": 0.1, "label": None}, {"x": 0.2}])["labels"]
        tensor([   1, -100, -100])

        ```
    """

    def __init__(self, collator: Callable[[list[Any]], Mapping[str, Any]], task: Task, trains: bool = True) -> None:
        self.collator, self.task, self.trains = collator, task, trains

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        batch = self.collator(self._filled(rows))
        if not self.trains or any(batch.get(name) is not None for name in self.task.label_names):
            return batch
        return {**batch, **self._labels_for(batch)}

    def _filled(self, rows: list[Any]) -> list[Any]:
        """The rows, with a label in each if any of them names one."""
        if not all(isinstance(row, Mapping) for row in rows):
            return rows
        for key in dict.fromkeys((*self.task.label_names, *LABEL_KEYS)):
            if not any(key in row for row in rows):
                continue
            if self.task.form is None and self.task.problem_type != "single_label_classification":
                rows = [{**row, key: _without_gaps(row[key])} if key in row else row for row in rows]
            has_label = [not self._is_missing(row.get(key)) for row in rows]
            if all(has_label):
                continue
            example = next((self._whole(row[key]) for row, has in zip(rows, has_label, strict=True) if has), None)
            rows = [
                {**row, key: self._whole(row[key]) if has else self._label_like(example, row)}
                for row, has in zip(rows, has_label, strict=True)
            ]
        return rows

    def _is_missing(self, label: Any) -> bool:
        return label is None or (self._is_scalar(label) and bool(label != label))

    def _whole(self, label: Any) -> Any:
        """A class index that a table with gaps reads as a floating-point number."""
        is_index = self.task.problem_type in (None, "single_label_classification")
        return int(label) if is_index and self._is_scalar(label) else label

    @staticmethod
    def _is_scalar(label: Any) -> bool:
        return isinstance(label, float) or (isinstance(label, (torch.Tensor, np.generic)) and not label.ndim)

    def _label_like(self, example: Any, row: Mapping[str, Any]) -> Any:
        """-100, as often as another row of the batch has labels, or as this one has tokens."""
        if self.task.label_dims == 2:
            text = row.get(self.task.text)
            if text is None:
                raise self._no_decoder_inputs(row)
            return torch.full_like(text, IGNORED) if isinstance(text, torch.Tensor) else [IGNORED] * len(text)
        if self.task.form is not None and (example is None or isinstance(example, Mapping)):
            (missing,) = self.task.form.missing(1)
            return missing if missing is None else missing.tolist()
        if example is not None:
            is_tensor = isinstance(example, torch.Tensor)
            return torch.full_like(example, IGNORED) if is_tensor else np.full_like(example, IGNORED).tolist()
        if self.task.problem_type in ("regression", "multi_label_classification"):
            return [float(IGNORED)] * self.task.num_classes if self.task.num_classes > 1 else float(IGNORED)
        return IGNORED

    def _no_decoder_inputs(self, given: Mapping[str, Any]) -> ValueError:
        return ValueError(
            f"`labels` missing from the batch (keys: {', '.join(given)}), of which {self.task.name} makes the inputs "
            f"of its decoder; give it `{self.task.text}`, or texts that the teacher has generated as labels."
        )

    def _labels_for(self, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Labels of -100 for a whole batch."""
        task = self.task
        if task.form is not None:
            return {"labels": task.form.missing(_batch_size(batch))}
        if task.over_vocabulary and task.text not in batch:
            raise self._no_decoder_inputs(batch)
        if task.label_dims == 2:
            return {"labels": torch.full_like(batch[task.text], IGNORED)}
        shape: tuple[int, ...] = (_batch_size(batch),)
        if task.problem_type in ("regression", "multi_label_classification"):
            shape += (task.num_classes,) if task.num_classes > 1 else ()
            return {"labels": torch.full(shape, float(IGNORED))}
        return {name: torch.full(shape, IGNORED) for name in task.label_names}


def is_unlabelled(dataset: Any, task: Task, surely: bool = False) -> bool:
    """Whether no row of a data set has a label, as far as can be seen without reading a stream.

    Args:
        dataset: A `datasets.Dataset` or a list of rows, or another one, of which the first row is looked at.
        task: What the heads predict.
        surely: Whether of another one nothing is said.
    """
    keys = (*task.label_names, *LABEL_KEYS)
    if isinstance(dataset, datasets.Dataset) and dataset.format["type"] != "custom":
        plain = dataset.with_format(None)
        return not any(key in plain.column_names and _has_value(plain[key]) for key in keys)
    if (
        is_stream(dataset)
        or not hasattr(dataset, "__getitem__")
        or not len(dataset)
        or not isinstance(dataset[0], Mapping)
    ):
        return False
    if isinstance(dataset, list):
        return not _has_value(row.get(key) for row in dataset for key in keys)
    return not surely and all(dataset[0].get(key) is None for key in keys)


def _batch_size(batch: Mapping[str, Any]) -> int:
    return len(next(value for value in batch.values() if isinstance(value, torch.Tensor)))


def _has_value(column: Any) -> bool:
    values: Iterator[Any] = iter(column)
    return any(value is not None and not np.all(_gaps(value) | (np.asarray(value) == IGNORED)) for value in values)


def _without_gaps(label: Any) -> Any:
    """The values of a row, with -100 where there is none; all else as it is."""
    gaps = _gaps(label)
    if not gaps.ndim or not gaps.any():
        return label
    if isinstance(label, torch.Tensor):
        return label.masked_fill(torch.from_numpy(gaps), IGNORED)
    if isinstance(label, np.ndarray):
        return np.where(gaps, label.dtype.type(IGNORED), label)
    filler = float(IGNORED) if any(isinstance(one, float) for one in label) else IGNORED
    return [filler if gap else one for one, gap in zip(label, gaps, strict=True)]


def _gaps(label: Any) -> np.ndarray:
    """Which of the values of a label are `None` or not a number, in its shape."""
    values = np.asarray(label)
    if values.dtype == object:
        return np.array([one is None or one != one for one in values.flat], dtype=bool).reshape(values.shape)
    return np.isnan(values) if values.dtype.kind == "f" else np.zeros(values.shape, dtype=bool)
