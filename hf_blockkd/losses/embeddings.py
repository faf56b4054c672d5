"""Losses between two sets of vectors, one for each example: `embedding_loss`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F


def _cosine(vectors: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return 1 - F.cosine_similarity(vectors, targets, dim=-1)


def _squared_error(vectors: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    sizes = targets.square().sum(-1).clamp(min=torch.finfo(targets.dtype).tiny)
    return (vectors - targets).square().sum(-1) / sizes


def _similarity(vectors: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    ours, theirs = (F.normalize(one, dim=-1) for one in (vectors, targets))
    with torch.autocast(ours.device.type, enabled=False):  # which would round the cosines
        errors = (ours @ ours.T - theirs @ theirs.T).square()
    return (errors.sum(-1) - errors.diagonal()) / max(len(ours) - 1, 1)


EMBEDDING_LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "cosine": _cosine,
    "squared_error": _squared_error,
    "similarity": _similarity,
}
"""How vectors (N, D) and their targets become losses (N,), in units that do not depend on how long targets are."""


def embedding_loss(vectors: torch.Tensor, targets: torch.Tensor, name: str = "cosine") -> torch.Tensor:
    """How far each vector is from its target.

    Args:
        vectors: (N, D), those that learn. Computed in float32 whatever the dtype.
        targets: (N, D); for `"similarity"`, of any width. Not detached here.
        name: `"cosine"`, 1 less the cosine between both; `"squared_error"`, the squared length of the difference as a
            share of the target's (Reimers and Gurevych, 2020, arXiv 2004.09813, but for that share); `"similarity"`,
            the mean squared difference between the cosines that a vector has with the other vectors of the batch, and
            those that its target has with theirs (Tung and Mori, 2019, arXiv 1907.09682, with cosines in both places);
            or a sum such as `"cosine+similarity"`.

    Returns:
        (N,) float32.

    Raises:
        ValueError: If `name` is unknown.

    Example:
        ```python
        >>> import torch
        >>> from hf_blockkd.losses.embeddings import embedding_loss
        >>> vectors, targets = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
        >>> [embedding_loss(vectors, targets, name).tolist() for name in ("cosine", "squared_error", "similarity")]
        [[0.0, 1.0], [1.0, 2.0], [1.0, 1.0]]

        ```
    """
    vectors, targets = vectors.float(), targets.float()
    return sum(EMBEDDING_LOSSES[one](vectors, targets) for one in embedding_losses(name))


def embedding_losses(name: str) -> list[str]:
    """The names in `"cosine"` or in a sum such as `"cosine+similarity"`.

    Raises:
        ValueError: If one is unknown, or named twice.
    """
    names = name.split("+")
    if not set(names) <= EMBEDDING_LOSSES.keys() or len(set(names)) < len(names):
        known = ", ".join(map(repr, EMBEDDING_LOSSES))
        raise ValueError(f"`embedding_loss` is {name!r}; choose one of {known}, or a sum of different ones.")
    return names
