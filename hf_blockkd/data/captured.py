"""What a server wrote of a teacher's likeliest tokens, read from columns of the training set: `CapturedCollator`.

Three forms are read, all of log probabilities at temperature 1:

- one column as vLLM's `prompt_logprobs`, in a request or in `LLM.generate`: for each position `None` or a mapping of
  token id -> `{"logprob": ..., "rank": ...}` (https://docs.vllm.ai, `vllm.logprobs.PromptLogprobs`), or the JSON of it;
- two columns of token ids and log probabilities, lists of lists, as TRL's `VLLMClient.get_sequence_logprobs` returns
  them (`logprob_token_ids`, `logprobs`);
- the same as DistillKit's uncompressed `token_ids` and `top_values`. What DistillKit compressed is decompressed by its
  own `LogprobCompressor.decompress_to_sparse`, with the configuration that it was captured with.

Of a text of T tokens there may be T entries, the first one empty (vLLM: each is about its own token) or not (as logits
stand: each is about the next token, and the last about none); T - 1 for all tokens but the first (DistillKit); or one
for each labelled token (TRL).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..config import BlockwiseDistillConfig
from ..losses.rows import IGNORED, RowLosses
from ..losses.top_k import CAPTURED_IDS, CAPTURED_LOG_PROBS, TopK
from ..pairing.pair import Pair

FINGERPRINT = "tokenizer_fingerprint"
"""Column that says which tokenizer the token ids are of, if there is one: see `tokenizer_fingerprint`."""
MOST_MASS = 1.01
"""Sum of the probabilities of a position that rounding to bfloat16 may still give."""
LEAST_REST = 2.0**-24
"""What is left to all other tokens where rounding leaves nothing: no divergence is infinite because of that."""
ROWS_TO_CHECK = 256
"""Rows that are read before anything is trained; the others are when their batches are made."""

Entry = tuple[Sequence[int], Sequence[float]]
"""The token ids of a position and their log probabilities; without any where nothing is known of it."""


class CapturedCollator:
    """A data collator that also hands on what was captured of the teacher, where the rows have it.

    Args:
        collator: Makes the batch of all other columns; texts are padded on either side.
        columns: The one or two columns, as in `captured_columns`.
        num_classes: Number of tokens that student and teacher have in common.

    Raises:
        ValueError: When called, for rows that cannot be read or do not fit their texts.

    Example:
        ```python
        >>> from transformers import default_data_collator
        >>> from hf_blockkd.data.captured import CapturedCollator
        >>> collate = CapturedCollator(default_data_collator, ["token_ids", "top_values"], num_classes=9)
        >>> batch = collate([{"input_ids": [5, 6], "token_ids": [[7, 3]], "top_values": [[-0.1, -2.5]]}])
        >>> batch["captured_ids"].tolist(), [round(p, 2) for p in batch["captured_log_probs"][0, 1].tolist()]
        ([[[-1, -1], [7, 3]]], [-0.1, -2.5, -4.34])

        ```
    """

    def __init__(
        self, collator: Callable[[list[Any]], Mapping[str, Any]], columns: Sequence[str], num_classes: int
    ) -> None:
        self.collator, self.columns, self.num_classes = collator, list(columns), num_classes

    def __call__(self, examples: list[Any]) -> dict[str, Any]:
        own = {*self.columns, FINGERPRINT}
        batch = dict(self.collator([{k: v for k, v in row.items() if k not in own} for row in examples]))
        if any(name not in row for row in examples for name in self.columns):
            return batch
        places, entries = [], []
        for index, row in enumerate(examples):
            found = read_entries([row[name] for name in self.columns])
            check_entries(found, self.num_classes, f"Example {index} of a batch")
            for place, entry in zip(_places(batch, index, found), found, strict=True):
                if place is not None and len(entry[0]):
                    places.append((index, place))
                    entries.append(entry)
        ids, log_probs = _tensors(batch["input_ids"].shape, places, entries, self.num_classes)
        return {**batch, CAPTURED_IDS: ids, CAPTURED_LOG_PROBS: log_probs}


def read_entries(values: Sequence[Any]) -> list[Entry]:
    """The entries of a text, of whichever form.

    Args:
        values: What its row holds in the one or two columns.

    Example:
        ```python
        >>> from hf_blockkd.data.captured import read_entries
        >>> read_entries([[None, {"7": {"logprob": -0.1, "rank": 1}, "3": {"logprob": -2.5, "rank": 2}}]])
        [((), ()), ((7, 3), (-0.1, -2.5))]
        >>> read_entries([[[7, 3]], [[-0.1, -2.5]]])
        [((7, 3), (-0.1, -2.5))]

        ```
    """
    if len(values) == 2:
        if len(values[0]) != len(values[1]):
            raise ValueError(
                f"A text has token ids of {len(values[0])} positions, but log probabilities of {len(values[1])}, in "
                "what was captured; write as many of both."
            )
        return [_entry(_numbers(ids), _numbers(log_probs)) for ids, log_probs in zip(*values, strict=True)]
    positions = json.loads(values[0]) if isinstance(values[0], str) else values[0]
    entries: list[Entry] = []
    for position in positions:
        # Of a table, whose mappings all have the same keys, those of other positions are None.
        known = {int(token): _log_prob(one) for token, one in (position or {}).items() if one is not None}
        entries.append(_entry(list(known), list(known.values())))
    return entries


def _numbers(values: Any) -> list[Any]:
    """Of a position: a list, an array, a tensor, or nothing."""
    return [] if values is None else values.tolist() if hasattr(values, "tolist") else list(values)


def _entry(ids: list[int], log_probs: list[float]) -> Entry:
    """Without tokens of no probability, such as those that fill up a table."""
    if len(ids) != len(log_probs):
        raise ValueError(
            f"A position has {len(ids)} token ids, but {len(log_probs)} log probabilities, in what was captured; write "
            "as many of both."
        )
    known = [(token, log_prob) for token, log_prob in zip(ids, log_probs, strict=True) if log_prob != -math.inf]
    return tuple(token for token, _ in known), tuple(log_prob for _, log_prob in known)


def _log_prob(value: Any) -> float:
    """Of JSON, of vLLM's own class, or a number."""
    return value["logprob"] if isinstance(value, Mapping) else getattr(value, "logprob", value)


