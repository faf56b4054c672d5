"""The likeliest tokens of a teacher, as a target that is small enough to be kept: `TopK`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

CAPTURED_IDS, CAPTURED_LOG_PROBS = "captured_ids", "captured_log_probs"
"""Entries of a batch of texts: (B, T, k) and (B, T, k + 1), a `TopK` of which position t is about token t."""


@dataclass(frozen=True)
class TopK:
    """For each row, the k likeliest classes, and the mass of all the others as one more.

    Attributes:
        log_probs: (N, k + 1), float; in the last column the log of what the k classes leave.
        indices: (N, k), the classes, the first ones of a row; -1 where there are fewer, whose log-probability is -inf.
        num_classes: Number of classes that they were chosen from; a learner with more is cut to these.
    """

    log_probs: torch.Tensor
    indices: torch.Tensor
    num_classes: int

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, rows: Any) -> TopK:
        return TopK(self.log_probs[rows], self.indices[rows], self.num_classes)

    @property
    def nbytes(self) -> int:
        return self.log_probs.nbytes + self.indices.nbytes

    def bucket(self, logits: torch.Tensor, temperature: float) -> torch.Tensor:
        """The learner's log-probabilities of the same k + 1 outcomes.

        Args:
            logits: (N, C), C at least `num_classes`.
            temperature: That of the target.

        Returns:
            (N, k + 1), float32. To compare it with `log_probs` instead of all classes bounds every f-divergence from
            below: outcomes are merged, and merging loses no more than the differences inside the rest.
        """
        log_probs = (logits[..., : self.num_classes].float() / temperature).log_softmax(-1)
        # Where there are fewer, the first one once more, which is taken out of the rest already.
        is_none = self.indices < 0
        indices = torch.where(is_none, self.indices[..., :1], self.indices).long()
        rest = log_probs.scatter(-1, indices, float("-inf")).logsumexp(-1, keepdim=True)
        return torch.cat([log_probs.gather(-1, indices).masked_fill(is_none, float("-inf")), rest], dim=-1)


def top_k(logits: torch.Tensor, k: int, temperature: float, num_classes: int) -> TopK:
    """Keep the k likeliest of the first `num_classes` classes.

    Args:
        logits: (N, C).
        k: Less than `num_classes`.
        temperature: Divides the logits.
        num_classes: At most C.

    Example:
        ```python
        >>> import torch
        >>> from hf_blockkd.losses.top_k import top_k
        >>> target = top_k(torch.tensor([[0.1, 0.2, 0.7]]).log(), k=1, temperature=1.0, num_classes=3)
        >>> [round(p, 4) for p in target.log_probs.exp()[0].tolist()], target.indices.tolist()
        ([0.7, 0.3], [[2]])

        ```
    """
    log_probs = (logits[..., :num_classes].float() / temperature).log_softmax(-1)
    kept, indices = log_probs.topk(k, dim=-1)
    rest = log_probs.scatter(-1, indices, float("-inf")).logsumexp(-1, keepdim=True)
    return TopK(torch.cat([kept, rest], dim=-1), indices, num_classes)
