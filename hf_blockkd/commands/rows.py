"""Rows of a data set as a model takes them: all, `inputs_of`, or some to calibrate and to measure on, `rows_for`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, Image
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    ImageProcessingMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    default_data_collator,
)

from ..data.calibration import FEWEST_EXAMPLES, calibration_rows
from ..pairing.tasks import Task
from ..routing.dummy_inputs import dummy_inputs
from .tables import class_indices, image_column, text_columns

CHARACTERS = 8
"""Of a running text for each token of a window: about twice as many as a token of English has."""
LINES = 2000
"""That are in memory as tokens while they become windows."""


@dataclass(frozen=True)
class Inputs:
    """A data set as a model takes it.

    Attributes:
        rows: Its rows, encoded when they are read.
        collator: Makes a batch of them.
        columns: Which columns they were made of.
    """

    rows: Dataset
    collator: Callable[[list[Any]], dict[str, Any]]
    columns: list[str]


@dataclass(frozen=True)
class Rows:
    """Rows of a data set as a model takes them.

    Attributes:
        calibration: Those that a student is cut by.
        held_out: As many others, to measure it on.
        collator: Makes a batch of either.
        columns: Which columns they were made of.
    """

    calibration: Dataset
    held_out: Dataset
    collator: Callable[[list[Any]], dict[str, Any]]
    columns: list[str]


def rows_for(
    model: PreTrainedModel,
    processing: Any,
    table: Dataset,
    columns: list[str] | None = None,
    max_examples: int = 256,
    max_length: int = 128,
) -> Rows:
    """Draw rows of a data set, half of them to calibrate on and half to measure on, as `inputs_of` makes them.

    Args:
        model: As there, like all the others.
        processing: Its image processor or tokenizer, or a processor with one.
        table: The data set.
        columns: Its columns of images or of texts.
        max_examples: How many rows to calibrate on, and how many to hold out; fewer where there are fewer.
        max_length: In tokens.

    Raises:
        ValueError: As there, or if there are too few rows.
    """
    if max_examples < FEWEST_EXAMPLES:
        raise ValueError(f"`max_examples` is {max_examples}, but must be at least {FEWEST_EXAMPLES}.")
    inputs = inputs_of(model, processing, table, columns, max_length, num_rows=2 * max_examples)
    rows = inputs.rows
    if len(rows) < 2 * FEWEST_EXAMPLES:
        raise ValueError(
            f"Rows that the data set gives: {len(rows)}, but half of them are held out, and {FEWEST_EXAMPLES} must be "
            "left; give it more, or a language model longer texts or a smaller `--max_length`."
        )
    half = len(rows) // 2
    return Rows(rows.select(range(half)), rows.select(range(half, len(rows))), inputs.collator, inputs.columns)


def inputs_of(
    model: PreTrainedModel,
    processing: Any,
    table: Dataset,
    columns: list[str] | None = None,
    max_length: int = 128,
    num_rows: int | None = None,
) -> Inputs:
    """Let the model's own processing make its inputs of the rows of a data set.

    Images become RGB or grey, as the model has it. Texts are cut to `max_length` tokens; causal language models get
    windows of that length out of the running text. Labels are kept where each row has a class that the model knows, and
    tokens are masked for masked language models.

    Args:
        model: A model of images or of texts.
        processing: Its image processor or tokenizer, or a processor with one.
        table: The data set.
        columns: Its column of images or of texts, two for pairs of texts, or for a source and a target; default: found
            by type.
        max_length: In tokens; less where the model has fewer positions.
        num_rows: How many are drawn, or of a running text how many windows; default: all, in their order, of a running
            text one window after the other.

    Raises:
        ValueError: If the model takes something else, the processing is missing, or the columns are not clear.
    """
    if max_length < 2:
        raise ValueError(f"`max_length` is {max_length}, but must be at least 2.")
    # A tokenizer keeps the length that it was called with.
    processing = copy.deepcopy(processing)
    if model.main_input_name == "pixel_values" and not model.config.is_encoder_decoder:
        return _images(model, processing, table, columns, num_rows)
    if model.main_input_name == "input_ids" and not type(model).__name__.endswith("ForMultipleChoice"):
        return _texts(model, processing, table, columns, num_rows, max_length)
    raise ValueError(
        f"{type(model).__name__} takes more than an image or a text, of which rows are not made here; call "
        "`make_student` with `data` of your own, or leave `--dataset` out."
    )


def reads_running_text(model: PreTrainedModel) -> bool:
    """Whether rows are windows out of all texts, one after the other."""
    return model.main_input_name == "input_ids" and Task.of(model).shifted


def _images(
    model: PreTrainedModel, processing: Any, table: Dataset, columns: list[str] | None, num_rows: int | None
) -> Inputs:
    processor = getattr(processing, "image_processor", processing)
    if not isinstance(processor, ImageProcessingMixin):
        raise ValueError(
            f"There is no image processor (preprocessor_config.json) beside the teacher, {type(model).__name__}; save "
            "it into its folder with `save_pretrained`, e.g. a ViTImageProcessorPil."
        )
    column = image_column(table, columns)
    shape = dummy_inputs(model)["pixel_values"].shape
    mode = "L" if len(shape) == 4 and shape[1] == 1 else "RGB"
    chosen = _drawn(table, num_rows)
    rows = chosen.select_columns([column])
    try:
        rows = _with_labels(rows.cast_column(column, Image()), chosen, model)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise ValueError(f"`column` is {column!r}, which holds no images ({error}); name another one.") from error

    def encode(batch: dict[str, list]) -> dict[str, Any]:
        images = [image.convert(mode) for image in batch[column]]
        return {**processor(images, return_tensors="pt"), **_labels(batch)}

    return Inputs(rows.with_transform(encode), default_data_collator, [column])


def _texts(
    model: PreTrainedModel,
    processing: Any,
    table: Dataset,
    columns: list[str] | None,
    num_rows: int | None,
    max_length: int,
) -> Inputs:
    tokenizer, task = getattr(processing, "tokenizer", processing), Task.of(model)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(
            f"There is no tokenizer (tokenizer.json) beside the teacher, {type(model).__name__}; save it into its "
            "folder with `save_pretrained`."
        )
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or max_length
    options = {"truncation": True, "max_length": min(max_length, positions, tokenizer.model_max_length)}
    translates = task.over_vocabulary and model.config.is_encoder_decoder
    takes_pairs = translates or not task.over_vocabulary
    columns = text_columns(table, columns, most=2 if takes_pairs else 1)
    if task.shifted or tokenizer.pad_token is None:
        if num_rows is None:
            rows = _packed(table, columns[0], tokenizer, options["max_length"])
            rows = rows.add_column("labels", rows["input_ids"]) if task.shifted else rows
            return Inputs(rows, default_data_collator, columns)
        windows = _windows(table[columns[0]], tokenizer, num_rows, options)
        rows = {"input_ids": windows, "labels": windows} if task.shifted else {"input_ids": windows}
        return Inputs(_drawn(Dataset.from_dict(rows), num_rows), default_data_collator, columns)
    chosen = _drawn(table, num_rows)
    rows = chosen.select_columns(columns)
    rows = rows if task.over_vocabulary else _with_labels(rows, chosen, model)

    def encode(batch: dict[str, list]) -> dict[str, Any]:
        texts = [[text or "" for text in batch[column]] for column in columns]
        if translates:
            return dict(tokenizer(texts[0], text_target=texts[-1], **options))
        return {**tokenizer(*texts, **options), **_labels(batch)}

    collator: Callable = DataCollatorWithPadding(tokenizer)
    if translates:
        collator = DataCollatorForSeq2Seq(tokenizer)
    elif task.over_vocabulary and tokenizer.mask_token is not None:
        collator = DataCollatorForLanguageModeling(tokenizer)
    return Inputs(rows.with_transform(encode), collator, columns)


def _drawn(table: Dataset, num_rows: int | None) -> Dataset:
    return table if num_rows is None else calibration_rows(table, 0, num_rows)


def _packed(table: Dataset, column: str, tokenizer: PreTrainedTokenizerBase, length: int) -> Dataset:
    """Windows of one length without gaps; of every `LINES` texts, what is left over goes."""

    def pack(batch: dict[str, list]) -> dict[str, list]:
        lines = [(one or "").rstrip("\n") + "\n" for one in batch[column]]
        tokens = [token for row in tokenizer(lines, add_special_tokens=False)["input_ids"] for token in row]
        windows = [tokens[start : start + length] for start in range(0, len(tokens) - length + 1, length)]
        return {"input_ids": windows}

    return table.map(pack, batched=True, batch_size=LINES, remove_columns=table.column_names)


def _windows(
    texts: Any, tokenizer: PreTrainedTokenizerBase, num_windows: int, options: dict[str, Any]
) -> list[list[int]]:
    """Windows of one length, from places that lie evenly in the running text; each begins as the tokenizer has it."""

    def lines() -> Iterator[str]:
        return ((one or "").rstrip("\n") + "\n" for one in texts)

    # Read twice, so that a text of any length is never in memory as a whole.
    total, length = sum(map(len, lines())) - 1, CHARACTERS * options["max_length"]
    count = max(0, min(num_windows, total // length))
    starts, pieces = [i * total // count for i in range(count)], [""] * count
    place, current = 0, 0
    for line in lines():
        while current < count and starts[current] < place + len(line):
            start = starts[current] - place
            pieces[current] += line[max(start, 0) : start + length]
            if start + length > len(line):
                break
            current += 1
        place += len(line)
    windows = [tokenizer(piece, **options)["input_ids"] for piece in pieces]
    return [window for window in windows if len(window) == options["max_length"]]


def _with_labels(rows: Dataset, table: Dataset, model: PreTrainedModel) -> Dataset:
    """The rows with the classes that the table has for them, where the model knows these."""
    indices = None if Task.of(model).num_example_classes is None else class_indices(table, model.config)
    return rows if indices is None else rows.add_column("labels", indices)


def _labels(batch: dict[str, list]) -> dict[str, list]:
    return {"labels": batch["labels"]} if "labels" in batch else {}