def check_entries(entries: Sequence[Entry], num_classes: int, name: str) -> None:
    """Raise a `ValueError` for what cannot be the likeliest tokens of a position.

    Args:
        entries: Of a text.
        num_classes: Number of tokens that there are.
        name: Of the row, for the message.
    """
    for position, (ids, log_probs) in enumerate(entries):
        wrong = [token for token in ids if not 0 <= token < num_classes]
        if wrong:
            raise ValueError(
                f"{name} holds the token id {wrong[0]} at position {position} of what was captured, but student and "
                f"teacher have {num_classes} tokens in common; capture a teacher with the student's tokenizer."
            )
        mass = math.fsum(math.exp(min(one, 100.0)) for one in log_probs)
        if not mass <= MOST_MASS:  # nor is it a number
            raise ValueError(
                f"{name} has probabilities that sum to {mass:.4g} at position {position} of what was captured; write "
                "log probabilities (natural logarithm, temperature 1, each token once), not logits."
            )


def _places(batch: Mapping[str, Any], index: int, entries: Sequence[Entry]) -> list[int | None]:
    """Where in its row of the batch each entry stands, by the token that it is about; `None` where it is about none."""
    shape = batch["input_ids"].shape
    mask, labels = batch.get("attention_mask"), batch.get("labels")
    tokens = (torch.ones(shape[1]) if mask is None else mask[index]).nonzero().flatten().tolist()
    labelled = [] if labels is None else [place for place in tokens[1:] if labels[index, place] != IGNORED]
    if len(entries) == len(tokens):
        return tokens if not entries or not entries[0][0] else [*tokens[1:], None]
    if len(entries) == len(tokens) - 1:
        return list(tokens[1:])
    if len(entries) == len(labelled):
        return list(labelled)
    raise ValueError(
        f"Example {index} of a batch has {len(tokens)} tokens, {len(labelled)} of them with labels, but {len(entries)} "
        "positions were captured; capture the very texts that are trained on, and do not cut or pack them afterwards."
    )


