"""Tiny random models of any family, from nothing but the default config of its class.

A default config is shrunk by what its fields mean, which their names tell: widths, depths, heads, vocabularies,
experts, images and windows become small, nested configs likewise, and lists with an entry for each layer keep every
kind of layer. There is no list of families: one that nobody has seen is shrunk by the same rules.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import re
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from hf_blockkd.routing.dummy_inputs import dummy_inputs
from hf_blockkd.routing.logits import only_logits

TASKS = {
    "IMAGE_CLASSIFICATION": transformers.AutoModelForImageClassification,
    "SEQUENCE_CLASSIFICATION": transformers.AutoModelForSequenceClassification,
    "TOKEN_CLASSIFICATION": transformers.AutoModelForTokenClassification,
    "CAUSAL_LM": transformers.AutoModelForCausalLM,
    "MASKED_LM": transformers.AutoModelForMaskedLM,
    "SEQ_TO_SEQ_CAUSAL_LM": transformers.AutoModelForSeq2SeqLM,
}
"""Auto-model mappings, and their classes."""

LAYERS = 4
HEADS = 4
WIDTH = 96
"""Of `HEADS` heads; also in six equal parts, as embeddings of boxes have them."""
EXPERTS = 4
VOCABULARY = 128
POSITIONS = 64
WINDOW = 4
"""Shorter than the eight tokens of a dummy input, or windows would change nothing."""
IMAGE = 64
PATCH = 16
MOST_PARAMETERS = 300_000_000
"""Of models whose widths are kept."""

Rule = Callable[[int], int]


def _at_most(limit: int) -> Rule:
    return lambda value: min(value, limit)


def _same(value: int) -> int:
    return value


def _power_of_two(value: int) -> int:
    """The largest power of two up to `HEADS` and the value: it divides every width."""
    return 1 << (min(value, HEADS).bit_length() - 1) if value > 0 else value


def _token(value: int) -> int:
    """Ids beyond the vocabulary move to its last quarter, different ones to different places mostly."""
    return value if value < VOCABULARY else VOCABULARY - 1 - value % (VOCABULARY // 4)


def _layer(value: int) -> int:
    """A number of layers or the index of one, counted from either end."""
    return max(-LAYERS // 2, min(value, LAYERS // 2))


DEPTH = r"(^|_)(num_hidden_layers|n_layers?|num_layers|(encoder|decoder)_layers|num_(encoder|decoder)_layers|depth)$"
"""Fields that hold the depth of a stack."""

COUNTS: tuple[tuple[str, Rule], ...] = (
    # Sizes that small models have, too, and names that only look like sizes.
    (r"kernel|stride|ratio|factor|multiplier|theta|temperature|rate$|seed|type_vocab|buckets|bins$|base$", _same),
    (r"token_(id|index)$|_token$|token_ids$", _token),
    (r"vocab", _at_most(VOCABULARY)),
    (DEPTH, _at_most(LAYERS)),
    (r"layers?$|first_k|layer_(id|idx|index)|start_index|indices$|indexes$|(attention|layer)_types$", _layer),
    (r"max.*position|n_positions|n_ctx|max.*(length|len)$|context_length|seq_len|landmarks", _at_most(POSITIONS)),
    (r"image_size|img_size|crop_size|resolution", lambda value: IMAGE),
    (r"num_patches", lambda value: (IMAGE // PATCH) ** 2),
    (r"period|interval|frequency|every_n|_step$|pattern", _at_most(2)),
    (r"offset$|topk_group|top_k_group", _at_most(1)),
    (r"top_?k|(^|_)k$|per_tok(en)?$|n_group$", _at_most(2)),
    (r"experts?$|expert_num", _at_most(EXPERTS)),
    (r"depths|block_sizes|stage.*blocks|num_blocks|repeats", _at_most(2)),
    (r"per_block$", _at_most(LAYERS)),
)
"""What a number becomes, by the first pattern that the name of its field holds: sizes that hang on no other."""

WIDTHS: tuple[tuple[str, Rule], ...] = (
    (r"patch_size$", lambda value: value if value <= 8 else PATCH),
    (r"window_size|global_block", _at_most(2)),
    (r"codebook_size", lambda value: 64),
    # Chunks of more are samples of sound.
    (r"window|chunk|block_size$|local_attention", lambda value: value if value > 100_000 else min(value, WINDOW)),
    (r"coordinate_size|shape_size", _at_most(WIDTH // 6)),
    (r"group.*width|rotary_dim", _at_most(8)),
    # Narrower than a layer, as everywhere: states of the two kinds are to be told apart.
    (r"router.*size", _at_most(WIDTH // 2)),
    (r"heads?$|groups?$", _power_of_two),
    (r"head_(dim|size)|d_kv|d_head|dim_head|kv_channels", _at_most(WIDTH // HEADS)),
    # Every other large number is a width.
    (r"", _at_most(WIDTH)),
)
"""Likewise, for sizes that must fit each other."""

OPEN: dict[str, Any] = {
    "pad_token_id": 0,
    "vocab_size": VOCABULARY,
    "default_language": "en_XX",
    "num_key_value_heads": HEADS // 2,
    "head_dim": WIDTH // HEADS,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
}
"""Fields that some default configs leave open although their models cannot do without."""

INHERITED = {field.name for field in dataclasses.fields(PreTrainedConfig)}


def tiny_config(config: PreTrainedConfig, keep_widths: bool = False, **fields: Any) -> PreTrainedConfig:
    """A small copy of a config, with every kind of layer that it has.

    Args:
        config: Mostly the default one of a class, `SomeConfig()`; nested configs become small, too.
        keep_widths: Leave the sizes that must fit each other as they are, for models where they do so in a way that
            names do not tell.
        fields: Fields to set as they are.

    Returns:
        A config of the same class of about 4 layers of width 96, a vocabulary of at most 128 and images of 64 x 64.
    """
    rules = COUNTS if keep_widths else COUNTS + WIDTHS
    config, plain = copy.copy(config), type(config)()
    for one in (config, plain):
        # Or sizes that differ from layer to layer could not be read.
        one.allow_global_per_layer_attribute_access = True
    layers = _layer_lists(config)
    names = [field.name for field in dataclasses.fields(config)]
    small: dict[str, Any] = {
        name: value for name, value in vars(config).items() if name not in names and not hasattr(plain, name)
    }
    for field in dataclasses.fields(config):
        name, value = field.name, getattr(config, field.name)
        if isinstance(value, PreTrainedConfig):
            small[name] = tiny_config(value, keep_widths)
        elif name in layers:
            small[name] = layers[name]
        elif value is None and name in OPEN:
            small[name] = OPEN[name]
        elif name in INHERITED or (field.default is None and value == getattr(plain, name) and not _is_pattern(value)):
            # What is derived from other fields is derived again, from the small ones.
            if value != getattr(plain, name):
                small[name] = value
        else:
            small[name] = _tiny(name, value, config, rules)
    depth = max(map(len, layers.values()), default=LAYERS)
    for name, value in small.items():
        if re.search(DEPTH, name) and value == LAYERS:
            small[name] = depth
    if not keep_widths:
        small |= _fitting(config, small)
    return type(config)(**{**small, **fields})


def _fitting(config: PreTrainedConfig, small: dict[str, Any]) -> dict[str, Any]:
    """Sizes that follow from others: of heads where there are fewer for keys, or where all are wider than a layer."""
    numbers = {name: value for name in small if isinstance(value := getattr(config, name, None), int)}
    fields: dict[str, Any] = {}
    for name, value in numbers.items():
        if re.search(r"(key_value|kv)_heads$|kv_n_heads", name):
            all_heads = getattr(config, "num_attention_heads", value)
            fields[name] = min(value, HEADS if value == all_heads else HEADS // 2)
    widths = {value: small[name] for name, value in numbers.items() if re.search(r"d_ssm$", name)}
    widths |= {v * config.hidden_size: v * WIDTH for name, v in numbers.items() if re.search(r"expand$", name)}
    counts = [value for name, value in numbers.items() if re.search(r"heads$", name)]
    for name, value in numbers.items():
        if re.search(r"(d_head|head_dim)$", name):
            whole = next((widths[one * value] for one in counts if one * value in widths), None)
            if whole is not None:
                fields[name] = whole // HEADS
    return fields


def _tiny(name: str, value: Any, config: PreTrainedConfig, rules: tuple[tuple[str, Rule], ...]) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, dict, list, tuple)):
        return value
    if isinstance(value, int):
        return next((rule for pattern, rule in rules if re.search(pattern, name)), _same)(value)
    if isinstance(value, dict):
        return {key: _tiny(str(key), one, config, rules) for key, one in value.items()}
    numbers = all(isinstance(one, int) and not isinstance(one, bool) for one in value)
    if numbers and re.search(r"layers?$|indices$|indexes$|idxs$|layer_ids$", name) and _increases(value):
        # Indices of layers: every other one.
        return type(value)(range(1, LAYERS, 2))
    if numbers and rules is not COUNTS and sum(value) == getattr(config, "hidden_size", None):
        # Parts that make up a width.
        return type(value)(WIDTH // len(value) for _ in value)
    small = type(value)(_tiny(name, one, config, rules) for one in value)
    return small[:LAYERS] if len(value) == _depth(config) else small


def _is_pattern(value: Any) -> bool:
    """Whether a value spells out layers in a form of its own, e.g. [[["global", "local"], 12]]."""
    return isinstance(value, list) and any(isinstance(one, list) for one in value)


def _increases(values: Sequence[int]) -> bool:
    return len(values) > 0 and values[0] >= 0 and all(a < b for a, b in itertools.pairwise(values))


def _depth(config: PreTrainedConfig) -> int | None:
    depths = (getattr(config, name, None) for name in ("num_hidden_layers", "num_layers", "decoder_layers"))
    return next((depth for depth in depths if isinstance(depth, int)), None)


def _layer_lists(config: PreTrainedConfig) -> dict[str, list[Any]]:
    """The lists that say of which kind each layer is, shortened together so that no combination gets lost."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    lists = {
        name: value
        for name, value in values.items()
        if isinstance(value, (list, tuple))
        and len(value) == _depth(config)
        and all(isinstance(one, (str, bool)) or one in (0, 1) for one in value)
    }
    if not lists:
        return {}
    rows = list(zip(*lists.values(), strict=True))
    runs = [row for row, _ in itertools.groupby(rows)]
    kinds = list(dict.fromkeys(rows))
    chosen = runs[:LAYERS] if set(runs[:LAYERS]) == set(kinds) else kinds
    chosen += [chosen[-1]] * (LAYERS - len(chosen))
    return {name: list(column) for name, column in zip(lists, zip(*chosen, strict=True), strict=True)}


