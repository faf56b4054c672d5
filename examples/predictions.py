"""What a student says of rows that need no labels, as a table beside it."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

import torch
from datasets import Dataset, Image

FILE_NAME = "predictions.csv"


def write_predictions(folder: Path, rows: Dataset, logits: torch.Tensor, names: Mapping[int, str]) -> Path:
    """Write a line for each row: its number, its text or the file of its image, the class, and how likely that is.

    Args:
        folder: Of the student.
        rows: With a column `text` or `image`.
        logits: (N, C), in the order of the rows.
        names: Of the classes, by index.

    Returns:
        The path of the table.
    """
    if "image" in rows.column_names:
        images = rows.cast_column("image", Image(decode=False))["image"]
        columns = {"image": [image["path"] for image in images]}
    else:
        columns = {"text": rows["text"]}
    likely, classes = logits.float().softmax(-1).max(-1)
    columns["prediction"] = [names[index] for index in classes.tolist()]
    columns["score"] = [f"{score:.4f}" for score in likely.tolist()]
    path = folder / FILE_NAME
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["row", *columns])
        table.writerows(zip(range(len(rows)), *columns.values(), strict=True))
    return path
