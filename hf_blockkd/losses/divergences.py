"""Divergences between two sets of logits, row by row. Every path of the package goes through `divergence`."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "dkd")

LEAST_LOGIT = -1e30
"""What stands for a class that is left out; no softmax gives it a share that float32 could tell from 0."""

LEFT_OUT = -1e8
"""Logits from here down stand for classes that a model leaves out, whatever number it takes for that."""

DKD_TARGET_WEIGHT = 1.0
"""Weight of the target-class part of DKD (alpha in Zhao et al., 2022; 1.0 in all their settings)."""
DKD_NON_TARGET_WEIGHT = 8.0
"""Weight of the non-target part of DKD (beta in Zhao et al., 2022; 8.0 in most of their CIFAR-100 settings)."""


def divergence(
    logits: torch.Tensor,
    target_logits: torch.Tensor,
    name: str = "forward_kl",
    temperature: float = 1.0,
    standardize: bool = False,
    labels: torch.Tensor | None = None,
    beta: float = 0.5,
) -> torch.Tensor:
    """Divergence of each row of `logits` from the same row of `target_logits`, times `temperature ** 2`.

    Args:
        logits: (N, C), the distribution that learns. Computed in float32 whatever the dtype.
        target_logits: (N, C), the distribution to match. Not detached here.
        name: One of `DIVERGENCES`.
        temperature: Divides both logits before the softmax. The square that multiplies the result keeps the size of
            the gradient independent of it (Hinton et al., 2015, section 2).
        standardize: Replace both logits by their z-scores over the classes first (`standardize_logits`).
        labels: (N,) class indices; only `"dkd"` needs them.
        beta: Of `"jsd"` alone: see `jensen_shannon`.

    Returns:
        (N,) float32, in nats times `temperature ** 2`. Classes that both leave out, with logits of -inf or of the least
        number of their dtype, add nothing; a row is infinite where the learner leaves out what the target does not.

    Raises:
        ValueError: If `name` is unknown, the shapes differ, or `"dkd"` comes without labels.

    Example:
        ```python
        >>> import torch
        >>> from hf_blockkd.losses.divergences import divergence
        >>> p, q = torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.1, 0.9]]).log()
        >>> round(divergence(q, p).item(), 5)
        1.75778

        ```
    """
    if logits.shape != target_logits.shape:
        raise ValueError(
            f"Logits of shape {tuple(logits.shape)} cannot be compared with target logits of shape "
            f"{tuple(target_logits.shape)}; both must be (rows, classes)."
        )
    logits, target_logits = logits.float(), target_logits.float()
    if standardize:
        # What either side leaves out is no measure of the others' spread.
        left_out = torch.minimum(logits, target_logits) <= LEFT_OUT
        logits, target_logits = (standardize_logits(side, left_out) for side in (logits, target_logits))
    # A class that both leave out (-inf, or the least number of a dtype) adds nothing: 0 times a finite difference.
    logits, target_logits = (side.div(temperature).clamp(min=LEAST_LOGIT) for side in (logits, target_logits))
    if name == "forward_kl":
        rows = forward_kl(logits, target_logits)
    elif name == "reverse_kl":
        rows = forward_kl(target_logits, logits)
    elif name == "jsd":
        rows = jensen_shannon(logits, target_logits, beta)
    elif name == "dkd":
        if labels is None:
            raise ValueError("divergence='dkd' splits the classes by the label, so it needs `labels`.")
        rows = decoupled_kd(logits, target_logits, labels)
    else:
        raise ValueError(f"Unknown divergence {name!r}; choose one of {', '.join(map(repr, DIVERGENCES))}.")
    # What only one of the two leaves out, though the other does not, is infinitely far away.
    return rows.masked_fill(rows > -LEAST_LOGIT * torch.finfo(rows.dtype).eps, float("inf")) * temperature**2


def forward_kl(logits: torch.Tensor, target_logits: torch.Tensor) -> torch.Tensor:
    """KL(target || learner) of each row, in nats: the divergence of Hinton et al. (2015), arXiv 1503.02531.

    Args:
        logits: (N, C), the learner. With the two arguments swapped, this is the reverse KL.
        target_logits: (N, C).

    Returns:
        (N,), non-negative.

    Example:
        ```python
        >>> import torch
        >>> from hf_blockkd.losses.divergences import forward_kl
        >>> forward_kl(torch.zeros(1, 4), torch.zeros(1, 4)).item()
        0.0

        ```
    """
    return F.kl_div(logits.log_softmax(-1), target_logits.log_softmax(-1), reduction="none", log_target=True).sum(-1)


def jensen_shannon(logits: torch.Tensor, target_logits: torch.Tensor, beta: float = 0.5) -> torch.Tensor:
    """Generalised Jensen-Shannon divergence of each row (Agarwal et al., "GKD", 2024, arXiv 2306.13649, eq. 1).

    With P the target, Q the learner and M = beta P + (1 - beta) Q, it is beta KL(P || M) + (1 - beta) KL(Q || M). Near
    both ends it vanishes, like beta KL(P || Q) at 0 and like (1 - beta) KL(Q || P) at 1; at the ends themselves it is
    these KLs undiminished, which is the convention of TRL's `GKDConfig.beta`.

    Args:
        logits: (N, C).
        target_logits: (N, C).
        beta: 0 is the forward KL, 1 the reverse KL, and 0.5 the mean of both KLs to the mean of both (Lin, 1991, eq.
            4.1).

    Returns:
        (N,), for a `beta` of 0.5 between 0 and ln 2 nats and symmetric in the two.

    Example:
        ```python
        >>> import torch
        >>> from hf_blockkd.losses.divergences import jensen_shannon
        >>> far_apart = jensen_shannon(torch.tensor([[100.0, 0.0]]), torch.tensor([[0.0, 100.0]]))
        >>> round(far_apart.item(), 4)
        0.6931

        ```
    """
    if beta in (0, 1):
        return forward_kl(logits, target_logits) if beta == 0 else forward_kl(target_logits, logits)
    learner, target = logits.log_softmax(-1), target_logits.log_softmax(-1)
    # Relative to the even mixture, whose shares are 1 each: then the logarithms are 0, and a `beta` of 0.5 is exact.
    shares = math.log(2 * (1 - beta)), math.log(2 * beta)
    mixture = torch.logaddexp(learner + shares[0], target + shares[1]) - math.log(2)
    to_mixture = [F.kl_div(mixture, side, reduction="none", log_target=True).sum(-1) for side in (learner, target)]
    return (1 - beta) * to_mixture[0] + beta * to_mixture[1]


def decoupled_kd(logits: torch.Tensor, target_logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Decoupled knowledge distillation (Zhao et al., CVPR 2022, arXiv 2203.08679, eq. 7).

    The KL over "label or not" and the KL among the other classes get weights of their own, where plain KL weights the
    latter by `1 - p_target(label)`.

    Args:
        logits: (N, C), C at least 2.
        target_logits: (N, C).
        labels: (N,) class indices in [0, C).

    Returns:
        (N,), `DKD_TARGET_WEIGHT * TCKD + DKD_NON_TARGET_WEIGHT * NCKD`.

    Example:
        ```python
        >>> import torch
        >>> from hf_blockkd.losses.divergences import decoupled_kd
        >>> decoupled_kd(torch.zeros(1, 3), torch.zeros(1, 3), torch.tensor([2])).item()
        0.0

        ```
    """
    is_label = F.one_hot(labels, logits.shape[-1]).bool()

    def split(side: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        others = side.masked_fill(is_label, float("-inf"))
        binary = torch.stack([side[is_label], others.logsumexp(-1)], dim=-1)
        # The label's own place holds the same finite number on both sides, so that its term is 0 and not inf - inf.
        return binary, others.log_softmax(-1).masked_fill(is_label, 0.0)

    binary, others = split(logits)
    target_binary, target_others = split(target_logits)
    non_target = (target_others.exp() * (target_others - others)).sum(-1)
    return DKD_TARGET_WEIGHT * forward_kl(binary, target_binary) + DKD_NON_TARGET_WEIGHT * non_target


def standardize_logits(logits: torch.Tensor, left_out: torch.Tensor | None = None) -> torch.Tensor:
    """Z-score of each row over the classes (Sun et al., "Logit Standardization", CVPR 2024, arXiv 2403.01427, eq. 9).

    It frees the learner from matching the size of the target's logits; the temperature then sets the sharpness alone.

    Args:
        logits: (N, C), C at least 2.
        left_out: (N, C), classes that do not count and stay as they are; default: none.

    Returns:
        (N, C) with mean 0 and standard deviation 1 in each row; a row of equal logits becomes zeros.

    Example:
        ```python
        >>> import torch
        >>> from hf_blockkd.losses.divergences import standardize_logits
        >>> [round(score, 4) for score in standardize_logits(torch.tensor([[1.0, 2.0, 3.0]]))[0].tolist()]
        [-1.0, 0.0, 1.0]

        ```
    """
    if left_out is None or not left_out.any():
        return (logits - logits.mean(-1, keepdim=True)) / (logits.std(-1, keepdim=True) + 1e-7)
    kept = (~left_out).sum(-1, keepdim=True)
    mean = logits.masked_fill(left_out, 0.0).sum(-1, keepdim=True) / kept
    centred = (logits - mean).masked_fill(left_out, 0.0)
    variance = centred.square().sum(-1, keepdim=True) / (kept - 1).clamp(min=1)
    std = variance.clamp(min=torch.finfo(variance.dtype).tiny).sqrt()
    return torch.where(left_out, logits, centred / (std + 1e-7))
