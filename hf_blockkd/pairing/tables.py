"""Whether every index in a batch has a row in the tables that a model looks it up in: `IndexTables`."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from ..routing.dummy_inputs import dummy_inputs
from ..routing.forwards import forward_parameters, in_eval_mode
from ..routing.layers import LayerStack

LENGTH_FIELDS = ("max_position_embeddings", "max_target_positions", "max_decoder_position_embeddings")
"""What bounds the length of a text where no table of positions was seen, e.g. with rotary ones."""
TEXTS = ("input_ids", "decoder_input_ids")


@dataclass(frozen=True)
class Table:
    """A table of embeddings, and which of its rows a column asks for.

    Attributes:
        name: Dotted name of its weight in the model.
        rows: Number of rows.
        offset: What the model adds to an index of the column; for a text without positions of its own, the row of its
            first token.
    """

    name: str
    rows: int
    offset: int = 0


class IndexTables:
    """The tables of embeddings that a model looks indices up in, found by watching it do so on made-up inputs.

    Args:
        model: The model.
        stack: Its layers; what is looked up has been by the time that the first of them is called.

    Attributes:
        columns: Column of indices -> the smallest table that is indexed with it.
        lengths: Column of texts -> the smallest table that is indexed with the positions of its tokens.

    Example:
        ```python
        >>> import torch
        >>> from transformers import RobertaConfig, RobertaForMaskedLM
        >>> from hf_blockkd import find_layer_stack
        >>> from hf_blockkd.pairing.tables import IndexTables
        >>> shape = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
        >>> model = RobertaForMaskedLM(RobertaConfig(vocab_size=99, max_position_embeddings=34, **shape))
        >>> tables = IndexTables(model, find_layer_stack(model))
        >>> tables.longest("input_ids")
        32
        >>> tables.check({"input_ids": torch.tensor([[3, 99]])}, "student")
        Traceback (most recent call last):
        ...
        ValueError: `input_ids` holds 99, but 'roberta.embeddings.word_embeddings.weight' of the student \
RobertaForMaskedLM has 99 rows, 0 to 98; give both models the same tokens (`resize_token_embeddings`), or correct the \
data.

        ```
    """

    def __init__(self, model: PreTrainedModel, stack: LayerStack) -> None:
        self.model, self.stack = model, stack
        self.columns: dict[str, Table] = {}
        self.lengths: dict[str, Table] = {}
        self._parameters = forward_parameters(model)
        try:
            self._look()
        except Exception:
            # What cannot be watched, such as a model whose weights are elsewhere, is not foretold.
            self.columns, self.lengths = {}, {}

    def longest(self, column: str) -> int | None:
        """Tokens that a text may have without positions of its own, `None` if any number."""
        table = self.lengths.get(column)
        if table is not None:
            return table.rows - table.offset
        part = self.model.get_decoder() if column.startswith("decoder_") else self.model
        config = part.config.get_text_config()
        # XLNet's is -1.
        return next((limit for name in LENGTH_FIELDS if (limit := getattr(config, name, None) or 0) > 0), None)

    def check(self, inputs: Mapping[str, Any], role: str) -> None:
        """Raise a `ValueError` if an index of a batch has no row, or a text is too long.

        Args:
            inputs: The batch; the ids of padding count, since they are looked up like all others.
            role: `"student"` or `"teacher"`, for the message.
        """
        owner = f"the {role} {type(self.model).__name__}"
        for column in TEXTS:
            self._check_length(column, inputs, owner)
        columns = {name: inputs[name] for name in self.columns if _is_index(inputs.get(name))}
        if not columns:
            return
        # One transfer from the device for all of them.
        ends = torch.stack([torch.stack([*column.aminmax()]) for column in columns.values()]).tolist()
        for name, (lowest, highest) in zip(columns, ends, strict=True):
            table = self.columns[name]
            first, last = -table.offset, table.rows - table.offset - 1
            if lowest < first or highest > last:
                cure = "give both models the same tokens (`resize_token_embeddings`), or correct the data"
                raise ValueError(
                    f"`{name}` holds {lowest if lowest < first else highest}, but {table.name!r} of {owner} has "
                    f"{table.rows} rows, {first} to {last}; {cure if name in TEXTS else 'correct the data'}."
                )

    def _check_length(self, column: str, inputs: Mapping[str, Any], owner: str) -> None:
        text, positions = inputs.get(column), column.replace("input", "position")
        has_positions = inputs.get(positions) is not None and positions in self._parameters
        if has_positions or not _is_index(text) or text.ndim < 2:
            return
        limit, table = self.longest(column), self.lengths.get(column)
        if limit is not None and text.shape[-1] > limit:
            where = f"`max_position_embeddings` of {owner} is {limit}"
            if table is not None:
                less = f", of which a text begins at {table.offset}" if table.offset else ""
                where = f"{table.name!r} of {owner} has {table.rows} positions{less}"
            raise ValueError(
                f"A batch has sequences of {text.shape[-1]} tokens in `{column}`"
                f"{' (made of the labels where there is none)' if column.startswith('decoder_') else ''}, but {where}; "
                f"cut them to {limit}."
            )

    # ---- How the tables are found ----

    def _look(self) -> None:
        inputs = dummy_inputs(self.model, batch_size=1)
        if "decoder_input_ids" in inputs:
            # Of another length, so that it shows which of the two texts is counted.
            inputs["decoder_input_ids"] = inputs["decoder_input_ids"][..., :-1]
        texts = {name: inputs[name] for name in TEXTS if name in inputs}
        if not texts:
            return
        for table, indices in self._lookups(inputs):
            column = next((name for name, text in texts.items() if _counts(indices, text)), None)
            if column is not None:
                counted = replace(table, offset=int(indices.min()))
                self.lengths[column] = min(self.lengths.get(column, counted), counted, key=_room)
        patterns = self._patterns(texts)
        candidates: dict[str, list[Table]] = {name: [] for name in patterns}
        for table, indices in self._all_lookups(inputs, patterns):
            for name, pattern in patterns.items():
                offsets = indices.flatten() - pattern.flatten() if indices.numel() == pattern.numel() else pattern
                if len(offsets.unique()) == 1:
                    candidates[name].append(replace(table, offset=int(offsets[0])))
        while candidates:
            # Some models see to it themselves that nothing is looked up beyond a table.
            candidates = {name: sorted(tables, key=_room) for name, tables in candidates.items() if tables}
            smallest = {name: tables.pop(0) for name, tables in candidates.items()}
            beyond = {name: patterns[name] + _room(table) for name, table in smallest.items()}
            seen = {table.name for table, indices in self._all_lookups(inputs, beyond) if indices.max() >= table.rows}
            found = {name: table for name, table in smallest.items() if table.name in seen}
            self.columns |= found
            candidates = {name: tables for name, tables in candidates.items() if name not in found}

    def _patterns(self, texts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """For every column of indices that the model takes, some in an order that no model makes by itself."""
        generator = torch.Generator().manual_seed(0)
        patterns = {}
        for name in self._parameters:
            text = texts.get("decoder_input_ids" if name.startswith("decoder_") else "input_ids")
            if name.endswith("_ids") and text is not None:
                order = torch.randperm(text.shape[-1], generator=generator).to(text)
                patterns[name] = order.expand_as(text).contiguous()
        return patterns

    def _all_lookups(
        self, inputs: Mapping[str, torch.Tensor], columns: Mapping[str, torch.Tensor]
    ) -> list[tuple[Table, torch.Tensor]]:
        """`_lookups` with all of some columns, or with each of them where they cannot be had at once."""
        with contextlib.suppress(Exception):
            return self._lookups({**inputs, **columns})
        lookups = []
        for name, column in columns.items():
            with contextlib.suppress(Exception):
                lookups += self._lookups({**inputs, name: column})
        return lookups

    def _lookups(self, inputs: Mapping[str, torch.Tensor]) -> list[tuple[Table, torch.Tensor]]:
        """The tables that a forward reads before its first layer, with the indices that it looks up."""
        weights = {id(parameter): name for name, parameter in self.model.named_parameters()}
        watch = _Watch(weights)
        handle = self.stack.layers[0].register_forward_pre_hook(_stop)
        try:
            with in_eval_mode(self.model), torch.no_grad(), watch, contextlib.suppress(_Reached):
                self.model(**inputs)
        finally:
            handle.remove()
        return watch.found


class _Reached(Exception):  # noqa: N818 - no error, but the end of what there is to see
    """The first layer is about to run."""


def _stop(*_: Any) -> None:
    raise _Reached


class _Watch(TorchDispatchMode):
    """Notes what is looked up in the weights of a model, and lets no index go beyond their rows."""

    def __init__(self, weights: Mapping[int, str]) -> None:
        super().__init__()
        self.weights = weights
        self.found: list[tuple[Table, torch.Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.embedding.default:
            weight, indices, *rest = args
            name = self.weights.get(id(weight))
            if name is not None:
                self.found.append((Table(name, len(weight)), indices.clone()))
            args = (weight, indices.clamp(0, len(weight) - 1), *rest)
        return func(*args, **(kwargs or {}))


def _room(table: Table) -> int:
    return table.rows - table.offset


def _is_index(column: Any) -> bool:
    return isinstance(column, torch.Tensor) and column.numel() > 0 and not column.is_floating_point()


def _counts(indices: torch.Tensor, text: torch.Tensor) -> bool:
    """Whether indices count the tokens of a text one by one."""
    return indices.shape[-1:] == text.shape[-1:] and indices.diff(dim=-1).eq(1).all().item()
