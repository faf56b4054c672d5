"""The losses of one learner: task loss and distillation loss over the rows of a batch."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from .divergences import divergence
from .embeddings import embedding_loss
from .top_k import TopK

IGNORED = -100
"""Label of a row that takes no part in the task loss, as everywhere in transformers."""

PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression", "embedding")


@dataclass(frozen=True)
class WindowMean:
    """A part of the mean over rows of a whole accumulation window: their sum, divided by the number of all.

    Attributes:
        num_items: Number of rows in the window that the mean is over.
        weights: Of each row at hand, its share relative to that in a mean over all; `None` where all have the same.
    """

    num_items: torch.Tensor | float
    weights: torch.Tensor | None = None

    @classmethod
    def over(
        cls, counts: torch.Tensor | None, label_sets: torch.Tensor, counted: torch.Tensor, num_sets: int
    ) -> WindowMean:
        """The mean of the means over several label sets, such as the starts and the ends of answers.

        Args:
            counts: (num_sets,) rows of each in the window; `None` means those that are counted here.
            label_sets: (N,) the set of each row at hand.
            counted: (N,) which of them the mean is over.
            num_sets: How many there are.
        """
        counts = label_sets[counted].bincount(minlength=num_sets) if counts is None else counts
        counts = counts.clamp(min=1)
        num_items = counts.sum()
        return cls(num_items, None if num_sets == 1 else (num_items / (num_sets * counts))[label_sets])

    @property
    def reduction(self) -> str:
        """What torch's losses are asked for, which sum what has no weights without a tensor of it."""
        return "sum" if self.weights is None else "none"

    def __call__(self, losses: torch.Tensor) -> torch.Tensor:
        """The part of the mean that rows make of it, from what each loses, or its sum where they have no weights."""
        return (losses if self.weights is None else losses * self.weights).sum() / self.num_items

    def part(self, rows: slice | torch.Tensor) -> WindowMean:
        """The same mean, for some of the rows at hand."""
        return WindowMean(self.num_items, None if self.weights is None else self.weights[rows])


