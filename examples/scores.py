"""Figures of a classifier: accuracy, F1, and those of each class."""

from __future__ import annotations

from collections.abc import Mapping

from sklearn.metrics import f1_score, precision_recall_fscore_support
from transformers import EvalPrediction

from hf_blockkd.metrics import Accuracy


class Scores:
    """The `compute_metrics` of a trainer: accuracy, and the mean of the F1 of all classes.

    Args:
        names: Of the classes, by index.

    Attributes:
        classes: Name -> precision, recall, F1 and number of rows, in the last evaluation.
    """

    def __init__(self, names: Mapping[int, str]) -> None:
        self._names, self._accuracy = [names[index] for index in range(len(names))], Accuracy()
        self.classes: dict[str, dict[str, float]] = {}

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        found, labels = prediction.predictions.argmax(-1), prediction.label_ids
        figures = precision_recall_fscore_support(labels, found, labels=range(len(self._names)), zero_division=0.0)
        keys = ("precision", "recall", "f1", "rows")
        self.classes = {
            name: dict(zip(keys, (float(one) for one in own), strict=True))
            for name, *own in zip(self._names, *figures, strict=True)
        }
        f1 = f1_score(labels, found, average="macro", zero_division=0.0)
        return {**self._accuracy.compute(predictions=found, references=labels), "f1": float(f1)}