def model_types(task: str) -> list[str]:
    """The model types that the auto-model mapping of a task lists."""
    return list(_class_names(task))


def _class_names(task: str) -> dict[str, str | tuple[str, ...]]:
    return getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES")


def tiny_model(task: str, model_type: str) -> PreTrainedModel:
    """A tiny random model in eval mode that runs on its dummy inputs.

    Args:
        task: A key of `TASKS`.
        model_type: One of `model_types(task)`.

    Raises:
        ImportError: If the model needs a package that is not installed.
        ValueError: If no config can be made for it that builds and runs, with the reason.
    """
    default = _default_config(task, model_type)
    failures: list[Exception] = []
    for keep_widths in (False, True):
        try:
            torch.manual_seed(0)
            config = tiny_config(default, keep_widths)
            if keep_widths:
                _check_size(task, config)
            model = scrambled(TASKS[task].from_config(config).float()).eval()
            with torch.no_grad(), only_logits(model):
                _calibrate(model)
                model(**dummy_inputs(model))
        except ImportError:
            raise
        except Exception as error:
            failures.append(error)
        else:
            return model
    raise ValueError(_blame(task, default, failures[0])) from failures[0]


def _default_config(task: str, model_type: str) -> PreTrainedConfig:
    names = _class_names(task)[model_type]
    try:
        config = CONFIG_MAPPING[model_type]()
    except Exception as error:
        raise ValueError(f"its default config is invalid: {_last_line(error)}") from error
    config.architectures = [names if isinstance(names, str) else names[0]]
    if task == "CAUSAL_LM" and not config.is_encoder_decoder and getattr(config, "is_decoder", None) is False:
        # BERT and its like see what comes next unless told not to.
        config.is_decoder = True
    return config


