"""Some examples to measure models on, and to fit maps to, before anything trains: rows and batches of them."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, Subset
from transformers import PreTrainedModel, default_data_collator
from transformers.utils import find_labels

from ..losses.rows import IGNORED
from ..pairing.decoder_inputs import decoder_ids, makes_decoder_ids
from ..routing.forwards import forward_parameters, in_dtype_of
from .seeding import random_states
from .streams import ReadAhead

NUM_EXAMPLES = 256
"""Training examples that connectors, and the weights of a narrower student, are fitted to."""
BATCH_SIZE = 8
"""Not the run's, so that what is fitted is alike however its batches are split."""
FEWEST_EXAMPLES = 8
"""With fewer, a measurement says more about them than about the model."""


def calibration_rows(dataset: Any, seed: int, num_examples: int = NUM_EXAMPLES, num_workers: int = 0) -> Any:
    """Some examples of a data set, the same ones on every rank; of a stream, the first ones.

    Args:
        dataset: A data set, a list of rows, or a stream.
        seed: Of the data of the run.
        num_examples: How many, or all where there are fewer.
        num_workers: Processes that read a stream in the run.

    Returns:
        A data set of its own, or what `ReadAhead` read of a stream, which goes on from there.

    Example:
        ```python
        >>> from hf_blockkd.data.calibration import calibration_rows
        >>> len(calibration_rows([{"labels": i} for i in range(20)], seed=0, num_examples=8))
        8

        ```
    """
    # These keys draw what rows do at random: with others, connectors of older runs would begin elsewhere.
    if is_stream(dataset):
        with random_states(f"connectors {seed}"):
            return ReadAhead(dataset, num_examples, num_workers)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = order[:num_examples]
    return dataset.select(chosen) if hasattr(dataset, "select") else Subset(dataset, chosen)


