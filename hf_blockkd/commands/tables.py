"""A data set as a command line names it: `read_table`, and which of its columns mean what."""

from __future__ import annotations

import csv
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, Image, load_dataset
from datasets.exceptions import DatasetsError
from transformers import PreTrainedConfig

from ..losses.rows import IGNORED
from .options import FORMATS

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class")
"""What columns are called where their type does not tell."""
FIRST, REPEATS = 1000, 10
"""Rows that are looked at, and how often a string may stand there in the mean if its column is to hold texts."""


def read_table(name: str, split: str = "train", config: str | None = None) -> Dataset:
    """Read one split of a data set.

    Args:
        name: A hub name, a file of one of `FORMATS`, or a folder of those or of images. A .tsv file of two columns
            whose first line ends in a whole number has no header: its columns are `text` and `label`.
        split: Or a part of it, e.g. `train[:1000]`.
        config: Configuration of a hub data set.

    Raises:
        ValueError: If it cannot be read.
        OSError: If there is none.

    Example:
        ```python
        >>> import tempfile
        >>> from pathlib import Path
        >>> from hf_blockkd.commands.tables import read_table
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "some.tsv").write_text("it is good\\t1\\nit is bad\\t0\\n")
        ...     read_table(f"{folder}/some.tsv")[1]
        {'text': 'it is bad', 'label': 0}

        ```
    """
    return _load(name, split, config)


def read_splits(name: str, config: str | None = None) -> dict[str, Dataset]:
    """Read all splits of a data set; a file is one, `train`.

    Args:
        name: As in `read_table`.
        config: Likewise.

    Raises:
        ValueError: If it cannot be read.
        OSError: If there is none.
    """
    return dict(_load(name, None, config))


def _load(name: str, split: str | None, config: str | None) -> Any:
    path = Path(name).expanduser()
    if path.is_file() and path.suffix not in FORMATS:
        raise ValueError(f"`dataset` is {name!r}, but a file must end in {', '.join(FORMATS)}.")
    if not path.exists() and (path.suffix in FORMATS or name.startswith((".", "/", "~"))):
        raise OSError(f"`dataset` is {name!r}, but there is no such file or folder.")
    try:
        return _read(path, name, split, config)
    except (DatasetsError, ConnectionError, ValueError) as error:
        where = "" if path.exists() else "is no file or folder here, and "
        reason = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"`dataset` is {name!r}, which {where}cannot be read ({reason}); correct it.") from error


def _read(path: Path, name: str, split: str | None, config: str | None) -> Any:
    if path.is_file():
        return load_dataset(FORMATS[path.suffix], data_files=str(path), split=split, **_options(path))
    tables = sorted(path.glob("*.tsv")) if path.is_dir() else []
    if tables:
        return load_dataset("csv", data_dir=str(path), split=split, **_options(tables[0]))
    return load_dataset(str(path) if path.is_dir() else name, config, split=split)


def _options(path: Path) -> dict[str, Any]:
    if path.suffix != ".tsv":
        return {}
    with path.open(encoding="utf-8") as file:
        first = file.readline().rstrip("\n").split("\t")
    names = {"column_names": ["text", "label"]} if len(first) == 2 and first[1].isdecimal() else {}
    return {"delimiter": "\t", "quoting": csv.QUOTE_NONE, **names}


def image_column(table: Dataset, named: list[str] | None) -> str:
    """The column of images: that which is named, or the first of their type.

    Raises:
        ValueError: If there is none, or several are named.
    """
    found = [name for name, feature in table.features.items() if isinstance(feature, Image)]
    # Parquet files that were written without datasets hold images as {bytes, path}.
    found += [name for name in IMAGE_COLUMNS if name in table.column_names]
    return _named_or(table, named, found[:1], "images", most=1)[0]


def text_columns(table: Dataset, named: list[str] | None, most: int) -> list[str]:
    """The columns of texts: those that are named, the one called `text`, or those of strings that differ.

    Args:
        table: The data set.
        named: As the person gave them.
        most: How many the model takes.

    Raises:
        ValueError: If there are none, or more than the model takes.
    """
    found = [name for name in _string_columns(table) if name not in LABEL_COLUMNS]
    if not named and len(found) > 1:  # what says the same in many rows is a class, and may be the one to be found
        some = table[:FIRST]
        told = [name for name in found if REPEATS * len(set(some[name])) > len(some[name])]
        found = told or found
    return _named_or(table, named, ["text"] if "text" in found else found, "strings", most)


def _named_or(table: Dataset, named: list[str] | None, found: list[str], kind: str, most: int) -> list[str]:
    columns = named or found
    if not set(columns) <= set(table.column_names):
        raise ValueError(f"`column` is {' '.join(columns)}, but the data set has {', '.join(table.column_names)}.")
    if not 1 <= len(columns) <= most:
        where = "`column` names" if named else "The data set has"
        raise ValueError(
            f"{where} {len(columns) or 'no'} columns of {kind} ({', '.join(columns or table.column_names)}), but the "
            f"model takes {'1 or ' * (most > 1)}{most}; name the right ones with `--column`."
        )
    return columns


def class_indices(table: Dataset, config: PreTrainedConfig) -> list[int] | None:
    """The class of every row as an index into the outputs of a model with that config; `None` where none is told.

    They are in a column of classes, in one that is called so, or in one of strings that all are names of the model's
    classes. Names are compared in any case. Where one is unknown to a model that names its classes, the number behind
    it says nothing; models whose classes have no names but numbers take the numbers.
    """
    own = config.label2id or {}
    known = {name.lower(): index for name, index in own.items()} | own
    typed = [name for name, feature in table.features.items() if isinstance(feature, ClassLabel)]
    found = [*typed, *(name for name in LABEL_COLUMNS if name in table.column_names)]
    found = found or [name for name in _string_columns(table) if _are_among(table.unique(name), known)]
    if not found:
        return None
    values, feature = table[found[0]][:], table.features[found[0]]
    # The same classes may stand in another order.
    if isinstance(feature, ClassLabel) and not (_are_numbers(feature.names) or _are_numbers(own)):
        values = [feature.names[value] if value is not None and value >= 0 else None for value in values]
    indices = [
        known.get(value, known.get(value.lower(), value)) if isinstance(value, str) else value for value in values
    ]
    # Test splits without labels say -1, and tables nothing.
    indices = [IGNORED if index in (None, -1, "") else index for index in indices]
    fits = all(isinstance(index, int) and (index == IGNORED or 0 <= index < config.num_labels) for index in indices)
    return indices if fits else None


def _string_columns(table: Dataset) -> list[str]:
    kinds = {name: getattr(feature, "dtype", None) for name, feature in table.features.items()}
    return [name for name, kind in kinds.items() if kind in ("string", "large_string")]


def _are_among(values: list[str | None], names: Collection[str]) -> bool:
    told = [value for value in values if value]
    return bool(told) and all(value in names or value.lower() in names for value in told)


def _are_numbers(names: Iterable[str]) -> bool:
    return all(name.removeprefix("LABEL_").isdecimal() for name in names)
