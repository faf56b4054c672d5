"""Connectors on the student while it trains, and in a file of their own: `attach`, `save_connectors`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

MODULE_NAME = "blockwise_connectors"
"""Name under which the connectors hang on the student while it trains."""


CONNECTORS_NAME = "connectors.safetensors"
_NOTHING = object()


def save_connectors(
    connectors: nn.ModuleList, folder: str | Path, student_state: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Write the connectors to `connectors.safetensors` in `folder`.

    Args:
        connectors: What hangs on the student.
        folder: Where the file goes.
        student_state: State dict of the student, where they are to be taken from it: in a sharded run, they are whole
            there alone.
    """
    state = connectors.state_dict()
    if student_state is not None:
        state = {name: student_state[f"{MODULE_NAME}.{name}"] for name in state}
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(state, Path(folder) / CONNECTORS_NAME, metadata={"format": "pt"})


def load_connectors(connectors: nn.ModuleList, folder: str | Path) -> None:
    """Read what `save_connectors` wrote.

    Raises:
        ValueError: If the file is missing or holds connectors of other shapes; nothing is loaded then.
    """
    path = Path(folder) / CONNECTORS_NAME
    if not path.is_file():
        raise ValueError(
            f"{path} is missing, so the connectors cannot be resumed; resume from a checkpoint that "
            "BlockwiseDistillTrainer wrote."
        )
    saved = load_file(path)
    found = {name: tuple(tensor.shape) for name, tensor in saved.items()}
    expected = {name: tuple(tensor.shape) for name, tensor in connectors.state_dict().items()}
    if found != expected:
        raise ValueError(
            f"{path} holds connectors of another run: {found} instead of {expected}; resume with the `num_blocks`, "
            "boundaries and `connector` of the run that wrote it."
        )
    connectors.load_state_dict(saved)


def attach(connectors: nn.ModuleList, student: nn.Module) -> None:
    """Hang the connectors on the student, where optimizer and wrappers find them but its weight file does not."""
    student.add_module(MODULE_NAME, connectors)
    keys = {f"{MODULE_NAME}.{name}" for name in connectors.state_dict()}
    student._keys_to_ignore_on_save = {*(getattr(student, "_keys_to_ignore_on_save", None) or ()), *keys}


@contextmanager
def attached(connectors: nn.ModuleList, student: nn.Module) -> Iterator[None]:
    """The student with the connectors on it, which is plain again afterwards; those that hang there stay."""
    if getattr(student, MODULE_NAME, None) is connectors:
        yield
        return
    own = vars(student).get("_keys_to_ignore_on_save", _NOTHING)
    attach(connectors, student)
    try:
        yield
    finally:
        student._modules.pop(MODULE_NAME, None)
        if own is _NOTHING:
            del student._keys_to_ignore_on_save
        else:
            student._keys_to_ignore_on_save = own


@contextmanager
def detached(student: nn.Module) -> Iterator[None]:
    """The student without its connectors, if there are any on it, for code that reads or writes its weights."""
    connectors = student._modules.pop(MODULE_NAME, None)
    try:
        yield
    finally:
        if connectors is not None:
            student._modules[MODULE_NAME] = connectors


def join_optimizer(connectors: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer that was made for the student alone train the connectors, too.

    They join the group with the highest learning rate: one that has none would leave them as they are.
    """
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = {n: p for n, p in connectors.named_parameters() if p.requires_grad and id(p) not in known}
    group = max(optimizer.param_groups, key=lambda group: float(group["lr"]))
    group["params"].extend(missing.values())
    if "param_names" in group:
        group["param_names"].extend(f"{MODULE_NAME}.{name}" for name in missing)


def regroup(connectors: nn.Module, optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Move the connectors that an optimizer trains into groups of their own, which differ in the rate alone."""
    ours = {id(parameter) for parameter in connectors.parameters()}
    for group in list(optimizer.param_groups):
        moved = [parameter for parameter in group["params"] if id(parameter) in ours]
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in ours]
        if moved:
            optimizer.add_param_group({**group, "params": moved, "lr": learning_rate})


def without_connectors(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The student's part of a state dict."""
    return {name: value for name, value in state_dict.items() if not name.startswith(f"{MODULE_NAME}.")}
