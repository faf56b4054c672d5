"""Text for the examples: where it comes from, and how it becomes tokens."""

from __future__ import annotations

import csv
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from classes import with_classes
from datasets import Dataset, DatasetDict, load_dataset

FORMATS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
SPLITS = {"train": "train", "validation": "validation", "dev": "validation", "test": "test"}


@dataclass
class TextDataArguments:
    """Which texts."""

    dataset: str = field(
        default="stanfordnlp/sst2",
        metadata={
            "help": "A hub data set, or a folder with train, validation (or dev) and test files: csv, tsv, json, "
            "jsonl or parquet. A tsv file without a header has the columns text and label."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub data set."})
    text_column: str | None = field(default=None, metadata={"help": "Default: the first column of strings."})
    label_column: str = field(default="label", metadata={"help": "Column with the classes."})
    eval_split: str = field(default="validation", metadata={"help": "Split to evaluate on."})
    max_length: int = field(default=128, metadata={"help": "Tokens that a text is cut to."})
    min_span: float = field(
        default=1.0, metadata={"help": "Train on random spans of each text, of at least this share of its words."}
    )
    mask_words: float = field(default=0.0, metadata={"help": "Share of the words of a training text that are masked."})


def load_texts(args: TextDataArguments) -> tuple[Dataset, Dataset]:
    """Load the train and the evaluation split, with columns `text` and `label` (ClassLabel).

    Raises:
        ValueError: If a split or a column cannot be found.
    """
    folder = Path(args.dataset).expanduser()
    splits = _load_folder(folder) if folder.is_dir() else load_dataset(args.dataset, args.dataset_config)
    for name in ("train", args.eval_split):
        if name not in splits:
            raise ValueError(f"The data set {args.dataset!r} has no split {name!r}, but {', '.join(splits)}.")
    train = splits["train"]
    strings = [
        name for name, feature in train.features.items() if str(getattr(feature, "dtype", "")).endswith("string")
    ]
    text = args.text_column or next(iter(strings), None)
    for argument, column in (("text_column", text), ("label_column", args.label_column)):
        if column not in train.column_names:
            raise ValueError(f"`{argument}` is {column!r}, but the data set has {', '.join(train.column_names)}.")
    prepared = splits.select_columns([text, args.label_column])
    names = {old: new for old, new in ((text, "text"), (args.label_column, "label")) if old != new}
    prepared = prepared.rename_columns(names) if names else prepared
    train, held_out = with_classes(prepared["train"], prepared[args.eval_split])
    return train, held_out


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


def _load_folder(folder: Path) -> DatasetDict:
    files = {
        SPLITS[path.stem]: path for path in sorted(folder.iterdir()) if path.stem in SPLITS and path.suffix in FORMATS
    }
    return DatasetDict({split: _load_file(path) for split, path in files.items()})


def _load_file(path: Path) -> Dataset:
    options: dict[str, Any] = {}
    if path.suffix == ".tsv":
        first_line = path.open(encoding="utf-8").readline().rstrip("\n").split("\t")
        options = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
        if "label" not in first_line:
            options["column_names"] = ["text", "label"]
    return load_dataset(FORMATS[path.suffix], data_files=str(path), split="train", **options)
