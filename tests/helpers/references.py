"""The mathematics of the losses once more, in float64 numpy, as the papers write it; nothing here calls torch."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL(p || q) over the last dimension, in nats."""
    return (p * np.log(p / q)).sum(-1)


def z_scores(logits: np.ndarray) -> np.ndarray:
    return (logits - logits.mean(-1, keepdims=True)) / logits.std(-1, ddof=1, keepdims=True)


def decoupled_kd(student: np.ndarray, teacher: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Zhao et al. (arXiv 2203.08679), eq. 7, with alpha 1 and beta 8, written from its equations 1 to 5."""
    values = []
    for p_student, p_teacher, label in zip(softmax(student), softmax(teacher), labels, strict=True):
        binary = [np.array([p[label], 1 - p[label]]) for p in (p_student, p_teacher)]
        others = [np.delete(p, label) / (1 - p[label]) for p in (p_student, p_teacher)]
        values.append(1.0 * kl(binary[1], binary[0]) + 8.0 * kl(others[1], others[0]))
    return np.array(values)


def divergence(
    student: np.ndarray,
    teacher: np.ndarray,
    name: str = "forward_kl",
    temperature: float = 1.0,
    standardize: bool = False,
    labels: np.ndarray | None = None,
) -> np.ndarray:
    if standardize:
        student, teacher = z_scores(student), z_scores(teacher)
    student, teacher = student / temperature, teacher / temperature
    p, q = softmax(teacher), softmax(student)
    rows = {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "jsd": lambda: 0.5 * kl(p, (p + q) / 2) + 0.5 * kl(q, (p + q) / 2),
        "dkd": lambda: decoupled_kd(student, teacher, labels),
    }[name]()
    return rows * temperature**2


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return -np.log(softmax(logits)[np.arange(len(labels)), labels])


def gradient(function: Callable[[np.ndarray], float], at: np.ndarray, step: float = 1e-5) -> np.ndarray:
    """Central differences of a scalar function, one entry after the other; the error is about step squared."""
    result = np.zeros_like(at)
    for index in np.ndindex(at.shape):
        moved = np.zeros_like(at)
        moved[index] = step
        result[index] = (function(at + moved) - function(at - moved)) / (2 * step)
    return result