def _tensors(
    shape: Sequence[int], places: Sequence[tuple[int, int]], entries: Sequence[Entry], num_classes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a batch: (B, T, k) ids, -1 where there are fewer, and (B, T, k + 1) log probabilities, the last the rest's."""
    width = max((len(ids) for ids, _ in entries), default=1)
    all_ids = torch.full((*shape, width), -1, dtype=torch.long)
    all_log_probs = torch.full((*shape, width + 1), -math.inf)
    all_log_probs[..., -1] = 0.0
    if not entries:
        return all_ids, all_log_probs
    rows, columns = torch.tensor(places).T
    padded = [
        torch.tensor(list(itertools.zip_longest(*part, fillvalue=fill))).T
        for part, fill in (([ids for ids, _ in entries], -1), ([log_probs for _, log_probs in entries], -math.inf))
    ]
    ids, log_probs = padded[0], padded[1].double()
    rest = (1 - log_probs.exp().sum(-1, keepdim=True)).clamp(min=LEAST_REST).log()
    rest = rest.masked_fill((ids >= 0).sum(-1, keepdim=True) == num_classes, -math.inf)  # of which nothing is left
    all_ids[rows, columns] = ids
    all_log_probs[rows, columns] = torch.cat([log_probs, rest], dim=-1).float()
    return all_ids, all_log_probs


def captured_rows(inputs: Mapping[str, Any], losses: RowLosses, num_classes: int) -> TopK:
    """What was captured of the rows that count, as the teacher's rows of a step.

    Args:
        inputs: A batch of a `CapturedCollator`.
        losses: Of that batch.
        num_classes: As there.

    Raises:
        ValueError: If nothing was captured of some of them.
    """
    # As labels of causal language models: what is about token t stands with the logits of the position before.
    if CAPTURED_IDS not in inputs:
        raise ValueError(
            "The batch holds nothing that was captured of the teacher; give every row the columns of "
            "`captured_columns`, and set `remove_unused_columns=False` if a transform makes them."
        )
    ids, log_probs = (losses.rows(inputs[name][:, 1:]) for name in (CAPTURED_IDS, CAPTURED_LOG_PROBS))
    missing = losses.examples(ids[:, 0] < 0)
    if missing:
        raise ValueError(
            f"Nothing was captured of some tokens of examples {missing} of a batch, which are to be distilled; capture "
            "every position, or set the labels of the others to -100."
        )
    return TopK(log_probs, ids, num_classes)


def check_captured(
    args: BlockwiseDistillConfig,
    pair: Pair,
    dataset: Any,
    processing_class: Any = None,
    needs_teacher: bool = True,
    needs_states: bool = False,
    is_absent: bool = False,
) -> None:
    """Raise a `ValueError` if `captured_columns` is set and cannot be used in this run.

    Args:
        args: The configuration.
        pair: The models.
        dataset: The training set, of which the first rows are read where it has a length.
        processing_class: The tokenizer, or a processor that has one.
        needs_teacher: Whether the objective asks for the teacher's logits.
        needs_states: Whether it reads the teacher's hidden states.
        is_absent: Whether the teacher is not at hand, so that nothing may run it.
    """
    if args.captured_columns is None:
        return
    begin = f"`captured_columns` is {args.captured_columns!r}, but"
    if not (pair.task.shifted and pair.task.over_vocabulary):
        raise ValueError(f"{begin} {pair.task.name} is no causal language model; set it to None.")
    reasons = {
        f"`objective={args.objective!r}`": (not needs_teacher, "asks for no logits of the teacher"),
        f"the states that `objective={args.objective!r}` asks for": (needs_states, "were not captured"),
        f"`divergence={args.divergence!r}`": (args.divergence == "dkd", "needs all tokens, not the likeliest"),
        "`standardize_logits=True`": (args.standardize_logits, "needs all tokens, not the likeliest"),
        f"`temperature={args.temperature}`": (args.temperature != 1, "is not the 1.0 at which servers answer"),
        f"`teacher_cache={args.teacher_cache!r}`": (args.teacher_cache is not None, "keeps the teacher's outputs, too"),
        f"`lmbda={args.lmbda}`": (args.lmbda > 0, "needs the teacher's word on texts that are yet to come"),
    }
    for setting, (is_set, reason) in reasons.items():
        if is_set:
            raise ValueError(f"{begin} {setting} {reason}; change one of them.")
    if is_absent and (pair.trained_stones or args.eval_stepping_stones):
        raise ValueError(
            "`teacher_model` is None, which `captured_columns` allows, but stepping stones run through the teacher's "
            "layers; pass a teacher, or set `stepping_stones` to 'none' and `eval_stepping_stones` to False."
        )
    if dataset is None or not hasattr(dataset, "__len__"):
        return
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    own = None if tokenizer is None else tokenizer_fingerprint(tokenizer)
    for index in range(min(len(dataset), ROWS_TO_CHECK)):
        row = dataset[index]
        missing = [name for name in args.captured_columns if name not in row]
        if missing:
            raise ValueError(f"{begin} row {index} of the training set has no {missing[0]!r}, only {', '.join(row)}.")
        if own is not None and row.get(FINGERPRINT, own) != own:
            raise ValueError(
                f"Row {index} of the training set was captured with a tokenizer of fingerprint {row[FINGERPRINT]!r}, "
                f"but that of this run has {own!r}; its token ids stand for other words, so capture the teacher anew."
            )
        try:
            entries = read_entries([row[name] for name in args.captured_columns])
        except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{begin} row {index} of the training set cannot be read there ({error}); name one column of vLLM's "
                "`prompt_logprobs`, or one of token ids and one of log probabilities."
            ) from error
        check_entries(entries, pair.common_classes, f"Row {index} of the training set")


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A hash of a tokenizer's vocabulary, added tokens included, to be written beside what is captured with it.

    Args:
        tokenizer: Of transformers.

    Returns:
        16 hexadecimal digits.

    Example:
        ```python
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import PreTrainedTokenizerFast
        >>> from hf_blockkd.data.captured import tokenizer_fingerprint
        >>> words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
        >>> len(tokenizer_fingerprint(PreTrainedTokenizerFast(tokenizer_object=words)))
        16

        ```
    """
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.blake2b(vocabulary.encode(), digest_size=8).hexdigest()
