"""Metrics with the interface of `evaluate`, computed without a network: `evaluate.load` asks the hub even for these."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate


class Accuracy(evaluate.Metric):
    """Share of predictions that equal their references, like `evaluate.load("accuracy")`.

    Example:
        ```python
        >>> from hf_blockkd.metrics import Accuracy
        >>> Accuracy().compute(predictions=[0, 1, 1, 2], references=[0, 1, 2, 2])
        {'accuracy': 0.75}

        ```
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of predictions that equal their references.",
            citation="",
            inputs_description="predictions and references: class indices",
            features=datasets.Features({"predictions": datasets.Value("int32"), "references": datasets.Value("int32")}),
        )

    def _compute(self, predictions: Sequence[int], references: Sequence[int], **kwargs: Any) -> dict[str, float]:
        hits = sum(prediction == reference for prediction, reference in zip(predictions, references, strict=True))
        return {"accuracy": float(hits) / len(references)}
