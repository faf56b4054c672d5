"""Connectors: the small trainable maps from the student's hidden states to the teacher's width."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

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
    kind: str,
    student_widths: Sequence[int],
    teacher_widths: Sequence[int],
    seed: int,
    channels: Sequence[int] | None = None,
) -> nn.ModuleList:
    """Build the connectors of all stones from a seed of their own, leaving the global random state as it was.

    So the same seed gives the same data order and dropout with and without stepping stones.

    Args:
        kind: As in `make_connector`.
        student_widths: For each of them, the size of what comes in.
        teacher_widths: Likewise, of what goes out.
        seed: Draws what is random.
        channels: Where the student's states are some of the teacher's: which ones. Linear maps, in either direction,
            then begin as what puts each of them in its place.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pairs = zip(student_widths, teacher_widths, strict=True)
        connectors = nn.ModuleList(make_connector(kind, student, teacher) for student, teacher in pairs)
    for connector in connectors:
        if channels is not None and type(connector) is nn.Linear:
            _begin_at_the_cut(connector, channels)
    return connectors


@torch.no_grad()
def _begin_at_the_cut(connector: nn.Linear, channels: Sequence[int]) -> None:
    narrow, wide = sorted((connector.in_features, connector.out_features))
    if len(channels) == narrow and max(channels) < wide:
        nn.init.zeros_(connector.bias)
        nn.init.zeros_(connector.weight)
        weight = connector.weight if connector.out_features == wide else connector.weight.T
        weight[list(channels), range(narrow)] = 1.0


def is_identity(connector: nn.Module) -> bool:
    """Whether a connector changes no bit."""
    is_residual = isinstance(connector, ResidualConnector)
    return isinstance(connector, nn.Identity) or (is_residual and not any(map(torch.any, connector.parameters())))


def is_fixed_identity(connector: nn.Module) -> bool:
    """Whether it changes none, and will not."""
    return is_identity(connector) and not any(one.requires_grad for one in connector.parameters())


def features_and_map(connector: nn.Module) -> tuple[nn.Module, nn.Linear]:
    """A connector of `make_connector` in two: what comes before its last affine map, and that map."""
    *before, last = connector if isinstance(connector, nn.Sequential) else [connector]
    return nn.Sequential(*before), last


def connect(connector: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """Apply a connector in its own dtype, float32 at least, so that no small update of its weights vanishes."""
    parameter = next(connector.parameters(), None)
    return connector(states if parameter is None else states.to(parameter.dtype))