def _check_size(task: str, config: PreTrainedConfig) -> None:
    with torch.device("meta"):
        parameters = TASKS[task].from_config(config).num_parameters()
    if parameters > MOST_PARAMETERS:
        raise ValueError(f"its widths cannot be shrunk, and with them it has {parameters:,} parameters")


def _blame(task: str, config: PreTrainedConfig, failure: Exception) -> str:
    """Whether a model fails with its default config as well, which is then to blame."""
    try:
        with torch.device("meta"):
            model = TASKS[task].from_config(config)
    except Exception as error:
        return f"its default config builds no model: {_last_line(error)}"
    return f"{type(model).__name__} does not run: {_last_line(failure)}"


def _last_line(error: Exception) -> str:
    """Message of an error, and the line of code that raised it: that names the field where the message does not."""
    frames = traceback.extract_tb(error.__traceback__)
    line = next((frame.line for frame in reversed(frames) if "/models/" in frame.filename), frames[-1].line)
    return f"{' '.join(str(error).split())} ({line})"


def _calibrate(model: PreTrainedModel) -> None:
    """Give batch norms the statistics of the dummy inputs: with those they are made with, signals fade away."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    if norms:
        model.train()
        model(**dummy_inputs(model))
        model.eval()


@torch.no_grad()
def scrambled(model: PreTrainedModel) -> PreTrainedModel:
    """Make a wrong route through a new model show in its logits, however many layers lie above.

    Weights get a size that keeps that of the signal, and constant parameters become random, so that no gate, scale or
    bias is neutral. In place; returns the model.
    """
    for parameter in model.parameters():
        if not parameter.is_floating_point() or not parameter.numel():
            continue
        if (parameter == parameter.flatten()[0]).all():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        elif parameter.ndim > 1:
            fan_in = parameter[0].numel() if parameter.ndim != 3 else parameter.shape[-1]
            parameter.mul_((2 / fan_in) ** 0.5 / parameter.std())
    return model
