"""Task losses that are not what labels and logits alone make: a model's own, or a person's: `TaskLosses`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput, logging

from ..losses.rows import IGNORED, RowLosses
from ..pairing.pair import Pair
from ..pairing.tasks import Task
from ..routing.examples import take_examples
from ..routing.logits import main_outputs

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
"""Relative difference of two losses that is still rounding, by the dtype of the logits."""
HALF_TOLERANCE = 3e-2
NUM_TOKENS = 64
"""Over vocabularies, tokens that a model's own loss is looked at on; a loss of another kind shows on any."""

logger = logging.get_logger(__name__)


class TaskLosses:
    """What student and hybrids have for a task loss, in training as in evaluation.

    Mostly it is rebuilt from labels and logits, which allows chunks and windows. A model whose forward computes another
    one (weighted, of several heads) trains on its own, and so do stones that end in it; a `compute_loss_func` goes
    before both.

    Args:
        function: `compute_loss_func` of the trainer.
        smoother: Its label smoother, with which a model's own loss is not looked at.

    Attributes:
        own: Roles, `"student"` and `"teacher"`, whose model's own loss is taken.
    """

    def __init__(self, function: Callable | None = None, smoother: Callable | None = None) -> None:
        self.function, self.smoother = function, smoother
        self.own: set[str] = set()

    @property
    def are_rebuilt(self) -> bool:
        """Whether labels and logits are all that it takes."""
        return self.function is None and not self.own

    def takes_labels(self, role: str, pair: Pair, inputs: Mapping[str, Any]) -> bool:
        """Whether a forward gets the labels: to compute its own loss, or as in `Trainer`, which takes out `labels`."""
        if self.function is not None or pair.task.form is None:
            return role in self.own or (self.function is not None and "labels" not in pair.task.label_names)
        return bool(pair.task.count(inputs))

    def of(
        self, role: str, pair: Pair, outputs: Any, inputs: Mapping[str, Any], losses: RowLosses
    ) -> torch.Tensor | None:
        """The task loss of a forward, as part of that of the whole window; `None` where it is rebuilt.

        Args:
            role: Whose head it ended in.
            pair: The models.
            outputs: What the forward returned.
            inputs: What it got, with the labels.
            losses: Of the same examples.
        """
        if self.function is not None:
            return self.function(outputs, inputs.get("labels"), num_items_in_batch=losses.mean.num_items)
        has_form = pair.task.form is not None
        if role not in self.own and not has_form:
            return None
        # A mean over the labels of this batch, as in evaluation; over none, it would be no number.
        num_labels = int(pair.task.count(inputs) if has_form else losses.is_labelled.sum())
        if not num_labels:
            return 0.0 * main_outputs(outputs)[0].sum()
        return outputs["loss"] * (1 if pair.tasks[role].sums else num_labels) / losses.mean.num_items

    def in_evaluation(
        self, pair: Pair, outputs: ModelOutput, inputs: Mapping[str, Any], num_items: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """The task loss of a model or a hybrid when it is evaluated.

        Args:
            pair: The models.
            outputs: What its forward returned, for a batch with labels.
            inputs: The batch.
            num_items: Labels of all ranks, for `compute_loss_func`.
        """
        if self.function is not None:
            return self.function(outputs, inputs.get("labels"), num_items_in_batch=num_items)
        if self.smoother is not None and "labels" in inputs:
            return self.smoother(outputs, inputs["labels"], shift_labels=pair.task.shifted)
        return outputs["loss"]

    def of_labelled(
        self, pair: Pair, outputs: ModelOutput, inputs: Mapping[str, Any], loss: torch.Tensor
    ) -> torch.Tensor:
        """A loss in evaluation, or that of the labels that are there where a model's own takes -100 for one."""
        labels, problem = inputs.get("labels"), pair.task.problem_type
        if self.function is not None or problem not in ("regression", "multi_label_classification"):
            return loss
        if not (labels == IGNORED).any():
            return loss
        losses = RowLosses(problem, pair.task.labels(inputs))
        return losses.task(losses.rows(pair.task.logits(outputs)))

    @torch.no_grad()
    def compare(
        self,
        pair: Pair,
        models: Mapping[str, nn.Module],
        inputs: Mapping[str, Any],
        losses_of: Callable[[Mapping[str, Any]], RowLosses],
    ) -> None:
        """Find the models whose loss in evaluation is not what labels and logits make, and take it in training, too.

        Args:
            pair: The models.
            models: Role -> what is called, in eval mode.
            inputs: A batch with labels.
            losses_of: Gives the losses of a batch by itself.
        """
        # Where labels have another form, a model's own loss is all that there is.
        if self.function is not None or pair.task.form is not None or not losses_of(inputs).is_labelled.any():
            return
        for role, model in models.items():
            if role in self.own:
                continue
            try:
                outputs, part = _with_own_loss(pair, role, model, inputs)
            except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
                # Training can do without; evaluation says the same.
                logger.warning_once(f"{type(getattr(pair, role)).__name__} computes no loss of its own: {error}")
                continue
            if not isinstance(outputs, Mapping) or outputs.get("loss") is None:
                continue
            theirs = self.in_evaluation(pair, outputs, part).float().item()
            logits, losses = pair.task.logits(outputs), losses_of(part)
            ours = losses.task(losses.rows(logits)).item() + _router_loss(pair, role, outputs)
            tolerance = TOLERANCE.get(logits.dtype, HALF_TOLERANCE)
            if abs(ours - theirs) > tolerance * max(abs(ours), abs(theirs), 1e-3):
                self.own.add(role)
                logger.warning(
                    f"{type(getattr(pair, role)).__name__} has a loss of its own, {theirs:.4g} on the first examples, "
                    f"where their labels and logits alone give {ours:.4g}: its own is the task loss of what ends in it."
                )


def _with_own_loss(
    pair: Pair, role: str, model: nn.Module, inputs: Mapping[str, Any]
) -> tuple[ModelOutput, Mapping[str, Any]]:
    """Outputs with a model's own loss on a batch, or on a few tokens where all logits might not fit; and on what."""
    head, own_inputs = getattr(pair, f"{role}_head"), pair.inputs_for(role, inputs, labels=True)
    # Labels of another kind, say, which a loss of several parts reads.
    if head is None or head.reads(own_inputs.keys() - {"labels"}):
        return model(**own_inputs), inputs
    with head.capture() as captured:
        model(**pair.inputs_for(role, inputs))
    labels = inputs["labels"]
    example, place = (labels != IGNORED).nonzero()[0].tolist()
    first = max(place - 1, 0)  # whose state predicts it, perhaps
    tokens = example, slice(first, first + NUM_TOKENS)
    return head.outputs(captured["states"][tokens], labels[tokens]), {"labels": labels[tokens][None]}


@contextmanager
def loss_of_labelled(model: PreTrainedModel, task: Task, inputs: Mapping[str, Any]) -> Iterator[None]:
    """The model's own loss is that of the examples with labels, where labels of another form are a mean over examples.

    Args:
        model: Whose forward runs inside the context.
        task: What its head predicts.
        inputs: What it gets, with labels.
    """
    is_labelled = None if task.form is None else task.own_items(inputs)
    if is_labelled is None or is_labelled.ndim > 1 or is_labelled.all():
        yield
        return
    examples, whole = is_labelled.nonzero().flatten(), model.loss_function

    def of_some(*args: Any, **kwargs: Any) -> torch.Tensor:
        args, kwargs = take_examples((args, kwargs), examples, len(is_labelled))
        return whole(*args, **kwargs)

    model.loss_function = of_some
    try:
        yield
    finally:
        model.loss_function = whole


def batch_to_compare(pair: Pair, inputs: Mapping[str, Any], some: Mapping[str, Any]) -> Mapping[str, Any]:
    """What losses are compared on: a batch with every class in turn, which may have few of them by chance.

    Labels of another kind are there as they are, with 0 where there are none: no model knows rows without them.

    Over vocabularies, whose logits are large and whose labels are many, the first examples do.

    Args:
        pair: The models.
        inputs: The first batch of a run.
        some: Its first examples.
    """
    task, labels = pair.task, inputs.get("labels")
    if task.over_vocabulary or task.form is not None:
        return some
    if labels is None or task.num_classes is None or task.problem(inputs) != "single_label_classification":
        return inputs | {name: inputs[name].masked_fill(inputs[name] == IGNORED, 0) for name in task.label_names}
    in_turn = torch.arange(labels.numel(), device=labels.device).reshape(labels.shape) % task.num_classes
    is_left_out = (labels == IGNORED) & (labels != IGNORED).any()  # of a batch without any label, all are looked at
    return {**inputs, "labels": torch.where(is_left_out, labels, in_turn.to(labels.dtype))}


def _router_loss(pair: Pair, role: str, outputs: ModelOutput) -> float:
    """What experts add to their model's loss, which is a term of its own here."""
    loss = outputs.get("aux_loss")
    config = getattr(pair, role).config.get_text_config()
    return loss.item() * config.router_aux_loss_coef if isinstance(loss, torch.Tensor) else 0.0
