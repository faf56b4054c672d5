"""Where the examples' data come from: files, folders of them, or the hub; and what is held out to evaluate on."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from classes import with_classes
from datasets import Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError

FORMATS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".txt": "text",
}
SPLITS = {"train": "train", "validation": "validation", "dev": "validation", "test": "test"}


@dataclass
class DataArguments:
    """Which rows to train and to evaluate on."""

    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub data set."})
    train_file: str | None = field(
        default=None, metadata={"help": f"File to train on in place of `dataset`: {', '.join(FORMATS)}."}
    )
    validation_file: str | None = field(default=None, metadata={"help": "File to evaluate on."})
    train_split: str = field(default="train", metadata={"help": "Name of the split to train on."})
    eval_split: str | None = field(
        default=None, metadata={"help": "Split to evaluate on; default: the first of validation, test and the others."}
    )
    eval_fraction: float = field(default=0.1, metadata={"help": "Share of the train split held out if there is none."})
    split_seed: int = field(default=0, metadata={"help": "Seed of that hold-out, and of what follows."})
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Rows to train on at most, drawn at random; default: all."}
    )
    test_file: str | None = field(
        default=None,
        metadata={"help": "File, or folder of images, whose classes every student predicts; it needs no labels."},
    )
    test_split: str | None = field(default=None, metadata={"help": "Split of the data set to predict instead."})
    unlabelled_file: str | None = field(
        default=None,
        metadata={"help": "File of rows without labels that students train on, too, from the teacher alone."},
    )
    label_share: float = field(
        default=1.0,
        metadata={"help": "Share of the training rows, drawn at random, whose labels students see."},
    )


def load_splits(dataset: str, args: Any) -> DatasetDict:
    """All splits of what the arguments name.

    Args:
        dataset: A file, a folder with train, validation (or dev) and test files or of images, or a hub name.
        args: With `dataset_config`, `train_file` and `validation_file`.

    Raises:
        ValueError: If there is no such file, or it has no rows.
    """
    path = Path(dataset).expanduser()
    if args.train_file is not None:
        splits = DatasetDict(train=read_file(args.train_file, "train_file"))
    elif path.is_dir():
        splits = _load_folder(path)
    elif path.is_file() or _is_path(dataset):
        splits = DatasetDict(train=read_file(dataset, "dataset"))
    else:
        try:
            splits = load_dataset(dataset, args.dataset_config)
        except (ConnectionError, FileNotFoundError) as error:
            raise ValueError(
                f"`dataset` is {dataset!r}, which is no file or folder here, and was not found on the hub "
                f"({type(error).__name__}); correct it."
            ) from error
    if args.validation_file is not None:
        splits["validation"] = read_file(args.validation_file, "validation_file")
    return splits


def _is_path(name: str) -> bool:
    """Whether a name cannot be one of the hub's, which are an owner and a name at most."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).suffix in FORMATS


def read_file(name: str, argument: str) -> Dataset:
    """The rows of a file.

    Args:
        name: Of the file; a tsv file without a header has the columns text and label.
        argument: What named it, for errors.

    Raises:
        ValueError: If there is no such file, its kind is unknown, or it has no rows.
    """
    path, options = Path(name).expanduser(), {}
    if path.is_dir():
        raise ValueError(f"`{argument}` is {name!r}, but that is a folder; give a file, or the folder as `dataset`.")
    if not path.is_file():
        raise ValueError(f"`{argument}` is {name!r}, but there is no such file; correct the path.")
    if path.suffix not in FORMATS:
        raise ValueError(f"`{argument}` is {name!r}, but must end in one of {', '.join(FORMATS)}.")
    if path.stat().st_size == 0:
        raise ValueError(f"`{argument}` is {name!r}, a file that is empty; give one with rows.")
    if path.suffix == ".txt":
        return Dataset.from_dict({"text": path.read_text(encoding="utf-8").splitlines()})
    if FORMATS[path.suffix] == "csv":
        # A text or a class that is called None or NA is one.
        options["keep_default_na"] = False
    if path.suffix == ".tsv":
        first_line = path.open(encoding="utf-8").readline().rstrip("\n").split("\t")
        options |= {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
        if "label" not in first_line:
            options["column_names"] = ["text", "label"]
    try:
        return load_dataset(FORMATS[path.suffix], data_files=str(path), split="train", **options)
    except (ValueError, DatasetGenerationError) as error:
        reason = error.__cause__ or error
        raise ValueError(f"`{argument}` is {name!r}, a file without a row that can be read: {reason}") from error


def _load_folder(folder: Path) -> DatasetDict:
    files = {
        SPLITS[path.stem]: path for path in sorted(folder.iterdir()) if path.stem in SPLITS and path.suffix in FORMATS
    }
    if not files:
        return load_dataset("imagefolder", data_dir=str(folder))
    return DatasetDict({split: read_file(str(path), "dataset") for split, path in files.items()})


def choose_splits(splits: DatasetDict, args: Any, order: Sequence[str] = ("validation", "test")) -> list[Dataset]:
    """The split to train on, and that to evaluate on, where there is one.

    Args:
        splits: From `load_splits`.
        args: With `train_split` and `eval_split`; a `validation_file` counts first.
        order: Names of splits to evaluate on, best first.

    Raises:
        ValueError: If a split that was named is not there.
    """
    others = [name for name in (*order, *splits) if name in splits and name != args.train_split]
    default = "validation" if args.validation_file is not None else next(iter(others), None)
    eval_split = args.eval_split or default
    for argument, name in (("train_split", args.train_split), ("eval_split", eval_split)):
        if name is not None and name not in splits:
            raise ValueError(f"`{argument}` is {name!r}, but the data set has {', '.join(splits)}.")
    return [splits[name] for name in (args.train_split, eval_split) if name is not None]


def load_test(dataset: str, args: DataArguments) -> Dataset | None:
    """The rows whose classes are to be predicted, as they are; `None` where none are named.

    Raises:
        ValueError: If there is no such file or split.
    """
    if args.test_file is not None:
        path = Path(args.test_file).expanduser()
        if path.is_dir():
            return load_dataset("imagefolder", data_dir=str(path), split="train", drop_labels=True)
        return read_file(args.test_file, "test_file")
    if args.test_split is None:
        return None
    splits = load_splits(dataset, args)
    if args.test_split not in splits:
        raise ValueError(f"`test_split` is {args.test_split!r}, but the data set has {', '.join(splits)}.")
    return splits[args.test_split]


def labelled(splits: list[Dataset], args: DataArguments) -> tuple[Dataset, Dataset]:
    """Rows to train and to evaluate on, with a column `label` of type ClassLabel.

    Args:
        splits: From `choose_splits`, with a column `label`; of one alone, a share of each class is held out.
        args: Which share, and how many rows stay.
    """
    train, *held_out = with_classes(*splits)
    if not held_out:
        train, *held_out = train.train_test_split(
            args.eval_fraction, seed=args.split_seed, stratify_by_column="label"
        ).values()
    if args.max_train_samples is not None and args.max_train_samples < len(train):
        train = train.shuffle(seed=args.split_seed).select(range(args.max_train_samples))
    return train, held_out[0]
