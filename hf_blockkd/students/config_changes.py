"""The config of a student: the teacher's with another depth and width, and single fields set where they are read."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.backbone_utils import BackboneConfigMixin

from ..routing.errors import UnsupportedArchitectureError
from ..routing.layers import LayerStack, find_layer_stack
from .config_parts import (
    GROUP_FIELDS,
    own_name,
    owners_of,
    part_of_the_stack,
    parts_of,
    same_in_all_layers,
    width_and_head,
)
from .derived_fields import follow

DEPTH_FIELDS = (
    "num_hidden_layers",
    "decoder_layers",
    "num_decoder_layers",
    "encoder_layers",
    "num_encoder_layers",
    "num_layers",
    "n_layer",
    "n_layers",
)
INNER_FIELDS = (
    "intermediate_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "ffn_dim",
    "ffn_hidden_size",
    "d_ff",
    "dff",
    "d_inner",
    "n_inner",
    "hidden_dim",
    "mamba_d_ssm",
)
HEAD_FIELDS = (
    "encoder_attention_heads",
    "decoder_attention_heads",
    "num_heads",
    "mamba_num_heads",
    "mamba_n_heads",
    "n_mamba_heads",
)
WIDTH_FIELDS = ("hidden_size", "num_attention_heads", *GROUP_FIELDS, "head_dim", *INNER_FIELDS, *HEAD_FIELDS)
# What models raise that are built of a config whose fields do not go together.
OF_NO_LAYER = re.compile(r"(^|_)((image|patch|tubelet|kernel)_size|token_ids?|architectures)$")
"""Names of lists that have no entry for each layer, whatever their length."""
BUILD_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def student_config(
    teacher: PreTrainedModel,
    stack: LayerStack,
    chosen: Sequence[int],
    hidden_size: int | None,
    overrides: dict[str, Any],
) -> PreTrainedConfig:
    """The teacher's config, changed to that of a student.

    Args:
        teacher: Its config is not changed.
        stack: Its layers.
        chosen: Indices of those that the student keeps.
        hidden_size: The student's width; `None` for the teacher's.
        overrides: More fields and their values, of the config or of a part of it. A field that several parts have is
            set on the one which `stack` is built from, and on the whole config, if that has it, too.

    Returns:
        A config that builds a model with as many layers as were chosen.

    Raises:
        ValueError: If no part has a field, with the nearest one that exists; if two arguments set the same field to two
            values; or if the fields do not go together.

    Example:
        ```python
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> from hf_blockkd import find_layer_stack
        >>> from hf_blockkd.students.config_changes import student_config
        >>> model = ViTForImageClassification(ViTConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=2))
        >>> student_config(model, find_layer_stack(model), [0, 2], None, {"layer_norm_epsilon": 1e-5})
        Traceback (most recent call last):
        ValueError: `layer_norm_epsilon` is no field of ViTConfig; did you mean `layer_norm_eps`?

        ```
    """
    config = copy.deepcopy(teacher.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    part = part_of_the_stack(teacher, config, stack)
    targets = {name: owners_of(config, part, name) for name in overrides}
    _check_no_contradiction(part, hidden_size, overrides, targets)
    if hidden_size is not None:
        heads = {own_name(part, name): value for name, value in overrides.items()}
        full = copy.deepcopy(part)
        _narrow(part, hidden_size, heads.get(own_name(part, "num_attention_heads")))
        with _in_one_sentence(type(teacher), len(chosen), overrides):
            follow(full, full, part, {own_name(part, name) for name in WIDTH_FIELDS})
    _set_depth(config, part, type(teacher), stack, chosen)
    before = list(parts_of(copy.deepcopy(config)))
    for name, value in overrides.items():
        for owner in targets[name]:
            _set(owner, name, value)
    with _in_one_sentence(type(teacher), len(chosen), overrides):
        for theirs, old, one in zip(parts_of(teacher.config), before, parts_of(config), strict=True):
            given = {own_name(one, name) for name, owners in targets.items() if any(owner is one for owner in owners)}
            if one is part:
                _check_lists(vars(old), vars(one), given, len(chosen))
            if given:
                follow(theirs, old, one, given)
        if overrides or hidden_size is not None:
            _check_builds(config, part, type(teacher), stack, len(chosen))
    _check_reloads(teacher.config, config)
    return config


def _check_no_contradiction(
    part: PreTrainedConfig,
    hidden_size: int | None,
    overrides: dict[str, Any],
    targets: dict[str, list[PreTrainedConfig]],
) -> None:
    """Refuse two names of one field with two values."""
    given = {} if hidden_size is None else {(id(part), own_name(part, "hidden_size")): ("hidden_size", hidden_size)}
    for name, value in overrides.items():
        for owner in targets[name]:
            first, other = given.setdefault((id(owner), own_name(owner, name)), (name, value))
            if other != value:
                raise ValueError(
                    f"`{first}` is {other!r} and `{name}` is {value!r}, but both set one field of "
                    f"{type(owner).__name__}; give one of them."
                )


def _set(part: PreTrainedConfig, name: str, value: Any) -> None:
    inner = getattr(part, name, None)
    if isinstance(inner, PreTrainedConfig):
        raise ValueError(
            f"`{name}` is a whole {type(inner).__name__}, in which the student's depth would be lost; give the fields "
            "that differ by their own names."
        )
    try:
        setattr(part, name, value)
    except (StrictDataclassError, *BUILD_ERRORS) as error:
        raise ValueError(f"`{name}` is {value!r}, which {type(part).__name__} refuses: {_reason(error)}") from error


def _set_depth(
    config: PreTrainedConfig, part: PreTrainedConfig, model_class: type, stack: LayerStack, chosen: Sequence[int]
) -> None:
    """Set the field that governs the depth of `stack`, and thin out per-layer lists such as `layer_types`."""
    depth = len(stack)
    if len(chosen) == depth:
        return
    for one in (part, *(other for other in parts_of(config) if other is not part)):
        for field in DEPTH_FIELDS:
            if getattr(one, field, None) != depth:
                continue
            before = copy.deepcopy(vars(one))
            own = one.to_dict().get("per_layer_config") or {}
            try:
                setattr(one, field, len(chosen))
            except NotImplementedError:  # a name that stands for two fields
                continue
            for name, value in before.items():
                if isinstance(value, (list, tuple)) and len(value) == depth and not OF_NO_LAYER.search(name):
                    with suppress(StrictDataclassError):  # of a length of its own that is that of the stack by chance
                        setattr(one, name, type(value)(value[i] for i in chosen))
            if own:
                own = {int(index): fields for index, fields in own.items()}
                one.per_layer_config = {new: own[old] for new, old in enumerate(chosen) if old in own}
            try:
                found = _depth(config, model_class, stack.path)
            except BUILD_ERRORS as error:
                raise ValueError(
                    f"{model_class.__name__} cannot be built of the layers {list(chosen)} alone: {_reason(error)}; "
                    "choose other layers."
                ) from error
            if found == len(chosen):
                _drop_stages(one)
                return
            vars(one).update(before)
    raise ValueError(
        f"The config of {model_class.__name__} has no field that sets the depth of {stack.path!r} (tried "
        f"{', '.join(DEPTH_FIELDS)}); build the student from a config of your own."
    )


def _drop_stages(part: PreTrainedConfig) -> None:
    """Forget the names of stages that are no more, of which a backbone's config may return some."""
    if not isinstance(part, BackboneConfigMixin):
        return
    fields = {**part.to_dict(), "out_features": None, "out_indices": None}
    left = type(part).from_dict({name: value for name, value in fields.items() if name != "stage_names"}).stage_names
    returned = [name for name in part.out_features if name in left]
    part.stage_names = left
    part.set_output_features_output_indices(returned or None, None)


