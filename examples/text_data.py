"""Text for the examples: where it comes from, and how it becomes tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from data_files import FORMATS, DataArguments, choose_splits, labelled, load_splits, load_test, read_file
from datasets import Dataset


@dataclass
class TextDataArguments(DataArguments):
    """Which texts."""

    dataset: str = field(
        default="stanfordnlp/sst2",
        metadata={
            "help": f"A hub data set, a file ({', '.join(FORMATS)}), or a folder with train, validation (or dev) and "
            "test files. A tsv file without a header has the columns text and label."
        },
    )
    text_column: str | None = field(default=None, metadata={"help": "Default: the first column of strings."})
    label_column: str = field(default="label", metadata={"help": "Column with the classes."})
    max_length: int = field(default=128, metadata={"help": "Tokens that a text is cut to."})
    min_span: float = field(
        default=1.0, metadata={"help": "Train on random spans of each text, of at least this share of its words."}
    )
    mask_words: float = field(default=0.0, metadata={"help": "Share of the words of a training text that are masked."})


def load_texts(args: TextDataArguments) -> tuple[Dataset, Dataset]:
    """Load the train and the evaluation split, with columns `text` and `label` (ClassLabel).

    Raises:
        ValueError: If a file, a split or a column cannot be found.
    """
    splits = choose_splits(load_splits(args.dataset, args), args)
    text = _text_column(splits[0], args, "dataset")
    for split in splits:
        for argument, column in (("text_column", text), ("label_column", args.label_column)):
            if column not in split.column_names:
                raise ValueError(f"`{argument}` is {column!r}, but the data set has {', '.join(split.column_names)}.")
    names = {old: new for old, new in ((text, "text"), (args.label_column, "label")) if old != new}
    return labelled([split.select_columns([text, args.label_column]).rename_columns(names) for split in splits], args)


def load_test_texts(args: TextDataArguments) -> Dataset | None:
    """The texts whose classes are to be predicted, in a column `text`; `None` where none are named.

    Raises:
        ValueError: If a file, a split or the column cannot be found.
    """
    rows = load_test(args.dataset, args)
    if rows is None:
        return None
    text = _text_column(rows, args, "test_split" if args.test_file is None else "test_file")
    return rows.select_columns([text]).rename_columns({text: "text"} if text != "text" else {})


def load_unlabelled(args: TextDataArguments) -> Dataset | None:
    """The texts of `unlabelled_file`, with the column `text`; lines without a word are left out."""
    if args.unlabelled_file is None:
        return None
    rows = read_file(args.unlabelled_file, "unlabelled_file")
    column = _text_column(rows, args, "unlabelled_file")
    return Dataset.from_dict({"text": [text for text in rows[column] if text and text.strip()]})


def _text_column(rows: Dataset, args: TextDataArguments, argument: str) -> str:
    """`text_column`, or the first of strings that holds no classes."""
    strings = [name for name, feature in rows.features.items() if str(getattr(feature, "dtype", "")).endswith("string")]
    column = args.text_column or next((name for name in strings if name != args.label_column), None)
    if column not in rows.column_names:
        raise ValueError(
            f"`text_column` is {column!r}, but the rows of `{argument}` have {', '.join(rows.column_names)}."
        )
    return column


def augment(text: str, mask: str, args: TextDataArguments) -> str:
    """A random span of a text with some words masked, drawn from torch's global random state.

    Much as Tang et al. (2019, arXiv 1903.12136) make texts of a small data set that a teacher was not trained on.
    """
    words = text.split()
    length = round(len(words) * (1 - (1 - args.min_span) * torch.rand(()).item()))
    start = int(torch.randint(len(words) - length + 1, ()))
    drawn = torch.rand(length)
    return " ".join(
        mask if chance < args.mask_words else word
        for word, chance in zip(words[start : start + length], drawn.tolist(), strict=True)
    )
