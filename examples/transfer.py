"""What students train on besides labelled rows: rows that never had a label, or whose labels are left out."""

from __future__ import annotations

from typing import Any

from datasets import Dataset, concatenate_datasets


def transfer_rows(labelled: Dataset, unlabelled: Dataset | None, args: Any) -> Dataset:
    """Rows for students, with `None` for a label where there is none.

    Args:
        labelled: With a column `label`.
        unlabelled: Rows of the same other columns; default: none.
        args: With `label_share` and `split_seed`.
    """
    if args.label_share < 1:
        num_labels = round(args.label_share * len(labelled))
        rows = labelled.shuffle(seed=args.split_seed)
        labels = [label if index < num_labels else None for index, label in enumerate(rows["label"])]
        feature = labelled.features["label"]
        labelled = rows.remove_columns("label").add_column("label", labels, feature=feature)
    if unlabelled is None:
        return labelled
    labels = [None] * len(unlabelled)
    extra = unlabelled.add_column("label", labels, feature=labelled.features["label"])
    return concatenate_datasets([labelled, extra.cast(labelled.features)])
