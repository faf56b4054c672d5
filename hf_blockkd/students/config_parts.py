"""Configs hold others: which part of one a stack of layers is built from, and which one a field belongs to."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from ..routing.layers import LayerStack

GROUP_FIELDS = ("num_key_value_heads", "num_kv_heads")
"""Names of the number of groups of queries, each of which shares its keys and values."""


def parts_of(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """A config and all the configs that it holds, from the outermost."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from parts_of(value)


def part_of_the_stack(teacher: PreTrainedModel, config: PreTrainedConfig, stack: LayerStack) -> PreTrainedConfig:
    """The part of `config`, a copy of the teacher's, that the innermost model around the layers is built from."""
    theirs = list(parts_of(teacher.config))
    path = next(name for name, module in teacher.named_modules() if module is stack.layers[0])
    while path:
        path = path.rpartition(".")[0]
        inner = getattr(teacher.get_submodule(path), "config", None)
        # A model inside another one often holds a copy of its part.
        alike = [i for i, part in enumerate(theirs) if type(part) is type(inner)]
        if alike:
            best = max(alike, key=lambda i: (theirs[i] is inner, theirs[i].to_dict() == inner.to_dict()))
            return list(parts_of(config))[best]
    return config


def _fields(part: PreTrainedConfig) -> set[str]:
    kind = type(part)
    settable = {name for name in dir(kind) if getattr(getattr(kind, name, None), "fset", None) is not None}
    return {name for name in vars(part) if not name.startswith("_")} | settable | set(part.attribute_map)


def owners_of(config: PreTrainedConfig, part: PreTrainedConfig, name: str) -> list[PreTrainedConfig]:
    """The parts on which a field is to be set."""
    if name == "torch_dtype":
        raise ValueError("`torch_dtype` is no field that a student's config sets; pass `dtype`.")
    parts = list(parts_of(config))
    owners = [one for one in parts if name in _fields(one)]
    # Heads and what joins the parts read the whole config.
    chief = [one for one in owners if one is part or one is config]
    if chief:
        return chief
    kinds = [type(one).__name__ for one in owners]
    if len(owners) > 1:
        raise ValueError(
            f"`{name}` is a field of {' and '.join(kinds)}, neither of which sets the layers that the student is made "
            "of; build the student from a config of your own."
        )
    if not owners:
        near = difflib.get_close_matches(name, sorted(set().union(*map(_fields, parts))), n=1)
        advice = f"did you mean `{near[0]}`?" if near else "print `teacher.config` for those that there are."
        of_parts = ", ".join(dict.fromkeys(type(one).__name__ for one in parts))
        raise ValueError(f"`{name}` is no field of {of_parts}; {advice}")
    return owners


def own_name(part: PreTrainedConfig, name: str) -> str:
    return part.attribute_map.get(name, name)


def same_in_all_layers(part: PreTrainedConfig, name: str) -> Any:
    """The value of a field; `None` where there is none, or it differs from layer to layer."""
    try:
        return getattr(part, name, None)
    except RuntimeError:
        return None


def width_and_head(part: PreTrainedConfig) -> tuple[int, int]:
    """Width of the layers, and how much of it is one head's: that is 1 where there are no heads.

    Raises:
        ValueError: If there is no one width.
    """
    width, heads = (same_in_all_layers(part, name) for name in ("hidden_size", "num_attention_heads"))
    if not isinstance(width, int) or isinstance(heads, (list, tuple)):
        raise ValueError(
            f"{type(part).__name__} has no one width, or no one number of heads, that `hidden_size` could set; give "
            "those of its stages by their own names, e.g. `hidden_sizes` or `embed_dim`."
        )
    # A config with `head_dim` of its own keeps it; else a head is its share of the width.
    return width, 1 if heads is None else width // heads
