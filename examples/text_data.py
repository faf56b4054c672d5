"""Text for the examples: where it comes from, and how it becomes tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from data_files import FORMATS, DataArguments, choose_splits, labelled, load_splits, load_test
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
    text = _text_column(splits[0], args)
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
    text = _text_column(rows, args)
    if text not in rows.column_names:
        raise ValueError(f"`text_column` is {text!r}, but the rows to predict have {', '.join(rows.column_names)}.")
    return rows.select_columns([text]).rename_columns({text: "text"} if text != "text" else {})


def _text_column(rows: Dataset, args: TextDataArguments) -> str | None:
    strings = [name for name, feature in rows.features.items() if str(getattr(feature, "dtype", "")).endswith("string")]
    return args.text_column or next((name for name in strings if name != args.label_column), None)


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