def _narrow(part: PreTrainedConfig, hidden_size: int, num_heads: Any) -> None:
    """Set the width, keeping the ratio of the MLPs, and the size of a head where their number is not given."""
    width, head_dim = width_and_head(part)
    if num_heads is not None and (hidden_size % num_heads or not 0 < hidden_size <= width):
        raise ValueError(
            f"`hidden_size` is {hidden_size}, but must divide into `num_attention_heads`, {num_heads}, and be at most "
            f"the teacher's width, {width}."
        )
    if num_heads is None and (hidden_size < head_dim or hidden_size % head_dim or hidden_size > width):
        raise ValueError(
            f"`hidden_size` is {hidden_size}, but must be a multiple of the teacher's head size, {head_dim}, and at "
            f"most its width, {width}; other sizes need `num_attention_heads`, too."
        )
    # Read before they are set: several may be names of one field.
    alike = INNER_FIELDS if num_heads is not None else INNER_FIELDS + HEAD_FIELDS
    sizes = {field: same_in_all_layers(part, field) for field in alike}
    part.hidden_size = hidden_size
    if same_in_all_layers(part, "num_attention_heads") is not None:
        part.num_attention_heads = hidden_size // head_dim if num_heads is None else num_heads
    for field in GROUP_FIELDS:
        groups = same_in_all_layers(part, field)
        if groups is not None:
            own = max(1, groups * hidden_size // width)
            while part.num_attention_heads % own:
                own -= 1
            setattr(part, field, own)
    for field, size in sizes.items():
        if isinstance(size, int):
            setattr(part, field, size * hidden_size // width)


def _check_lists(before: dict[str, Any], after: dict[str, Any], given: set[str], depth: int) -> None:
    """Refuse a list with another number of entries than layers, where there was one for each of them."""
    for name in given:
        # They were thinned out already.
        old, new = before.get(name), after.get(name)
        per_layer = name == "layer_types" or (isinstance(old, (list, tuple)) and len(old) == depth)
        if per_layer and isinstance(new, (list, tuple)) and len(new) != depth:
            raise ValueError(f"`{name}` needs one entry for each of the student's {depth} layers, but has {len(new)}.")


def _check_builds(
    config: PreTrainedConfig, part: PreTrainedConfig, model_class: type, stack: LayerStack, depth: int
) -> None:
    """Refuse fields that do not go together, before weights are made."""
    found = _depth(config, model_class, stack.search_path)
    if found != depth:
        raise ValueError(f"its {stack.path} has {found} layers.")
    for one in parts_of(config):
        one.validate()
    heads, groups = (same_in_all_layers(part, name) for name in ("num_attention_heads", "num_key_value_heads"))
    if isinstance(heads, int) and isinstance(groups, int) and heads % groups:
        raise ValueError(f"{heads} attention heads do not divide into {groups} groups of keys and values.")


@contextmanager
def _in_one_sentence(model_class: type, depth: int, overrides: dict[str, Any]) -> Iterator[None]:
    """Say which fields were set where what they belong to complains."""
    try:
        yield
    except (StrictDataclassError, *BUILD_ERRORS) as error:
        for name in DEPTH_FIELDS:
            if overrides.get(name, depth) != depth:
                raise ValueError(
                    f"`{name}` is {overrides[name]}, but the student is to have {depth} layers; set its depth with "
                    "`num_layers` or `layers` alone."
                ) from error
        changed = ", ".join(f"`{name}={value!r}`" for name, value in overrides.items()) or "that `hidden_size`"
        raise ValueError(
            f"With {changed}, the config builds no {model_class.__name__} to start from: {_reason(error)}"
        ) from error


def _check_reloads(before: PreTrainedConfig, config: PreTrainedConfig) -> None:
    """Refuse a config that could be saved with a trained student, but not loaded, or only with other layers."""
    try:
        changed = _changed_lists(config)
    except (StrictDataclassError, *BUILD_ERRORS) as error:
        try:
            type(before).from_dict(before.to_dict())
        except (StrictDataclassError, *BUILD_ERRORS):
            return
        raise ValueError(
            f"The student's {type(config).__name__} could be saved but not loaded: {_reason(error)}; give the fields "
            "that disagree as arguments."
        ) from error
    usual = _changed_lists(before) if changed else {}
    for name, (own, reloaded) in changed.items():
        if name not in usual:
            raise ValueError(
                f"`{name}` would be {own} in the student's config, of which {type(config).__name__} makes {reloaded} "
                "when it is loaded; choose other layers, so that it stays as it is."
            )


def _changed_lists(config: PreTrainedConfig) -> dict[str, tuple[Any, Any]]:
    """The lists that become others when a config is saved and loaded: Gemma 4 sets the kind of the last layer."""
    again = type(config).from_dict(config.to_dict())
    both = [(vars(one), vars(other)) for one, other in zip(parts_of(config), parts_of(again), strict=True)]
    return {
        name: (value, after.get(name))
        for before, after in both
        for name, value in before.items()
        if isinstance(value, (list, tuple)) and not name.startswith("_") and list(value) != list(after.get(name) or [])
    }


def _depth(config: PreTrainedConfig, model_class: type, path: str | None) -> int:
    """How many layers a model of a config has, which is built without weights."""
    with torch.device("meta"):
        model = model_class(copy.deepcopy(config))
    try:
        return len(find_layer_stack(model, path))
    except UnsupportedArchitectureError:
        return 0


def _reason(error: Exception) -> str:
    # Strict configs put a headline above what a validator says.
    message = str(error.__cause__ if isinstance(error, StrictDataclassError) and error.__cause__ else error)
    return " ".join(message.split())
