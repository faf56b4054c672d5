"""From the student's places on the image to the teacher's: `Bridge`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn
from torch.nn import functional as F

from .token_layout import Grid, TokenLayout


def resample(tokens: torch.Tensor, source: Grid, target: Grid) -> torch.Tensor:
    """Resize a grid of tokens as an image is resized: bilinear, antialiased.

    Args:
        tokens: (B, h * w, D), row by row.
        source: h and w.
        target: Those of the result; equal ones return the tokens as they are.

    Example:
        ```python
        >>> import torch
        >>> from hf_blockkd.connectors.bridges import resample
        >>> resample(torch.tensor([[[0.0], [4.0]]]), (1, 2), (1, 4)).flatten().tolist()
        [0.0, 1.0, 3.0, 4.0]

        ```
    """
    if source == target:
        return tokens
    # As two small matrices, which any dtype can take, and whose gradient is the same at every run on a GPU, too.
    rows, columns = (_weights(*sides).to(tokens) for sides in zip(source, target, strict=True))
    grid = torch.einsum("ih,bhwd->biwd", rows, tokens.unflatten(1, source))
    return torch.einsum("jw,biwd->bijd", columns, grid).flatten(1, 2)


@lru_cache
def _weights(source: int, target: int) -> torch.Tensor:
    """(target, source): what each new place takes of the old ones."""
    impulses = torch.eye(source)[None, None]
    return F.interpolate(impulses, (target, source), mode="bilinear", antialias=True, align_corners=False)[0, 0]


@dataclass(frozen=True)
class Bridge:
    """The way of a student's states to the teacher's layout, through a connector that maps their width.

    The grid is resampled, and special tokens go by their roles: the k-th of a role to the k-th of it. One that the
    student lacks is the mean of its grid, one that the teacher lacks is dropped.

    Attributes:
        source: Layout of the student's states.
        target: Layout of the teacher's.

    Example:
        ```python
        >>> import torch
        >>> from hf_blockkd.connectors.bridges import Bridge
        >>> from hf_blockkd.connectors.token_layout import TokenLayout
        >>> bridge = Bridge(TokenLayout((8, 8), channels=1), TokenLayout((4, 4), special=("class",)))
        >>> bridge(torch.zeros(2, 32, 8, 8), torch.nn.Linear(32, 48)).shape
        torch.Size([2, 17, 48])
        >>> print(bridge)
        8x8 -> class + 4x4

        ```
    """

    source: TokenLayout
    target: TokenLayout

    def __call__(self, states: torch.Tensor, connector: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Student states, as the student has them -> states as the teacher would have them."""
        tokens = connector(self.source.tokens(states))
        given = {role: [] for role in self.source.special}
        for index, role in enumerate(self.source.special):
            given[role].append(tokens[:, index : index + 1])
        patches = tokens[:, len(self.source.special) :]
        mean = patches.mean(1, keepdim=True)
        special = [given[role].pop(0) if given.get(role) else mean for role in self.target.special]
        patches = resample(patches, self.source.grid, self.target.grid)
        return self.target.states(torch.cat([*special, patches], dim=1) if special else patches)

    @property
    def is_needed(self) -> bool:
        """Whether states can not just be handed over; maps have their width elsewhere than a connector maps it."""
        return self.source != self.target or self.source.channels != -1

    def reversed(self) -> Bridge:
        """The way back."""
        return Bridge(self.target, self.source)

    def __str__(self) -> str:
        return f"{self.source} -> {self.target}"


class BridgedConnector(nn.Module):
    """A connector between different layouts: what maps the width, then the bridge.

    Args:
        width: Maps (..., D) to (..., D').
        bridge: From the layout of what comes in to that of what goes out.
    """

    def __init__(self, width: nn.Module, bridge: Bridge) -> None:
        super().__init__()
        self.width = width
        self.bridge = bridge

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.bridge(states, self.width)

    def extra_repr(self) -> str:
        return str(self.bridge)
