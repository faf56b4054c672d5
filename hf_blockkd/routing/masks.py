"""Attention masks that a model makes once for all forwards on the same inputs: `Masks`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from transformers import masking_utils

from .layers import LayerStack

REGISTRY = getattr(masking_utils, "ALL_MASK_ATTENTION_FUNCTIONS", {})
"""By whose functions transformers makes its masks; without it, every forward makes its own."""


class Masks:
    """The masks of one batch, which the first forward on it makes and all others get.

    A function of transformers that makes a mask looks whether anything is padded, which on a GPU waits for all work
    before it. So a stepping stone gets the mask that the clean pass has made: the same tensor, or none again.

    Args:
        stack: Layers of the model. What is asked for before the first of them is called depends on the inputs alone.

    Example:
        ```python
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaModel
        >>> from hf_blockkd import find_layer_stack
        >>> from hf_blockkd.routing.masks import Masks
        >>> config = LlamaConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
        >>> model = LlamaModel(config)
        >>> masks = Masks(find_layer_stack(model))
        >>> inputs = {"input_ids": torch.tensor([[1, 2, 3]]), "attention_mask": torch.tensor([[1, 1, 0]])}
        >>> for _ in range(2):
        ...     with masks.shared():
        ...         _ = model(**inputs)
        >>> len(masks.made)
        1

        ```
    """

    def __init__(self, stack: LayerStack) -> None:
        self.stack = stack
        self.made: list[tuple[list[Any], Any, int]] = []

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Share the masks of the model's forward, run once on the same inputs inside the context."""
        usual, calls, is_before = dict(REGISTRY), itertools.count(), True

        def reach_layers(*_: Any) -> None:
            nonlocal is_before
            is_before = False

        def ask(name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if not is_before:
                return function(*args, **kwargs)
            index, asked = next(calls), [name, *map(_plain, args), *map(_plain, kwargs.values())]
            if index < len(self.made):
                known, mask, version = self.made[index]
                # A model that has written into its mask makes another.
                return mask if (known, version) == (asked, _version(mask)) else function(*args, **kwargs)
            mask = function(*args, **kwargs)
            self.made.append((asked, mask, _version(mask)))
            return mask

        handle = self.stack.layers[0].register_forward_pre_hook(reach_layers)
        REGISTRY.update({name: partial(ask, name, function) for name, function in usual.items()})
        try:
            yield
        finally:
            handle.remove()
            for name, function in usual.items():
                del REGISTRY[name]
                if REGISTRY.get(name) is not function:  # it was somebody's own
                    REGISTRY[name] = function


def _plain(value: Any) -> Any:
    """What tells one call from another: numbers and names, and of all else the kind, for the inputs are the same."""
    if isinstance(value, torch.Tensor):
        return value.shape
    is_plain = isinstance(value, (bool, int, float, str, torch.dtype, torch.device))
    return value if is_plain else getattr(value, "__qualname__", type(value))


def _version(mask: Any) -> int:
    is_counted = isinstance(mask, torch.Tensor) and not mask.is_inference()
    return mask._version if is_counted else 0
