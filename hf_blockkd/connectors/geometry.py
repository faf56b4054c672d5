"""How the states of a student fit between the layers of its teacher, for images of any size: `Geometry`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.utils import logging

from ..models.classes import is_headless
from ..routing.dummy_inputs import dummy_inputs, image_size
from ..routing.entering import capture_states
from ..routing.forwards import in_eval_mode
from ..routing.layers import LayerStack
from ..routing.logits import main_outputs, without_the_rest
from .bridges import Bridge, BridgedConnector
from .token_layout import Grid, TokenLayout, token_layouts

logger = logging.get_logger(__name__)

IMAGES = "pixel_values"


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
        student_ends: Exclusive end layer of each of its blocks.
        teacher_ends: Likewise for the teacher.

    Attributes:
        widths: Widths of the student's states at all stones, and of the teacher's, which the connectors map.
        bridges: Stone -> bridge, for the images that were fitted last; those of texts need none.
        size: Height and width of those images, `None` for models of other inputs.
        logits_shapes: Shape of the logits of one example: of one dimension where an example has a row, of two where
            each token has one, and of three where these are maps; of models without a head, that of their last states.

    Raises:
        ValueError: If the states do not fit; nothing is trained by then.

    Example:
        ```python
        >>> from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification
        >>> from hf_blockkd import find_layer_stack
        >>> from hf_blockkd.connectors.geometry import Geometry
        >>> student = ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]))
        >>> shape = dict(image_size=32, patch_size=8, hidden_size=32, num_attention_heads=2)
        >>> teacher = ViTForImageClassification(ViTConfig(num_hidden_layers=4, **shape))
        >>> stacks = find_layer_stack(student), find_layer_stack(teacher)
        >>> geometry = Geometry(student, stacks[0], teacher, stacks[1], [1, 2], [2, 4])
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
        student_ends: Sequence[int],
        teacher_ends: Sequence[int],
    ) -> None:
        self.models = {
            "student": (student, student_stack, student_ends),
            "teacher": (teacher, teacher_stack, teacher_ends),
        }
        self.size: Grid | None = None
        self._dummies = {role: dummy_inputs(model, batch_size=1) for role, (model, *_) in self.models.items()}
        images = [dummy.get(IMAGES) for dummy in self._dummies.values()]
        if all(image is not None and image.ndim == 4 for image in images):
            _check_channels(student, teacher, *(image.shape[1] for image in images))
            if any(model.config.is_encoder_decoder for model in (student, teacher)):
                _check_image_sizes(student, teacher)  # the layers of a decoder read no image
            else:
                self.size = image_size(student.config) or tuple(images[1].shape[-2:])
        self.logits_shapes: dict[str, tuple[int, ...]] = {}
        states = self._states(self.size)
        self.widths = [ours.width for ours, _ in states], [theirs.width for _, theirs in states]
        self.bridges = self._bridges(states)
        self._known = {self.size: self.bridges}
        # Connector -> its stone, and whether it leads back; those that nobody has any more follow no images.
        self._bridged: WeakKeyDictionary[BridgedConnector, tuple[int, bool]] = WeakKeyDictionary()

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
                self._bridged[connector] = index, back
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
        bridges, bridged = self._known[size], {index for index, _ in self._bridged.values()}
        for index, bridge in bridges.items():
            if bridge.is_needed and index not in bridged:
                raise ValueError(
                    f"On images of {_words(size)}, unlike on those of {_words(self.size)}, states at stepping stone "
                    f"{index} have different layouts, {bridge}; resize all images to one size, and set `image_size` in "
                    "the student's config to it."
                )
        self.size, self.bridges = size, bridges
        for connector, (index, back) in self._bridged.items():
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
            one, self.logits_shapes[role] = _run(model, stack, ends, inputs, sizes[role])
            found.append(one)
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
) -> tuple[list[_States], tuple[int, ...]]:
    """What a model has at the ends of its blocks, on images of a size or, without one, on other inputs.

    Returns:
        The states, and the shape of one example's logits.
    """
    try:
        logits, states = _clean_pass(model, stack, ends, inputs)
    except (RuntimeError, ValueError) as error:
        if size is None or size == image_size(model.config):
            raise
        raise ValueError(
            f"{type(model).__name__} does not run on images of {_words(size)} ({str(error).splitlines()[0]}); resize "
            f"them, or set `image_size` (it is {image_size(model.config)}) in a config of its own."
        ) from error
    shapes = [tuple(states[end].shape[1:]) for end in ends]
    if size is None:
        return [_States(shape) for shape in shapes], tuple(logits.shape[1:])
    with in_eval_mode(model):
        layouts = token_layouts(model, stack, ends, inputs)
    return [_States(shape, layout) for shape, layout in zip(shapes, layouts, strict=True)], tuple(logits.shape[1:])


def block_shapes(
    model: PreTrainedModel, stack: LayerStack, ends: Sequence[int], inputs: Mapping[str, Any]
) -> list[torch.Size]:
    """Shape of one example's hidden states at the end of each block, e.g. (T, D), found by running a batch.

    Raises:
        ValueError: If the model returns neither logits nor states for it, or skips a layer.
    """
    _, states = _clean_pass(model, stack, ends, inputs)
    return [states[end].shape[1:] for end in ends]


def _clean_pass(
    model: PreTrainedModel, stack: LayerStack, ends: Sequence[int], inputs: Mapping[str, Any]
) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """The logits of a model, or what one without a head returns, and its states at the ends of its blocks."""
    with in_eval_mode(model), torch.no_grad(), capture_states(stack, ends) as states:
        # Models of linear attention alone cannot make the cache that their config asks for.
        outputs = model(**{**inputs, **without_the_rest(model)})
    logits, names = main_outputs(outputs)[0], list(outputs) if isinstance(outputs, Mapping) else []
    if is_headless(model):
        if logits.ndim not in (3, 4) or "last_hidden_state" not in names:
            raise ValueError(
                f"{type(model).__name__} has no head and returns {', '.join(names)}, but no states of positions that "
                "could be pooled; distil one of its encoders, or give it a head."
            )
    elif logits.ndim < 2 or not any(name.endswith("logits") for name in names):
        raise ValueError(
            f"{type(model).__name__} returns {', '.join(names)} but no logits; load it with an AutoModelFor... class "
            "that has a head."
        )
    skipped = [end for end in ends if end not in states]
    if skipped:
        raise ValueError(f"{type(model).__name__} does not call layer {skipped[0]} of {stack.path!r} in its forward.")
    return logits, states


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


def _check_image_sizes(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    sizes = [image_size(model.config) for model in (student, teacher)]
    if None not in sizes and sizes[0] != sizes[1]:
        raise ValueError(
            f"`image_size` is {sizes[0]} for the encoder of the student {type(student).__name__} and {sizes[1]} for "
            f"that of the teacher {type(teacher).__name__}, but both see the same images; set both alike."
        )


def _words(size: Grid) -> str:
    return f"{size[0]}x{size[1]}"