def calibration_batches(
    rows: Any, collate: Callable, seed: int, batch_size: int = BATCH_SIZE
) -> Iterator[dict[str, Any]]:
    """Batches of `calibration_rows`, with random transforms drawn from states of their own.

    Args:
        rows: A data set or a list.
        collate: Makes a batch of rows, without columns that no model takes.
        seed: Of the data of the run.
        batch_size: Rows in each.

    Example:
        ```python
        >>> from hf_blockkd.data.calibration import calibration_batches
        >>> [batch for batch in calibration_batches(list(range(12)), collate=sum, seed=0)]
        [28, 38]

        ```
    """
    # Without a generator of its own, a loader draws from the global one.
    batches = iter(DataLoader(rows, batch_size, collate_fn=collate, generator=torch.Generator()))
    for number in range(-(-len(rows) // batch_size)):
        with random_states(f"connectors {seed} {number}"):
            batch = next(batches)
        yield batch


def batches_for(
    model: PreTrainedModel,
    data: Any,
    data_collator: Callable[[list[Any]], Mapping[str, Any]] | None = None,
    seed: int = 0,
    num_examples: int = NUM_EXAMPLES,
    batch_size: int = BATCH_SIZE,
) -> Iterator[dict[str, Any]]:
    """Batches of some examples as keyword arguments of a model's forward, where no trainer prepares them.

    Columns that the forward does not take are left out of the rows, as `Trainer` does it, but not of the data set,
    whose own transform may read them. Rows of which it takes no column are left whole for the collator. Labels are not
    handed on, so that data needs none; only decoders that read them, a place later, still do.

    Args:
        model: The model that is to run; it does not run here.
        data: A `datasets.Dataset` (its transform is applied), a torch data set, a list of rows, or a stream of rows,
            which is read from its beginning.
        data_collator: Makes a batch of rows, as in `Trainer`; default: transformers' `default_data_collator`, for rows
            of equal shapes.
        seed: Draws the examples, and what rows or the collator do at random.
        num_examples: How many are drawn, or all where there are fewer.
        batch_size: Rows in a batch.

    Returns:
        An iterator over batches on the model's device, floating-point inputs in its dtype.

    Raises:
        ValueError: If `data` is no data set or has fewer than `FEWEST_EXAMPLES` rows; on the first batch, if the
            forward takes nothing of it, or the default collator cannot make it.

    Example:
        ```python
        >>> import torch
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from hf_blockkd.data.calibration import batches_for
        >>> model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=99))
        >>> rows = [{"text": "a b c", "input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 10
        >>> [{name: tuple(value.shape) for name, value in batch.items()} for batch in batches_for(model, rows)]
        [{'input_ids': (8, 3)}, {'input_ids': (2, 3)}]

        ```
    """
    rows = _some_rows(data, seed, num_examples)
    if len(rows) < FEWEST_EXAMPLES:
        raise ValueError(
            f"`data` has {len(rows)} examples, too few to measure the model on; give it at least {FEWEST_EXAMPLES}, "
            f"better {num_examples}, and check the split and any filter that it went through."
        )
    inputs = ModelInputs(model, data_collator)
    return map(inputs.of_batch, calibration_batches(rows, inputs.collate, seed, batch_size))


class Batches:
    """Batches that are made once, as far as they are read, and can be read again from the first.

    Args:
        batches: Makes them.

    Example:
        ```python
        >>> from hf_blockkd.data.calibration import Batches
        >>> batches = Batches(iter("abc"))
        >>> next(iter(batches)), list(batches), list(batches)
        ('a', ['a', 'b', 'c'], ['a', 'b', 'c'])

        ```
    """

    def __init__(self, batches: Iterator[Any]) -> None:
        self._made: list[Any] = []
        self._others = batches

    def __iter__(self) -> Iterator[Any]:
        for place in itertools.count():
            if place == len(self._made):
                self._made += itertools.islice(self._others, 1)
            if place == len(self._made):
                return
            yield self._made[place]


def held_out(data: Any, num_examples: int, num_held_out: int = NUM_EXAMPLES) -> tuple[Any, Any]:
    """Some examples to work with, and others that are held out: a quarter of them where there are few.

    Args:
        data: As in `batches_for`.
        num_examples: How many to work with.
        num_held_out: How many others.

    Raises:
        ValueError: If `data` is no data set, or has fewer than twice `FEWEST_EXAMPLES` rows.

    Example:
        ```python
        >>> from hf_blockkd.data.calibration import held_out
        >>> [sorted(part) for part in held_out(list(range(40)), num_examples=20, num_held_out=10)][1][:3]
        [7, 8, 10]
        >>> [len(part) for part in held_out(list(range(40)), num_examples=100)]
        [30, 10]

        ```
    """
    rows = _some_rows(data, 0, num_examples + num_held_out)
    if len(rows) < 2 * FEWEST_EXAMPLES:
        raise ValueError(
            f"`data` has {len(rows)} examples, too few to hold out some of them; give it at least "
            f"{2 * FEWEST_EXAMPLES}, better {num_examples + num_held_out}."
        )
    number = min(num_held_out, max(FEWEST_EXAMPLES, len(rows) // 4))
    return Subset(rows, range(len(rows) - number)), Subset(rows, range(len(rows) - number, len(rows)))


def _some_rows(data: Any, seed: int, num_examples: int) -> Any:
    is_rows = hasattr(data, "__getitem__") or isinstance(data, Iterable)
    if not is_rows or isinstance(data, (str, os.PathLike, Mapping, torch.Tensor, DataLoader)):
        raise ValueError(
            f"`data` is of type {type(data).__name__}, but must be a data set, one split of it, or a list of rows."
        )
    rows = calibration_rows(data, seed, num_examples)
    return rows.rows if isinstance(rows, ReadAhead) else rows


class ModelInputs:
    """What of rows and batches goes to one model: see `batches_for`.

    Args:
        model: The model.
        data_collator: As given by the person.
    """

    def __init__(self, model: PreTrainedModel, data_collator: Callable | None) -> None:
        self.model, self.data_collator = model, data_collator
        self.labels = {"label", "label_ids", *find_labels(type(model))}
        self.parameters = forward_parameters(model)
        self.names = self.parameters.keys() - self.labels
        self._makes_decoder_ids = makes_decoder_ids(model)

    def collate(self, rows: list[Any]) -> Mapping[str, Any]:
        """A batch of rows, of columns that the forward takes."""
        own = self.data_collator is None
        if isinstance(rows[0], Mapping):
            taken = self.names & rows[0].keys()
            if own:
                self._check("The rows of `data` have", taken, rows[0].keys())
            if taken:
                # Other collators may count on the labels that are there.
                kept = taken | self.labels if not own or self._makes_decoder_ids else taken
                # Where some rows have no label, collators would look for those of all; names make no tensor.
                kept -= {name for name in self.labels if any(isinstance(row.get(name), str | None) for row in rows)}
                rows = [{name: value for name, value in row.items() if name in kept} for row in rows]
        if not own:
            return self.data_collator(rows)
        try:
            return default_data_collator(rows)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"The default collator makes no batch of the rows of `data` ({' '.join(str(error).split())}); give a "
                "`data_collator` that pads them, e.g. DataCollatorWithPadding(tokenizer)."
            ) from error

    def of_batch(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """What of a batch the forward takes, without labels, on the model's device."""
        takes_more = any(parameter.kind is parameter.VAR_KEYWORD for parameter in self.parameters.values())
        inputs = {
            name: value
            for name, value in batch.items()
            if name in self.names or (takes_more and name not in self.labels)
        }
        labels = batch.get("labels")
        if self._makes_decoder_ids and labels is not None and "decoder_input_ids" not in inputs:
            inputs["decoder_input_ids"] = decoder_ids(self.model, labels)
            if "decoder_attention_mask" in self.names:
                # It changes no position that counts, and tells which ones do where the labels are gone.
                inputs.setdefault("decoder_attention_mask", (labels != IGNORED).long())
        self._check("`data_collator` makes batches of", self.names & inputs.keys(), batch.keys())
        # The weights of an offloaded model are nowhere; its hooks move what it gets.
        device = torch.device("cpu") if self.model.device.type == "meta" else self.model.device

        inputs = {
            name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()
        }
        return in_dtype_of(self.model, inputs)

    def _check(self, which: str, taken: Collection[str], names: Collection[str]) -> None:
        if not taken:
            raise ValueError(
                f"{which} {', '.join(names) or 'nothing'}, of which the forward of {type(self.model).__name__} takes "
                "nothing but labels; apply its tokenizer or image processor first."
            )


def is_stream(dataset: Any) -> bool:
    """Whether the rows of a data set have no indices."""
    return isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__")
