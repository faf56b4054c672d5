"""What is compared of two models without heads, one vector for each example: `Embeddings`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..connectors.maps import connect, make_connectors
from ..losses.embeddings import embedding_losses
from ..models.pooling import Pooling
from ..routing.logits import main_outputs
from .positions import position_mask


class Embeddings:
    """The pooled states of a student and its teacher.

    Each is pooled as its folder of sentence-transformers says (attribute `pooling`, from `load_model`); a student
    without one as its teacher, whose vectors also say whether both are normalised.

    Args:
        student: The student.
        teacher: The teacher.
        shapes: `"student"` and `"teacher"` -> the shape of what they return, (T, D) or (D, H, W) for one example.
        pooling: Where no folder says it; default: the mean.
        loss: As `embedding_loss` in the configuration, which says whether vectors of unequal widths need a connector.
        connector: Kind of that.
        seed: It is drawn from it.

    Attributes:
        models: `"student"` and `"teacher"` -> the models.
        poolings: Likewise, how their states become vectors.
        connector: From the student's vector to the teacher's, `None` where none is needed. No student is saved with it.

    Raises:
        ValueError: If the folder of a model says another pooling than `pooling`.

    Example:
        ```python
        >>> import torch
        >>> from transformers import BertConfig, BertModel
        >>> from hf_blockkd.pairing.embeddings import Embeddings
        >>> fields = dict(num_hidden_layers=1, num_attention_heads=1, vocab_size=9)
        >>> student, teacher = (BertModel(BertConfig(hidden_size=width, **fields)) for width in (8, 16))
        >>> embeddings = Embeddings(student, teacher, {"student": (3, 8), "teacher": (3, 16)})
        >>> batch = {"input_ids": torch.tensor([[1, 2, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])}
        >>> outputs = student(**batch)
        >>> embeddings.vectors("student", outputs, batch).shape  # as the teacher has them
        torch.Size([1, 16])
        >>> torch.allclose(
        ...     embeddings.vectors("student", outputs, batch, connected=False),
        ...     outputs.last_hidden_state[:, :2].mean(1),
        ... )
        True

        ```
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        shapes: Mapping[str, tuple[int, ...]],
        pooling: str | None = None,
        loss: str = "cosine",
        connector: str = "auto",
        seed: int = 42,
    ) -> None:
        self.models = {"student": student, "teacher": teacher}
        own = {role: _own_pooling(model, pooling) for role, model in self.models.items()}
        theirs = own["teacher"] or Pooling((pooling or "mean",))
        ours = replace(own["student"] or theirs, normalize=theirs.normalize)
        self.poolings = {"student": ours, "teacher": theirs}
        widths = {
            role: len(one.modes) * shapes[role][0 if len(shapes[role]) == 3 else -1]
            for role, one in self.poolings.items()
        }
        self.connector: nn.Module | None = None
        if widths["student"] != widths["teacher"] and embedding_losses(loss) != ["similarity"]:
            cut = getattr(student, "cut", None)
            channels = None if cut is None or len(ours.modes) > 1 else cut.channels
            dtype = torch.promote_types(student.dtype, torch.float32)
            made = make_connectors(connector, [widths["student"]], [widths["teacher"]], seed, channels)
            self.connector = made[0].to(dtype)

    def vectors(
        self, role: str, outputs: ModelOutput | tuple[Any, ...], inputs: Mapping[str, Any], connected: bool = True
    ) -> torch.Tensor:
        """The vectors of a batch, at least in float32.

        Args:
            role: The model whose layers the forward ended in, `"student"` or `"teacher"`.
            outputs: What it returned.
            inputs: What it got.
            connected: Whether those of the student are brought to the teacher's width, where that is another.

        Returns:
            (B, D).
        """
        states = main_outputs(outputs)[0]
        mask = position_mask(self.models[role], "", inputs, states) if states.ndim == 3 else None
        pooling = self.poolings[role]
        vectors = pooling.pool(states, mask)
        if connected and role == "student" and self.connector is not None:
            vectors = connect(self.connector, vectors)
        return pooling.finish(vectors)


def _own_pooling(model: PreTrainedModel, asked: str | None) -> Pooling | None:
    own = getattr(model, "pooling", None)
    if not isinstance(own, Pooling):
        return None
    if asked is not None and own.modes != (asked,):
        raise ValueError(
            f"`pooling` is {asked!r}, but the folder of {type(model).__name__} says {'+'.join(own.modes)!r}; leave it "
            "out, or correct `1_Pooling/config.json` there."
        )
    return own
