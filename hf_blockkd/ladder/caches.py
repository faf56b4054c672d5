"""One cache for both models of a stepping stone: `fill`, `parts`, `counts_tokens`."""

from __future__ import annotations

import copy
from functools import partial

from transformers import DynamicCache, EncoderDecoderCache, PreTrainedConfig, StaticCache
from transformers.cache_utils import Cache, CacheLayerMixin, DummyLayer, DynamicLayer, StaticLayer

NUM_OF_BODY = "num_layers_of_body"
"""Attribute of a cache that `fill` has filled: how many of its layers belong to the first model."""


def fill(
    cache: Cache,
    body: PreTrainedConfig,
    tail: PreTrainedConfig,
    entry: int = 0,
    lengths: tuple[int | None, int | None] = (None, None),
) -> None:
    """Give an empty cache the layers of both models, each of its model's kinds and windows, in place.

    `generate` makes one for the layers of the tail alone, whose kinds and windows may be others than the body's.

    Args:
        cache: One that was filled already stays as it is.
        body: The config of the first model.
        tail: The config of the second.
        entry: How many layers of the second are skipped. They keep nothing: a model that asks its first layers how long
            a text is gets the answer of those that run.
        lengths: Tokens that a static cache holds, and those of an encoder; default: as many as its longest layer, of
            those that see everything.

    Raises:
        ValueError: If the cache is of a kind that is not known, or holds what another model has written.
    """
    if isinstance(cache, EncoderDecoderCache):
        _fill(cache.self_attention_cache, body, tail, entry, lengths[0])
        _fill(cache.cross_attention_cache, body, tail, 0, lengths[1], is_crossed=True)
    else:
        _fill(cache, body, tail, entry, lengths[0])


def parts(cache: Cache) -> tuple[Cache, Cache]:
    """The parts of a filled cache that belong to the first model and to the second, which it has in common with them.

    Args:
        cache: From `fill`.
    """
    if isinstance(cache, EncoderDecoderCache):
        both = map(parts, (cache.self_attention_cache, cache.cross_attention_cache))
        first, rest = (EncoderDecoderCache(*pair) for pair in zip(*both, strict=True))
        return first, rest
    first, rest = copy.copy(cache), copy.copy(cache)
    start = getattr(cache, NUM_OF_BODY)
    first.layers, rest.layers = cache.layers[:start], cache.layers[start:]
    for part in (first, rest):
        if not any(map(_has_length, part.layers)) and any(map(_has_length, cache.layers)):
            # Read before either model writes.
            past = cache.get_seq_length() + 0
            part.get_seq_length, part.get_mask_sizes = partial(_given, past), partial(_mask_sizes, past)
    return first, rest


def counts_tokens(body: PreTrainedConfig, tail: PreTrainedConfig, entry: int = 0) -> bool:
    """Whether a layer that runs knows how long a text is, which models with attention ask their caches.

    Args:
        body: The config of the first model.
        tail: The config of the second.
        entry: How many layers of the second are skipped.
    """
    layers = DynamicCache(config=body).layers + DynamicCache(config=tail).layers[entry:]
    configs = (one.get_text_config(decoder=True) for one in (body, tail))
    return any(map(_has_length, layers)) or not any(hasattr(one, "num_attention_heads") for one in configs)


def _fill(
    cache: Cache,
    body: PreTrainedConfig,
    tail: PreTrainedConfig,
    entry: int,
    length: int | None,
    is_crossed: bool = False,
) -> None:
    if hasattr(cache, NUM_OF_BODY):
        return
    is_static, is_written = type(cache) is StaticCache, any(map(_is_written, cache.layers))
    if is_static and length is None:
        seeing_all = (one for one, slides in zip(cache.layers, cache.is_sliding, strict=True) if not slides)
        length = max((getattr(one, "max_cache_len", 0) for one in seeing_all), default=0)
    if type(cache) not in (DynamicCache, StaticCache) or is_written or (is_static and not length):
        raise ValueError(
            f"`past_key_values` is a {type(cache).__name__} of {len(cache.layers)} layers "
            f"{'that hold what another model wrote' if is_written else 'of which those of two models cannot be made'}; "
            "pass an empty DynamicCache to a stepping stone, or none, or set `use_cache` to False."
        )
    options = {"max_cache_len": length} if is_static else {}
    records_past = any(map(cache.is_recording_past, range(len(cache.layers))))
    layers = [type(cache)(config=config, **options).layers for config in (body, tail)]
    if is_crossed:  # cross-attention looks at all that the encoder read
        full = StaticLayer if is_static else DynamicLayer
        layers = [[full(**options) for _ in one] for one in layers]
    layers[1][:entry] = (DummyLayer() if _has_length(layer) else layer for layer in layers[1][:entry])
    setattr(cache, NUM_OF_BODY, len(layers[0]))
    cache.layers, cache.layer_class_to_replicate = [*layers[0], *layers[1]], None
    if records_past:
        cache.activate_past_recording()


def _has_length(layer: object) -> bool:
    """Whether it counts tokens, unlike layers of linear attention and those that keep nothing."""
    return isinstance(layer, CacheLayerMixin)


def _is_written(layer: object) -> bool:
    states = getattr(layer, "has_previous_state", {})
    return getattr(layer, "keys", None) is not None or any(states.values())


def _given(past: int, layer_idx: int = 0) -> int:
    return past


def _mask_sizes(past: int, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
    return past + query_length, 0
