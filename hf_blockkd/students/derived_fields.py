"""Fields that a config derives from others when it is made, and that setting those others later would leave behind."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

REFUSED = object()


def follow(theirs: PreTrainedConfig, before: PreTrainedConfig, part: PreTrainedConfig, given: set[str]) -> None:
    """Derive anew what the class of a config derives from fields that were set, e.g. `layer_types` from a pattern.

    What the teacher has of its own, and not as its class would derive it, stays.

    Args:
        theirs: The teacher's part of the config.
        before: The student's, before fields were set.
        part: The student's, which is changed.
        given: Own names of the fields that were set.

    Raises:
        StrictDataclassError: If the class refuses to derive a field.
    """
    open_by_default = {field.name for field in dataclasses.fields(part) if field.default is None}
    made = {field.name for field in dataclasses.fields(part) if field.init}
    others = {name for name in vars(part) if not name.startswith("_") and name not in made}
    for name in sorted((open_by_default | others) - given):
        derived = _derive(theirs, name)
        if derived is REFUSED or derived != getattr(theirs, name, None):
            continue
        old = _derive(before, name)
        new = _derive(part, name, strict=old is not REFUSED)
        # A depth may have to be told anew, so that the class refuses the fields before and takes them now.
        if new is not REFUSED and new != old:
            setattr(part, name, new)


def _derive(part: PreTrainedConfig, name: str, strict: bool = False) -> Any:
    """What a field is in a config that is made of the other ones."""
    fields = [field.name for field in dataclasses.fields(part) if field.init and field.name != name]
    try:
        return getattr(type(part)(**copy.deepcopy({field: getattr(part, field) for field in fields})), name)
    except (StrictDataclassError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        if strict:
            raise
        return REFUSED
