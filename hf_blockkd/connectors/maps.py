"""Connectors: the small trainable maps from the student's hidden states to the teacher's width."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

MODULE_NAME = "blockwise_connectors"
"""Name under which the connectors hang on the student while it trains."""
CONNECTORS_NAME = "connectors.safetensors"
CONNECTOR_KINDS = ("auto", "linear", "mlp", "identity")
CONNECTOR_STARTS = ("least_squares", "random")


class ResidualConnector(nn.Linear):
    """`x + W x + b` with W and b made as zero, so that it is the identity to the last bit.

    A plain linear map with an identity matrix would be so only up to the rounding of its matrix product.
    """

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states + super().forward(states)


def make_connector(kind: str, student_width: int, teacher_width: int) -> nn.Module:
    """Build the connector of one stepping stone.

    Args:
        kind: `"linear"` is one affine map; `"mlp"` a GELU between two, as wide as the teacher inside; `"identity"` a
            residual map that is made as the exact identity and needs equal widths; `"auto"` is `"identity"` where the
            widths are equal, else `"linear"`.
        student_width: Size of the last dimension of what comes in.
        teacher_width: Size of the last dimension of what goes out.

    Returns:
        A module that maps (..., student_width) to (..., teacher_width).

    Raises:
        ValueError: If the kind is unknown, or `"identity"` meets unequal widths.

    Example:
        ```python
        >>> import torch
        >>> from hf_blockkd.connectors.maps import make_connector
        >>> make_connector("linear", 48, 128)(torch.zeros(2, 17, 48)).shape
        torch.Size([2, 17, 128])

        ```
    """
    if kind == "auto":
        kind = "identity" if student_width == teacher_width else "linear"
    if kind == "linear":
        return nn.Linear(student_width, teacher_width)
    if kind == "mlp":
        return nn.Sequential(
            nn.Linear(student_width, teacher_width), nn.GELU(), nn.Linear(teacher_width, teacher_width)
        )
    if kind == "identity":
        if student_width != teacher_width:
            raise ValueError(
                f"connector='identity' needs equal widths, but the student's states are {student_width} wide and the "
                f"teacher's {teacher_width}; use connector='linear' or 'mlp'."
            )
        return ResidualConnector(student_width, teacher_width)
    raise ValueError(f"Unknown connector {kind!r}; choose one of {', '.join(map(repr, CONNECTOR_KINDS))}.")


def make_connectors(
    kind: str, student_widths: Sequence[int], teacher_widths: Sequence[int], seed: int
) -> nn.ModuleList:
    """Build the connectors of all stones from a seed of their own, leaving the global random state as it was.

    So the same seed gives the same data order and dropout with and without stepping stones.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pairs = zip(student_widths, teacher_widths, strict=True)
        return nn.ModuleList(make_connector(kind, student, teacher) for student, teacher in pairs)


def features_and_map(connector: nn.Module) -> tuple[nn.Module, nn.Linear]:
    """A connector of `make_connector` in two: what comes before its last affine map, and that map."""
    *before, last = connector if isinstance(connector, nn.Sequential) else [connector]
    return nn.Sequential(*before), last


def connect(connector: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """Apply a connector in its own dtype, float32 at least, so that no small update of its weights vanishes."""
    parameter = next(connector.parameters(), None)
    return connector(states if parameter is None else states.to(parameter.dtype))


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


def join_optimizer(connectors: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer that was made for the student alone train the connectors, too, as part of its first group."""
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [one for one in connectors.parameters() if one.requires_grad and id(one) not in known]
    optimizer.param_groups[0]["params"].extend(missing)


@contextmanager
def detached(student: nn.Module) -> Iterator[None]:
    """The student without its connectors, for code that reads or writes its weights."""
    connectors = student._modules.pop(MODULE_NAME)
    try:
        yield
    finally:
        student._modules[MODULE_NAME] = connectors


def without_connectors(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The student's part of a state dict."""
    return {name: value for name, value in state_dict.items() if not name.startswith(f"{MODULE_NAME}.")}
