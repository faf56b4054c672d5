"""Metrics with the interface of `evaluate`, computed without a network: `evaluate.load` asks the hub even for these."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np


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


class SimilarityCorrelation(evaluate.Metric):
    """Rank correlation (Spearman's) between the cosines of all pairs of vectors and those of their references.

    It compares embedding models whatever the widths of their vectors are, which may differ.

    Example:
        ```python
        >>> from hf_blockkd.metrics import SimilarityCorrelation
        >>> vectors = [[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]
        >>> found = SimilarityCorrelation().compute(predictions=vectors, references=[[2.0], [3.0], [-1.0]])
        >>> round(found["spearman"], 3)  # the order is the same, but for a tie
        0.866

        ```
    """

    def _info(self) -> evaluate.MetricInfo:
        vector = datasets.List(datasets.Value("float32"))
        return evaluate.MetricInfo(
            description="Spearman's correlation between two sets of pairwise cosines.",
            citation="",
            inputs_description="predictions and references: a vector for each example",
            features=datasets.Features({"predictions": vector, "references": vector}),
        )

    def _compute(self, predictions: Any, references: Any, **kwargs: Any) -> dict[str, float]:
        ours, theirs = (_ranks(_cosines(np.asarray(vectors))) for vectors in (predictions, references))
        return {"spearman": float(np.corrcoef(ours, theirs)[0, 1])}


def _cosines(vectors: np.ndarray) -> np.ndarray:
    """Of each pair once."""
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors @ vectors.T)[np.triu_indices(len(vectors), k=1)]


def _ranks(values: np.ndarray) -> np.ndarray:
    """From 1; equal values have the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[place]
