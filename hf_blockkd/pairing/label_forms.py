"""Labels that have no row of logits each, of heads whose task loss is their model's own: `LabelForm`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCTCLoss, ForObjectDetectionLoss, ForSemanticSegmentationLoss

from ..losses.rows import IGNORED


@dataclass(frozen=True)
class LabelForm:
    """Labels of another form than rows of logits: what is distilled are the rows, and the task loss is the model's own.

    Attributes:
        words: What labels are, for messages.
        fits: Whether some labels have the form.
        classes: The class indices that they hold, flat.
        items: What the model's own loss is a mean over, as booleans: labels, or examples that have some.
        missing: Labels of so many examples that have none.
        classes_dim: Dimension of the logits that holds the classes.

    Example:
        ```python
        >>> import torch
        >>> from hf_blockkd.pairing.label_forms import TRANSCRIPTS
        >>> labels = torch.tensor([[3, 4, -100], [-100, -100, -100]])
        >>> TRANSCRIPTS.fits(labels), TRANSCRIPTS.items(labels).tolist()
        (True, [True, False])

        ```
    """

    words: str
    fits: Callable[[Any], bool]
    classes: Callable[[Any], torch.Tensor]
    items: Callable[[Any], torch.Tensor]
    missing: Callable[[int], Any]
    classes_dim: int = -1


def _are_whole(labels: Any, ndim: int) -> bool:
    is_tensor = isinstance(labels, torch.Tensor) and labels.ndim == ndim
    return is_tensor and not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)


def _are_objects(labels: Any) -> bool:
    are_some = isinstance(labels, (list, tuple)) and any(one is not None for one in labels)
    is_object = (
        one is None or (isinstance(one, Mapping) and {"class_labels", "boxes"} <= one.keys()) for one in labels
    )
    return all(is_object) if are_some else isinstance(labels, list)


TRANSCRIPTS = LabelForm(
    words="class indices (whole numbers) of shape (batch, length of a text), -100 where a text has ended",
    fits=lambda labels: _are_whole(labels, 2),
    classes=torch.flatten,
    items=lambda labels: (labels != IGNORED).any(1),
    missing=lambda count: torch.full((count, 1), IGNORED),
)
"""Of CTC: a text for each sound, which has more frames than that."""
PIXELS = LabelForm(
    words="class indices (whole numbers) of shape (batch, height, width)",
    fits=lambda labels: _are_whole(labels, 3),
    classes=torch.flatten,
    items=lambda labels: labels != IGNORED,
    missing=lambda count: torch.full((count, 1, 1), IGNORED),
    classes_dim=1,
)
"""Of semantic segmentation: a class for each pixel of the image, of which the logits are a coarser map."""
OBJECTS = LabelForm(
    words="a list with one dictionary of `class_labels` and `boxes` for each image",
    fits=_are_objects,
    classes=lambda labels: torch.cat([one["class_labels"].flatten() for one in labels if one is not None] or [_NONE]),
    items=lambda labels: torch.tensor([one is not None for one in labels]),
    missing=lambda count: [None] * count,
)
"""Of detection with queries: some objects for each image, matched to rows by the model's own loss."""
_NONE = torch.empty(0, dtype=torch.long)

FORMS: dict[Callable, LabelForm] = {
    ForCTCLoss: TRANSCRIPTS,
    ForSemanticSegmentationLoss: PIXELS,
    ForObjectDetectionLoss: OBJECTS,
}
"""transformers' own loss -> the labels that it takes. Detectors with another loss choose their queries by the image."""


def ignored_label(model: PreTrainedModel) -> int:
    """What the model's own loss leaves out: 255 in most maps of classes, -100 elsewhere."""
    names = ("semantic_loss_ignore_index", "loss_ignore_index")
    return next((getattr(model.config, name) for name in names if hasattr(model.config, name)), IGNORED)
