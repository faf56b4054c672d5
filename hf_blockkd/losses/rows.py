"""The losses of one learner: task loss and distillation loss over the rows of a batch."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from .divergences import divergence
from .top_k import TopK

IGNORED = -100
"""Label of a row that takes no part in any loss, as everywhere in transformers."""


@dataclass
class RowLosses:
    """Task and distillation losses over the rows of a batch, for one problem type and one set of options.

    A row is whatever has one label of its own: an example, a token, or one class of one example in multi-label
    problems. Rows whose class index is -100 are left out. Both losses are *sums* over rows divided by `num_items`, so
    that micro-batches and ranks add up to the loss of the whole batch however it was split. Of several label sets, such
    as the starts and the ends of answers, each has a mean of its own, and the mean of those is the loss.

    Args:
        problem_type: `"single_label_classification"`, `"multi_label_classification"` or `"regression"`.
        labels: Labels in the shape that `Task.labels` gives them.
        num_items: Number of rows that the sums are divided by, of each label set where there are several; `None` means
            those of this batch.
        divergence: See `divergence`. In multi-label problems it compares, for each class, the
            two-way distribution "has it or not"; in regression it is the squared error and takes no options.
        temperature: See there.
        standardize: See there.
        label_smoothing: As in `torch.nn.functional.cross_entropy`, for the task loss of single-label problems.
        num_examples: Number of examples in the batch; default: the length of `labels`, which question answering has
            twice, for start and end.

    Attributes:
        num_items: The number of rows in all.
        weights: Of each row that counts, its share in the loss relative to that in a mean over all rows; `None` where
            all have the same.

    Raises:
        ValueError: For an unknown problem type, and for DKD or standardised logits in a multi-label problem, where
            two-way distributions leave nothing to decouple or to standardise.

    Example:
        ```python
        >>> import torch
        >>> from hf_blockkd.losses.rows import RowLosses
        >>> losses = RowLosses("single_label_classification", labels=torch.tensor([0, 1]))
        >>> round(losses.task(torch.zeros(2, 4)).item(), 4), losses.distill(torch.zeros(2, 4), torch.zeros(2, 4)).item()
        (1.3863, 0.0)

        ```
    """

    problem_type: str
    labels: torch.Tensor
    num_items: torch.Tensor | float | None = None
    divergence: str = "forward_kl"
    temperature: float = 1.0
    standardize: bool = False
    label_smoothing: float = 0.0
    num_examples: int | None = None

    def __post_init__(self) -> None:
        if self.problem_type not in ("single_label_classification", "multi_label_classification", "regression"):
            raise ValueError(f"Unknown problem type {self.problem_type!r}.")
        if self.problem_type == "multi_label_classification" and (self.divergence == "dkd" or self.standardize):
            option = "divergence='dkd'" if self.divergence == "dkd" else "standardize_logits=True"
            raise ValueError(
                f"{option} has no meaning for multi-label problems; use another divergence of plain logits."
            )
        self.num_examples = len(self.labels) if self.num_examples is None else self.num_examples
        # Where the rows of each example stand before any is left out: (label sets, examples, rows of one label set).
        self._grid = (-1, self.num_examples, self.labels[0].numel() if len(self.labels) else 1)
        self.labels = self.labels.flatten()
        self._num_rows = len(self.labels)
        self._kept = None
        if self.problem_type == "single_label_classification":
            self._kept = (self.labels != IGNORED).nonzero().squeeze(-1)
            self.labels = self.labels[self._kept]
        self._weigh()

    def _weigh(self) -> None:
        """Make one number of those of the label sets, and of what is left of them the weights of rows."""
        self.weights = None
        num_sets = self._num_rows // max(self._grid[1] * self._grid[2], 1)
        if self.num_items is None and num_sets < 2:
            self.num_items = max(len(self.labels), 1)
        if self.num_items is None or getattr(self.num_items, "ndim", 0):
            label_set = self._places // (self._num_rows // num_sets)
            counts = label_set.bincount(minlength=num_sets) if self.num_items is None else self.num_items
            counts = counts.clamp(min=1)
            self.num_items = counts.sum()
            self.weights = (self.num_items / (num_sets * counts))[label_set]

    @property
    def _places(self) -> torch.Tensor:
        """Where the rows that count stand among all."""
        return torch.arange(self._num_rows, device=self.labels.device) if self._kept is None else self._kept

    @property
    def _reduction(self) -> str:
        """What torch's losses are asked for, which sum what has no weights without a tensor of it."""
        return "sum" if self.weights is None else "none"

    def _mean(self, losses: torch.Tensor) -> torch.Tensor:
        """The part of a loss that rows make of it, from what each loses, or its sum where they have no weights."""
        return (losses if self.weights is None else losses * self.weights).sum() / self.num_items

    def rows(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits of the rows that count: (N, C), or (N,) in multi-label and regression problems."""
        if self._kept is None:
            return logits.flatten()
        rows = logits.flatten(0, -2)
        return rows if len(self._kept) == len(rows) else rows[self._kept]

    @property
    def magnitude(self) -> torch.Tensor:
        """The largest power of two up to `num_items`: multiplying by it, and dividing again, changes no bit."""
        return torch.as_tensor(self.num_items, dtype=torch.float32).clamp(min=1.0).log2().floor().exp2()

    def __len__(self) -> int:
        """Number of rows that count."""
        return len(self.labels)

    def examples(self, wrong: torch.Tensor) -> list[int]:
        """Indices of the examples that hold the true entries of `wrong`, which has the shape of rows."""
        rows = (wrong.flatten(1).any(1) if wrong.ndim > 1 else wrong).nonzero().flatten()
        flat = rows if self._kept is None else self._kept[rows]
        return (flat // self._grid[2] % self.num_examples).unique().tolist()

    def part(self, rows: slice | torch.Tensor) -> RowLosses:
        """The losses over some of the rows that count, still divided by the number of all."""
        part = copy.copy(self)
        part.labels = self.labels[rows]
        part.weights = None if self.weights is None else self.weights[rows]
        return part

    def of_examples(self, examples: torch.Tensor) -> tuple[RowLosses, torch.Tensor]:
        """The losses over some examples, for logits of those alone.

        Args:
            examples: Their rising indices in the batch.

        Returns:
            The losses, still divided by the number of all rows, and the rising indices of their rows among `rows`.
        """
        flat = torch.arange(self._num_rows, device=self.labels.device)
        flat = flat.view(self._grid)[:, examples].flatten()
        rows, kept = flat, None
        if self._kept is not None:
            place = torch.full((self._num_rows,), -1, device=flat.device)
            place[self._kept] = torch.arange(len(self._kept), device=flat.device)
            kept = (place[flat] >= 0).nonzero().squeeze(-1)
            rows = place[flat][kept]
        part = self.part(rows)
        part.num_examples, part._kept, part._num_rows = len(examples), kept, len(flat)
        part._grid = (-1, len(examples), self._grid[2])
        return part, rows

    def task(self, rows: torch.Tensor) -> torch.Tensor:
        """Cross-entropy, binary cross-entropy or squared error to the labels, as the model's own loss would have it.

        Args:
            rows: From `rows`.

        Returns:
            A scalar, in nats (squared units of the labels for regression).
        """
        rows = rows.float()
        if self.problem_type == "single_label_classification":
            options = {"reduction": self._reduction, "label_smoothing": self.label_smoothing}
            return self._mean(F.cross_entropy(rows, self.labels.long(), **options))
        if self.problem_type == "multi_label_classification":
            return self._mean(F.binary_cross_entropy_with_logits(rows, self.labels.float(), reduction=self._reduction))
        return self._mean(F.mse_loss(rows, self.labels.float(), reduction=self._reduction))

    def counts(self) -> list[int]:
        """Number of rows that count of each example, where an example's rows stand together."""
        return (self._places // self._grid[2]).bincount(minlength=self.num_examples).tolist()

    def labels_of_examples(self) -> torch.Tensor:
        """Number of labels that count of each example, as much as they weigh: (B,) float."""
        examples = self._places // self._grid[2] % self.num_examples
        counts = torch.zeros(self.num_examples, device=examples.device)
        weights = torch.ones_like(examples, dtype=counts.dtype) if self.weights is None else self.weights
        return counts.index_add_(0, examples, weights)

    def distill(self, rows: torch.Tensor, target_rows: torch.Tensor | TopK) -> torch.Tensor:
        """Divergence from the target's rows, a scalar; no gradient goes to the target."""
        if isinstance(target_rows, TopK):
            learner = target_rows.bucket(rows, self.temperature)
            return self._mean(divergence(learner, target_rows.log_probs, self.divergence) * self.temperature**2)
        # Vocabularies that differ by padding are compared on what they have in common.
        common = min(rows.shape[-1], target_rows.shape[-1])
        rows, target_rows = rows[..., :common], target_rows[..., :common].detach()
        if self.problem_type == "regression":
            return self._mean(F.mse_loss(rows.float(), target_rows.float(), reduction=self._reduction))
        if self.problem_type == "multi_label_classification":
            rows, target_rows = _two_way(rows), _two_way(target_rows)
        return self._mean(
            divergence(rows, target_rows, self.divergence, self.temperature, self.standardize, self.labels)
        )


def _two_way(logits: torch.Tensor) -> torch.Tensor:
    """Logits of "has the class or not": a softmax over (0, z) is a sigmoid of z."""
    return torch.stack([torch.zeros_like(logits), logits], dim=-1)
