"""Where the hidden states of a vision model stand on the image: `TokenLayout`, `token_layouts`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.func import functional_call
from transformers import PreTrainedModel

from ..routing.entering import capture_states, enter_at, record_extras
from ..routing.layers import LayerStack

Grid = tuple[int, int]
ROLES = {"class": r"(cls|class)(_|$)", "distillation": "dist", "register": "reg"}
"""Roles of special tokens, by how the name of the parameter that is their embedding begins, e.g. `cls_token`."""


@dataclass(frozen=True)
class TokenLayout:
    """How the states of one example stand on its image.

    Attributes:
        grid: Rows and columns.
        special: Roles of the tokens before those of the grid: `"class"`, `"distillation"`, or `"register"`, which those
            of no other role have.
        channels: Dimension of a batch of states that is their width: -1 for a sequence (B, T, D), 1 for a map
            (B, D, H, W), 3 for a map (B, H, W, D).

    Example:
        ```python
        >>> import torch
        >>> from hf_blockkd.connectors.token_layout import TokenLayout
        >>> layout = TokenLayout(grid=(2, 3), channels=1)
        >>> layout.tokens(torch.zeros(4, 16, 2, 3)).shape, layout.states(torch.zeros(4, 6, 16)).shape
        (torch.Size([4, 6, 16]), torch.Size([4, 16, 2, 3]))
        >>> print(TokenLayout(grid=(14, 14), special=("class",)))
        class + 14x14

        ```
    """

    grid: Grid
    special: tuple[str, ...] = ()
    channels: int = -1

    def tokens(self, states: torch.Tensor) -> torch.Tensor:
        """States as the model has them -> (B, T, D)."""
        return states if self.channels == -1 else states.movedim(self.channels, -1).flatten(1, 2)

    def states(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, T, D) -> states as the model has them."""
        if self.channels == -1:
            return tokens
        # In memory, too, so that convolutions compute what they do on the model's own states.
        return tokens.unflatten(1, self.grid).movedim(-1, self.channels).contiguous()

    def __str__(self) -> str:
        counts = {role: self.special.count(role) for role in dict.fromkeys(self.special)}
        names = [role if count == 1 else f"{count} {role}" for role, count in counts.items()]
        return " + ".join([*names, f"{self.grid[0]}x{self.grid[1]}"])


@torch.no_grad()
def token_layouts(
    model: PreTrainedModel, stack: LayerStack, depths: Sequence[int], inputs: Mapping[str, Any]
) -> list[TokenLayout | str]:
    """Find out how the states at some depths stand on the image.

    Nothing is read off the config. Of a sequence, tokens that stay as they are when all pixels change are special ones,
    with the role of the embedding that changes them; the others are a grid, whose rows are told by a change of the
    topmost pixels, and whose columns by one of the leftmost. Deeper grids are the first one, or the image, made coarser
    by one stride in both directions.

    Args:
        model: A model in eval mode.
        stack: Its layers.
        depths: As in `capture_states`.
        inputs: What its forward takes, with `pixel_values` (B, C, H, W).

    Returns:
        For each depth a layout, or in words why it is not known: the states are no grid of tokens in reading order, or
        more than one grid would fit.
    """

    with capture_states(stack, [0, *depths, len(stack)]) as clean, record_extras(stack) as extras:
        model(**inputs)
    image = tuple(inputs["pixel_values"].shape[-2:])
    first: TokenLayout | str = TokenLayout(image)
    if clean[0].ndim == 3:

        def moved(parameters: Mapping[str, torch.Tensor] | None = None, **pixels: torch.Tensor) -> list[int]:
            """Tokens that enter the first layer otherwise after a change of parameters or pixels."""
            # No layer needs to run for that.
            with enter_at(stack, len(stack), clean[len(stack)], extras), capture_states(stack, [0]) as changed:
                functional_call(model, dict(parameters or {}), kwargs={**inputs, **pixels})
            return (changed[0] != clean[0]).any(-1).any(0).nonzero().flatten().tolist()

        first = _first_layout(model, clean[0].shape[1], inputs["pixel_values"], moved)
    return [_layout(tuple(clean[depth].shape), first, image) for depth in depths]


def _first_layout(
    model: PreTrainedModel, length: int, pixels: torch.Tensor, moved: Callable[..., list[int]]
) -> TokenLayout | str:
    """The layout of what enters the first layer, a sequence of `length` tokens."""
    top, left = pixels.clone(), pixels.clone()
    top[..., 0, :] *= -1
    left[..., 0] *= -1
    patches = moved(pixel_values=-pixels)
    start = length - len(patches)
    rows, columns = ([i - start for i in moved(pixel_values=changed)] for changed in (top, left))
    # A stem that overlaps its patches moves more than one row and column, but all of each.
    thick = next((i for i, column in enumerate(columns) if column != i), len(columns))
    fitting = _coarser(tuple(pixels.shape[-2:]), len(patches))
    grids = {(len(patches) // columns[thick], columns[thick])} if thick < len(columns) else fitting
    height, width = grids.pop() if len(grids) == 1 else (0, 0)
    in_order = (
        height * width == len(patches) > 0
        and patches == list(range(start, length))
        and rows == list(range(len(rows)))
        and len(rows) % width == 0
        and columns == [i for i in range(len(patches)) if i % width < thick]
    )
    if not in_order:
        return "its tokens do not stand on the image row by row"
    if not start:
        return TokenLayout((height, width))
    special = ["register"] * start
    for name, parameter in model.named_parameters():
        last = name.rpartition(".")[2]
        role = next((role for role, pattern in ROLES.items() if re.match(pattern, last)), None)
        if role is None:
            continue
        if parameter.is_meta:
            return f"the embedding of its {role} token is offloaded"
        # A ramp, which no norm takes back as it would a constant.
        ramp = torch.linspace(1, 2, parameter.shape[-1], device=parameter.device, dtype=parameter.dtype)
        for index in moved({name: parameter + ramp}):
            if index < start:
                special[index] = role
    return TokenLayout((height, width), tuple(special))


def _layout(shape: tuple[int, ...], first: TokenLayout | str, image: Grid) -> TokenLayout | str:
    """The layout of states of a shape, in a model that begins with the layout `first`."""
    if len(shape) == 4:
        for channels, grid in ((1, shape[2:]), (3, shape[1:3])):
            if grid in _coarser(image, math.prod(grid)):
                return TokenLayout(grid, channels=channels)
        return f"its states are no map of an image of {image[0]}x{image[1]}"
    if len(shape) != 3:
        return "its states are neither a sequence nor a map"
    if isinstance(first, str):
        return first
    grids = _coarser(first.grid, shape[1] - len(first.special))
    if len(grids) != 1:
        return (
            f"its {shape[1]} tokens, {len(first.special)} of them special, are not {first.grid[0]}x{first.grid[1]} "
            "made coarser by a stride"
        )
    return TokenLayout(grids.pop(), first.special)


def _coarser(grid: Grid, size: int) -> set[Grid]:
    """The grids of `size` places that a stride, with padding or cut edges, makes of a grid."""
    strides = range(1, max(grid) + 1)
    padded = {tuple(-(-side // stride) for side in grid) for stride in strides}
    cut = {tuple(side // stride for side in grid) for stride in strides}
    return {one for one in padded | cut if math.prod(one) == size}
