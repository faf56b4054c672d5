"""From the student's places on the image to the teacher's: `Bridge`, `Geometry`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.utils import logging

from ..pairing.blocks import BlockMap
from ..pairing.compatibility import block_shapes
from ..routing.dummy_inputs import dummy_inputs, image_size
from ..routing.layers import LayerStack
from .token_layout import Grid, TokenLayout, token_layouts

logger = logging.get_logger(__name__)

IMAGES = "pixel_values"


def resample(tokens: torch.Tensor, source: Grid, target: Grid) -> torch.Tensor:
    """Resize a grid of tokens as an image is resized: bilinear, antialiased.

    Args:
        tokens: (B, h * w, D), row by row.
        source: h and w.
        target: Those of the result; equal ones return the tokens as they are.

    Example:
        ```python
        >>> import torch
        >>> from hf_blockkd.connectors.geometry import resample
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
        >>> from hf_blockkd.connectors.geometry import Bridge
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


class Geometry:
    """How the states of a student fit between the layers of its teacher, for images of any size.

    The student sees the images as they come. So does the teacher, unless its config names another `image_size` than the
    student's: then it sees them resized to that (bilinear, antialiased). Models whose input is no image must make the
    same number of tokens of it.

    Args:
        student: The student.
        student_stack: Its layers.
        teacher: The teacher.
        teacher_stack: Its layers.
        block_map: The cut of both.

    Attributes:
        widths: Widths of the student's states at all stones, and of the teacher's, which the connectors map.
        bridges: Stone -> bridge, for the images that were fitted last; those of texts need none.
        size: Height and width of those images, `None` for models of other inputs.

    Raises:
        ValueError: If the states do not fit; nothing is trained by then.

    Example:
        ```python
        >>> from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification
        >>> from hf_blockkd import BlockMap, find_layer_stack
        >>> from hf_blockkd.connectors.geometry import Geometry
        >>> student = ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]))
        >>> shape = dict(image_size=32, patch_size=8, hidden_size=32, num_attention_heads=2)
        >>> teacher = ViTForImageClassification(ViTConfig(num_hidden_layers=4, **shape))
        >>> stacks = find_layer_stack(student), find_layer_stack(teacher)
        >>> geometry = Geometry(student, stacks[0], teacher, stacks[1], BlockMap.even(2, 4, 2))
        >>> for stone, bridge in geometry.bridges.items():
        ...     print(stone, bridge)
        1 8x8 -> class + 4x4
        2 4x4 -> class + 4x4
        >>> geometry.widths
        ([8, 16], [32, 32])

        ```
    """

    def __init__(
        self,
        student: PreTrainedModel,
        student_stack: LayerStack,
        teacher: PreTrainedModel,
        teacher_stack: LayerStack,
        block_map: BlockMap,
    ) -> None:
        self.models = {
            "student": (student, student_stack, block_map.student),
            "teacher": (teacher, teacher_stack, block_map.teacher),
        }
        self.size: Grid | None = None
        self._dummies = {role: dummy_inputs(model, batch_size=1) for role, (model, *_) in self.models.items()}
        images = [dummy.get(IMAGES) for dummy in self._dummies.values()]
        if all(image is not None and image.ndim == 4 for image in images):
            _check_channels(student, teacher, *(image.shape[1] for image in images))
            self.size = image_size(student.config) or tuple(images[1].shape[-2:])
        states = self._states(self.size)
        self.widths = [ours.width for ours, _ in states], [theirs.width for _, theirs in states]
        self.bridges = self._bridges(states)
        self._known = {self.size: self.bridges}
        self._bridged: list[tuple[int, BridgedConnector, bool]] = []

    def bridge(self, connectors: nn.ModuleList, back: bool = False) -> nn.ModuleList:
        """The connectors with the bridges that they need, which follow the size of the images from then on.

        Args:
            connectors: One for each stone, from the first on.
            back: Whether they lead from the teacher's states to the student's.
        """
        connectors = list(connectors)
        for index, bridge in self.bridges.items():
            if bridge.is_needed and index <= len(connectors):
                connector = BridgedConnector(connectors[index - 1], bridge.reversed() if back else bridge)
                self._bridged.append((index, connector, back))
                connectors[index - 1] = connector
        return nn.ModuleList(connectors)

    def fit(self, inputs: Mapping[str, Any]) -> None:
        """Set the bridges for a batch, whose images may be of another size than those before.

        Raises:
            ValueError: If one is needed where none was at first.
        """
        images = inputs.get(IMAGES)
        if self.size is None or not isinstance(images, torch.Tensor) or tuple(images.shape[-2:]) == self.size:
            return
        size = tuple(images.shape[-2:])
        if size not in self._known:
            self._known[size] = self._bridges(self._states(size))
        bridges, bridged = self._known[size], {index for index, *_ in self._bridged}
        for index, bridge in bridges.items():
            if bridge.is_needed and index not in bridged:
                raise ValueError(
                    f"On images of {_words(size)}, unlike on those of {_words(self.size)}, states at stepping stone "
                    f"{index} have different layouts, {bridge}; resize all images to one size, and set `image_size` in "
                    "the student's config to it."
                )
        self.size, self.bridges = size, bridges
        for index, connector, back in self._bridged:
            connector.bridge = bridges[index].reversed() if back else bridges[index]

    @property
    def resized_to(self) -> Grid | None:
        """Size that all images are brought to for the teacher; `None` where it sees them as they come."""
        own, students = (image_size(self.models[role][0].config) for role in ("teacher", "student"))
        return None if self.size is None or own == students else own

    def for_teacher(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """A batch with its images as the teacher sees them."""
        if self.resized_to is None or IMAGES not in inputs:
            return inputs
        return {**inputs, IMAGES: resize(inputs[IMAGES], self.resized_to)}

    def _states(self, size: Grid | None) -> list[tuple[_States, _States]]:
        """What student and teacher have at each stone, found by running both."""
        sizes = {"student": size, "teacher": self.resized_to or size}
        if sizes["teacher"] != size:
            logger.warning_once(
                f"Images of {_words(size)} are resized to {_words(sizes['teacher'])} for the teacher "
                f"{type(self.models['teacher'][0]).__name__}, whose `image_size` that is; if it should see them as "
                "they are, set that field of its config."
            )
        found = []
        for role, (model, stack, ends) in self.models.items():
            inputs = self._dummies[role]
            if sizes[role] is not None:
                inputs = {**inputs, IMAGES: resize(inputs[IMAGES], sizes[role])}
            found.append(_run(model, stack, ends, inputs, sizes[role]))
        return list(zip(*found, strict=True))

    def _bridges(self, states: list[tuple[_States, _States]]) -> dict[int, Bridge]:
        """The bridges of all stones; where a layout is not known, none, which goes for sequences of one length.

        Raises:
            ValueError: If states of other shapes cannot be bridged.
        """
        bridges = {}
        names = [type(model).__name__ for model, *_ in self.models.values()]
        for index, (ours, theirs) in enumerate(states, start=1):
            if isinstance(ours.layout, TokenLayout) and isinstance(theirs.layout, TokenLayout):
                bridges[index] = Bridge(ours.layout, theirs.layout)
                continue
            # States that nothing is known of go over as they are, but a map does not have its width where it is mapped.
            is_map = ours.layout is not None and len(ours.shape) != 2
            if is_map or ours.shape[:-1] != theirs.shape[:-1]:
                layouts = zip(names, (ours.layout, theirs.layout), strict=True)
                reasons = "; ".join(f"{name}: {layout}" for name, layout in layouts if isinstance(layout, str))
                raise ValueError(
                    f"At stepping stone {index} the student {names[0]} has hidden states of shape {ours.shape} and the "
                    f"teacher {names[1]} of shape {theirs.shape} for one example, which cannot be matched"
                    f"{f' ({reasons})' if reasons else ''}; choose a student that makes as many tokens as the teacher."
                )
        return bridges


@dataclass(frozen=True)
class _States:
    """States of one example: their shape, and their layout or why it is not known; those of texts have none."""

    shape: tuple[int, ...]
    layout: TokenLayout | str | None = None

    @property
    def width(self) -> int:
        return (1, *self.shape)[self.layout.channels] if isinstance(self.layout, TokenLayout) else self.shape[-1]


def _run(
    model: PreTrainedModel, stack: LayerStack, ends: Sequence[int], inputs: Mapping[str, Any], size: Grid | None
) -> list[_States]:
    """What a model has at the ends of its blocks, on images of a size or, without one, on other inputs."""
    try:
        shapes = [tuple(shape) for shape in block_shapes(model, stack, ends, inputs)]
    except (RuntimeError, ValueError) as error:
        if size is None or size == image_size(model.config):
            raise
        raise ValueError(
            f"{type(model).__name__} does not run on images of {_words(size)} ({str(error).splitlines()[0]}); resize "
            f"them, or set `image_size` (it is {image_size(model.config)}) in a config of its own."
        ) from error
    if size is None:
        return [_States(shape) for shape in shapes]
    was_training = model.training
    model.eval()
    try:
        layouts = token_layouts(model, stack, ends, inputs)
    finally:
        model.train(was_training)
    return [_States(shape, layout) for shape, layout in zip(shapes, layouts, strict=True)]


def resize(images: torch.Tensor, size: Grid) -> torch.Tensor:
    """Images (B, C, H, W) in another size, bilinear and antialiased; in their own they stay as they are."""
    if tuple(images.shape[-2:]) == size:
        return images
    resized = F.interpolate(images.float(), size, mode="bilinear", antialias=True, align_corners=False)
    return resized.to(images.dtype)


def _check_channels(student: PreTrainedModel, teacher: PreTrainedModel, ours: int, theirs: int) -> None:
    if ours != theirs:
        raise ValueError(
            f"`num_channels` is {ours} for the student {type(student).__name__} and {theirs} for the teacher "
            f"{type(teacher).__name__}, but both see the same images; set both alike."
        )


def _words(size: Grid) -> str:
    return f"{size[0]}x{size[1]}"
