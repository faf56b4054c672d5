"""Where two configs disagree on what the forwards make of an input: `check_tokens`, `same_beginning`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..losses.rows import IGNORED
from ..routing.dummy_inputs import dummy_inputs
from ..routing.forwards import in_eval_mode
from ..routing.logits import main_outputs
from .decoder_inputs import decoder_ids, makes_decoder_ids

TOKENS = re.compile(r"_token_(id|index)$")
"""Fields that name a token. Both models read the same ids, so those that a forward looks for must be the same, too."""
APART = re.compile(
    r"^(id2label|label2id|num_labels|problem_type|architectures|transformers_version|dtype|torch_dtype|_name_or_path"
    r"|tie_word_embeddings|use_cache|return_dict|output_\w+|(bos|eos|sep|pad|decoder_start|forced_\w+)_token_id"
    r"|stage_names|out_features|out_indices|router_\w+_coef|final_logit_softcapping|logit_scale|summary_\w+|classifier_\w+|initializer_\w+|pooler_\w+)$"
)
"""Fields of heads, losses, generation and initialisation, which do not change what leaves the first layers; what the
padding's id does to positions, it does to all of them, and so to the first batch."""
DEPTH = re.compile(r"layers?$|depth|blocks")
"""Fields that may hold the number of layers."""
WHOLE_DROPS = re.compile(r"layer_?drop|drop_?path|stochastic|drop_connect")
"""Drops of whole layers, which may leave the first batch as it is."""
DROPS = re.compile(r"drop")
"""All others are seen in the first states of a student in train mode; those of its teacher are off."""
_MISSING = object()


def token_fields(model: PreTrainedModel) -> dict[tuple[str, str], Any]:
    """The fields of a model's config that name a token, as (part of the config, field) -> value."""
    return {
        (part, name): value
        for part, config in _parts(model.config).items()
        for name, value in vars(config).items()
        if TOKENS.search(name) and (value is None or isinstance(value, int))
    }


def check_tokens(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """No forward reads another token than the other model's in the same place.

    Where a field differs, each model is run with its own value and with the other's, on texts that hold both: it is
    refused if that changes the logits, as where a classifier reads the last token that is no padding.

    Args:
        student: The student.
        teacher: The teacher.

    Raises:
        ValueError: If they would read different tokens.
    """
    ours, theirs = token_fields(student), token_fields(teacher)
    different = [key for key in ours.keys() & theirs.keys() if ours[key] != theirs[key]]
    for key in sorted(different):
        values = ours[key], theirs[key]
        if _is_read(student, key, values) and _is_read(teacher, key, values):
            raise _disagreement(student, teacher, key[1], values)
    if makes_decoder_ids(student) and makes_decoder_ids(teacher):
        labels = torch.tensor([[5, IGNORED, IGNORED]])
        try:
            made = [decoder_ids(model, labels)[0].tolist() for model in (student, teacher)]
        except ValueError:
            return  # a batch that has them already needs none
        for name, place in (("decoder_start_token_id", 0), ("pad_token_id", -1)):
            if made[0][place] != made[1][place]:
                raise _disagreement(student, teacher, name, (made[0][place], made[1][place]))


def _disagreement(student: PreTrainedModel, teacher: PreTrainedModel, name: str, values: Any) -> ValueError:
    return ValueError(
        f"`{name}` is {values[0]} in the config of the student {type(student).__name__} and {values[1]} in that of the "
        f"teacher {type(teacher).__name__}, whose forwards look for it, so that they would read different places of a "
        "text; set it alike in both configs and the tokenizer."
    )


def _parts(config: PreTrainedConfig) -> dict[str, PreTrainedConfig]:
    """A config and those nested in it."""
    nested = {name: getattr(config, name, None) for name in config.sub_configs}
    return {"": config, **{name: part for name, part in nested.items() if isinstance(part, PreTrainedConfig)}}


def _is_read(model: PreTrainedModel, key: tuple[str, str], values: tuple[Any, Any]) -> bool:
    """Whether the logits of a model depend on which of two tokens a field of its config names."""
    part, name = key
    config = _parts(model.config)[part]
    own = vars(config)[name]
    found: dict[Any, list[Any]] = {value: [] for value in values}
    try:
        with in_eval_mode(model):
            for ends in (values, values[::-1]):  # a text that ends with either of them
                inputs = dummy_inputs(model, batch_size=1)
                for ids in (inputs[column] for column in ("input_ids", "decoder_input_ids") if column in inputs):
                    for place, value in zip((-4, -1), ends, strict=True):
                        if value is not None and 0 <= value < model.get_input_embeddings().weight.shape[0]:
                            ids[..., place] = value
                for value in values:
                    vars(config)[name] = value
                    found[value].append(_logits(model, inputs))
    finally:
        vars(config)[name] = own
    return not all(_are_equal(a, b) for a, b in zip(*found.values(), strict=True))


@torch.no_grad()
def _logits(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...] | None:
    try:
        return main_outputs(model(**inputs))
    except (ValueError, IndexError, RuntimeError):
        return None


def _are_equal(ours: tuple[torch.Tensor, ...] | None, theirs: tuple[torch.Tensor, ...] | None) -> bool:
    if ours is None or theirs is None:
        return ours is theirs
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def same_beginning(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    depths: tuple[int, int],
    shared: int,
    in_training: bool = True,
) -> bool:
    """Whether two configs let equal first layers compute the same on every input, not just on one batch.

    Every field must be the same but for depths, what later layers have, and what works after the layers.

    Args:
        student: The student.
        teacher: The teacher.
        depths: Number of layers of both.
        shared: Number of first layers.
        in_training: Whether whole layers may be dropped at random.
    """
    ours, theirs = student.config.to_dict(), teacher.config.to_dict()
    if not in_training:
        ours, theirs = ({n: v for n, v in one.items() if not WHOLE_DROPS.search(n)} for one in (ours, theirs))
    return _agree(ours, theirs, depths, shared)


def _agree(ours: Mapping[str, Any], theirs: Mapping[str, Any], depths: tuple[int, int], shared: int) -> bool:
    for name in {**ours, **theirs}:
        own, other = ours.get(name, _MISSING), theirs.get(name, _MISSING)
        if WHOLE_DROPS.search(name):
            if own:
                return False
        elif (
            own == other or APART.search(name) or DROPS.search(name) or (DEPTH.search(name) and (own, other) == depths)
        ):
            continue
        elif isinstance(own, Mapping) and isinstance(other, Mapping):
            if not _agree(own, other, depths, shared):
                return False
        elif not (_is_list_of(own, depths[0]) and _is_list_of(other, depths[1]) and own[:shared] == other[:shared]):
            return False
    return True


def _is_list_of(value: Any, length: int) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == length
