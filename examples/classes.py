"""Class names for the examples: those of splits and of the teacher are brought together by name, not by order alone."""

from __future__ import annotations

from collections.abc import Sequence

from datasets import ClassLabel, Dataset, Value
from launching import say
from transformers import PreTrainedModel


def with_classes(train: Dataset, *others: Dataset) -> list[Dataset]:
    """Splits whose column `label` is of type ClassLabel, with the names of the first one's in all of them.

    Raises:
        ValueError: If a row has no label, or another split has other classes.
    """
    for split in (train, *others):
        if not isinstance(split.features["label"], ClassLabel):
            blank = next((row for row, label in enumerate(split["label"]) if label in (None, "")), None)
            if blank is not None:
                raise ValueError(f"Row {blank} of the data has no label; leave out rows without one.")
    if isinstance(train.features["label"], ClassLabel):
        classes = train.features["label"]
    else:
        # Numbers are sorted as such: 10 comes after 9.
        classes = ClassLabel(names=[str(label) for label in sorted(train.unique("label"))])
    splits = []
    for split in (train, *others):
        if not isinstance(split.features["label"], ClassLabel):
            strange = next((str(one) for one in split.unique("label") if str(one) not in classes.names), None)
            if strange is not None:
                raise ValueError(f"A row to evaluate on has the class {strange!r}, which no row to train on has.")
            split = split.cast_column("label", Value("string")).cast_column("label", classes)
        splits.append(_in_order_of(split, classes.names, "the rows to evaluate on", "the rows to train on"))
    return splits


def of_teacher(teacher: PreTrainedModel, name: str, *splits: Dataset) -> list[Dataset]:
    """Splits whose labels are the indices of the teacher's classes of these names.

    Where one of both has numbers for names, they can only be told apart by order, and the other's names are kept.

    Args:
        teacher: Its config gets the names of the data set if it has none.
        name: What the person calls it.
        *splits: From `with_classes`.

    Raises:
        ValueError: If teacher and data set have other classes, or another number of them.
    """
    ours = splits[0].features["label"].names
    theirs = [label for _, label in sorted(teacher.config.id2label.items())]
    if len(theirs) != len(ours):
        raise ValueError(
            f"The teacher {name!r} has {len(theirs)} classes and the data set {len(ours)}; fine-tune it first with "
            "`--train_teacher`."
        )
    if theirs == [f"LABEL_{index}" for index in range(len(theirs))]:
        say(f"The teacher {name!r} names no classes; they are taken to be {', '.join(ours)}, in this order.")
        teacher.config.id2label = dict(enumerate(ours))
        teacher.config.label2id = {label: index for index, label in enumerate(ours)}
    elif ours == [str(index) for index in range(len(ours))]:
        say(f"The data set numbers its classes; they are taken to be {', '.join(theirs)}, in this order.")
    else:
        splits = [_in_order_of(split, theirs, "the data set", f"the teacher {name!r}") for split in splits]
    return list(splits)


def _in_order_of(rows: Dataset, names: Sequence[str], ours: str, theirs: str) -> Dataset:
    """Rows whose labels count in the order of `names`, where these are the names of their classes, in any case."""
    own = rows.features["label"].names
    if own == list(names):
        return rows
    mine, other = ({name.lower(): name for name in some} for some in (own, names))
    lacking = [(name, ours, theirs) for low, name in mine.items() if low not in other]
    lacking += [(name, theirs, ours) for low, name in other.items() if low not in mine]
    if lacking:
        name, one, another = lacking[0]
        raise ValueError(f"The class {name!r} is one of {one}, but not of {another}; rename it where it is wrong.")
    if not len(own) == len(mine) == len(names):
        raise ValueError(f"The classes of {ours} are {own}, and those of {theirs} {list(names)}; rename some of them.")
    return rows.align_labels_with_mapping({name: index for index, name in enumerate(names)}, "label")
