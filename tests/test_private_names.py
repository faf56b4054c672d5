"""The list of private names of other libraries is complete, and each of them still exists."""

import ast
import importlib
import inspect
from collections import namedtuple
from pathlib import Path

import pytest
from transformers import GenerationMixin, PreTrainedModel, Trainer

import hf_blockkd
from hf_blockkd.private_names import PRIVATE_NAMES

SOURCES = [ast.parse(path.read_text(encoding="utf-8")) for path in Path(hf_blockkd.__path__[0]).rglob("*.py")]
LISTED = {name for names in PRIVATE_NAMES.values() for name in names}


def resolve(path: str):
    """A module, or what is found inside one."""
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(path)


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


@pytest.mark.parametrize(("where", "name"), [(where, name) for where, names in PRIVATE_NAMES.items() for name in names])
def test_the_name_still_exists(where, name):
    owner = resolve(where)
    # What instances alone have is set somewhere in the source.
    exists = hasattr(owner, name) or f".{name}" in inspect.getsource(owner)
    assert exists, f"{where}.{name} is gone; without it: {PRIVATE_NAMES[where][name]}"


def test_no_other_private_name_is_used():
    of_named_tuples = {name for name in dir(namedtuple("Any", ())) if is_private(name)}
    used, own = set(), set(of_named_tuples)
    for node in (node for source in SOURCES for node in ast.walk(source)):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            used.add(node.attr)
            if isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name) and node.value.id == "self":
                own.add(node.attr)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)) and is_private(node.name):
            own.add(node.name)
        elif isinstance(node, ast.Name) and is_private(node.id) and isinstance(node.ctx, ast.Store):
            own.add(node.id)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            used |= {alias.name for alias in node.names if is_private(alias.name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            own.add(node.target.id)
    assert used - own <= LISTED, "list them in hf_blockkd/private_names.py, with the reason"
    theirs = {*vars(Trainer), *vars(PreTrainedModel), *vars(GenerationMixin)}
    overridden = {name for name in own if name in theirs and is_private(name)}
    assert overridden <= LISTED, "they override names of transformers' classes: list them likewise"
    assert used | own >= LISTED - {"_hf_hook", "_orig_mod"}, "unused by now"