@dataclass
class RowLosses:
    """Task and distillation losses over the rows of a batch, for one problem type and one set of options.

    A row is whatever may have one label of its own: an example, a token, or one class of one example in multi-label
    problems. The task loss counts rows whose label is not -100; the distillation loss counts these, and those that are
    said to be distilled without one. Each is a *sum* over rows divided by its own number of them in the whole
    accumulation window, so that micro-batches and ranks add up to the loss of the whole batch however it was split. Of
    several label sets, such as the starts and the ends of answers, each has a mean of its own, and the mean of those is
    the loss.

    Args:
        problem_type: `"single_label_classification"`, `"multi_label_classification"`, `"regression"`, or
            `"embedding"`, whose rows are vectors and whose labels say no more than how many there are.
        labels: Labels in the shape that `Task.labels` gives them.
        num_items: Number of rows that the sums are divided by: one number for both losses, one of each label set where
            there are several, or (2, label sets) with those of the task loss first; `None` means those of this batch.
        divergence: See `divergence`. In multi-label problems it compares, for each class, the
            two-way distribution "has it or not"; in regression it is the squared error and takes no options; of
            vectors, it is an `embedding_loss`.
        temperature: See there.
        standardize: See there.
        beta: See there.
        label_smoothing: As in `torch.nn.functional.cross_entropy`, for the task loss of single-label problems.
        num_examples: Number of examples in the batch; default: the length of `labels`, which question answering has
            twice, for start and end.
        distilled: Which rows take part in the distillation loss, in the shape of `labels`, all that have a label among
            them; default: those alone. In multi-label and regression problems all rows do.
        per_example: Whether the distillation loss is the mean over examples of the mean over each one's rows, and
            `num_items` counts examples: where an example's number of rows is known once there are logits.

    Attributes:
        mean: Of the task loss, a [`WindowMean`].
        distill_mean: Of the distillation loss.

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
    beta: float = 0.5
    label_smoothing: float = 0.0
    num_examples: int | None = None
    distilled: torch.Tensor | None = None
    per_example: bool = False

    def __post_init__(self) -> None:
        if self.problem_type not in PROBLEM_TYPES:
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
            counted = self.labels != IGNORED if self.distilled is None else self.distilled.flatten()
            self._kept = counted.nonzero().squeeze(-1)
            self.labels = self.labels[self._kept]
        self.distilled = None
        self._set_means()

    def _set_means(self) -> None:
        num_sets = max(self._num_rows // max(self._grid[1] * self._grid[2], 1), 1)
        given = self.num_items
        if self.per_example:
            examples = self._examples
            share = 1 / examples.bincount(minlength=self.num_examples).clamp(min=1).float()
            task, distill = (self.num_examples, self.num_examples) if given is None else given.flatten()
            self.mean, self.distill_mean = WindowMean(task), WindowMean(distill, share[examples])
            return
        if given is not None and not getattr(given, "ndim", 0):
            self.mean = self.distill_mean = WindowMean(given)
            return
        counts = (given, given) if given is None or given.ndim == 1 else given
        label_sets = self._places // max(self._num_rows // num_sets, 1)
        counted = (self.is_labelled, torch.ones_like(self.labels, dtype=torch.bool))
        self.mean, self.distill_mean = (
            WindowMean.over(*one, num_sets=num_sets)
            for one in zip(counts, (label_sets, label_sets), counted, strict=True)
        )

    @property
    def is_labelled(self) -> torch.Tensor:
        """Which of the rows that count have a label."""
        return self.labels != IGNORED

    @property
    def _places(self) -> torch.Tensor:
        """Where the rows that count stand among all."""
        return torch.arange(self._num_rows, device=self.labels.device) if self._kept is None else self._kept

    @property
    def _examples(self) -> torch.Tensor:
        """Whose they are."""
        return self._places // self._grid[2] % self.num_examples

    def rows(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits of the rows that count: (N, C), or (N,) in multi-label and regression problems."""
        if self.problem_type == "embedding":
            return logits
        if self._kept is None:
            return logits.flatten()
        rows = logits.flatten(0, -2)
        return rows if len(self._kept) == len(rows) else rows[self._kept]

    @property
    def magnitude(self) -> torch.Tensor:
        """The largest power of two up to the rows of the window: multiplying by it, and dividing, changes no bit."""
        num_items = torch.as_tensor(self.distill_mean.num_items, dtype=torch.float32)
        if self.per_example and len(self):
            num_items = num_items / self.distill_mean.weights.amax()
        return num_items.clamp(min=1.0).log2().floor().exp2()

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
        part.mean, part.distill_mean = self.mean.part(rows), self.distill_mean.part(rows)
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
            A scalar, in nats (squared units of the labels for regression); 0 of vectors, which have no labels.
        """
        rows, mean = rows.float(), self.mean
        if self.problem_type == "embedding":
            return rows.new_zeros(())
        if self.problem_type == "single_label_classification":
            options = {"reduction": mean.reduction, "label_smoothing": self.label_smoothing, "ignore_index": IGNORED}
            return mean(F.cross_entropy(rows, self.labels.long(), **options))
        is_regression = self.problem_type == "regression"
        loss = F.mse_loss if is_regression else F.binary_cross_entropy_with_logits
        return mean(loss(rows, self.labels.float(), reduction="none").masked_fill(~self.is_labelled, 0.0))

    def counts(self) -> list[int]:
        """Number of rows that count of each example, where an example's rows stand together."""
        return (self._places // self._grid[2]).bincount(minlength=self.num_examples).tolist()

    def rows_of_examples(self) -> torch.Tensor:
        """Number of rows that are distilled of each example, as much as they weigh: (B,) float."""
        examples = self._examples
        counts = torch.zeros(self.num_examples, device=examples.device)
        weights = self.distill_mean.weights
        weights = torch.ones_like(examples, dtype=counts.dtype) if weights is None else weights
        return counts.index_add_(0, examples, weights)

    def distill(self, rows: torch.Tensor, target_rows: torch.Tensor | TopK) -> torch.Tensor:
        """Divergence from the target's rows, a scalar; no gradient goes to the target.

        Where a divergence asks for the label of a row that has none, it is the target's likeliest class.
        """
        mean = self.distill_mean
        if isinstance(target_rows, TopK):
            learner = target_rows.bucket(rows, self.temperature)
            rows = divergence(learner, target_rows.log_probs, self.divergence, beta=self.beta)
            return mean(rows * self.temperature**2)
        if self.problem_type == "embedding":
            return mean(embedding_loss(rows, target_rows.detach(), self.divergence))
        # Vocabularies that differ by padding are compared on what they have in common.
        common = min(rows.shape[-1], target_rows.shape[-1])
        rows, target_rows = rows[..., :common], target_rows[..., :common].detach()
        if self.problem_type == "regression":
            return mean(F.mse_loss(rows.float(), target_rows.float(), reduction=mean.reduction))
        labels = self.labels
        if self.problem_type == "multi_label_classification":
            rows, target_rows = _two_way(rows), _two_way(target_rows)
        elif self.divergence == "dkd":
            labels = torch.where(self.is_labelled, labels, target_rows.argmax(-1))
        options = (self.divergence, self.temperature, self.standardize)
        return mean(divergence(rows, target_rows, *options, labels=labels, beta=self.beta))


def _two_way(logits: torch.Tensor) -> torch.Tensor:
    """Logits of "has the class or not": a softmax over (0, z) is a sigmoid of z."""
    return torch.stack([torch.zeros_like(logits), logits], dim=-1)
