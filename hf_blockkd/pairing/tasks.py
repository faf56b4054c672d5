"""How the logits and the labels of a task pair up into rows: `Task`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss, ForCTCLoss, ForSequenceClassificationLoss
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import ModelOutput, logging

from ..losses.rows import IGNORED
from ..models.classes import is_headless, transformers_class
from ..routing.logits import main_outputs
from .label_forms import FORMS, PIXELS, LabelForm, ignored_label

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Task:
    """What a model's head predicts, and so which logits meet which labels.

    Attributes:
        name: Class name of the model it was read from, for messages.
        label_names: Keys of the labels in a batch: `("labels",)`, or the two positions of question answering.
        shifted: Whether position `t` predicts label `t + 1` (causal language models).
        problem_type: transformers' problem type, `"embedding"` of models without a head, or `None` where it follows
            from the labels of the first batch.
        num_classes: Number of classes that a label can name, `None` where it depends on the batch.
        over_vocabulary: Whether the classes are the tokens of a vocabulary.
        text: Column of the tokens that have a label each, where they do.
        label_dims: Dimensions of class indices, 1 for examples and 2 for tokens; `None` where no logits were seen.
        form: Of labels that have no row of logits each; their task loss is the model's own then. `None` for all others.
        ignored: The label that the model's own loss leaves out.
        sums: Whether the model's own loss is a sum over examples and no mean.
    """

    name: str
    label_names: tuple[str, ...]
    shifted: bool
    problem_type: str | None
    num_classes: int | None
    over_vocabulary: bool
    text: str = "input_ids"
    label_dims: int | None = None
    form: LabelForm | None = None
    ignored: int = IGNORED
    sums: bool = False

    @classmethod
    def of(cls, model: PreTrainedModel) -> Task:
        """Read the task off a model's class and config, by the rules of transformers' own losses."""
        name = transformers_class(model).__name__
        # A subclass under a name of its own has no `loss_type`.
        by_name = (loss for kind, loss in LOSS_MAPPING.items() if name.endswith(kind))
        loss = LOSS_MAPPING.get(model.loss_type) or next(by_name, None)
        shifted = name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() or loss is ForCausalLMLoss
        has_problem_type = loss is ForSequenceClassificationLoss
        problem_type = "single_label_classification"
        if has_problem_type:
            problem_type = model.config.problem_type or ("regression" if model.config.num_labels == 1 else None)
        if is_headless(model):
            problem_type = "embedding"
        answers_questions = name.endswith("ForQuestionAnswering")
        head = model.get_output_embeddings()
        num_classes = model.config.num_labels if head is None else head.weight.shape[0]
        if answers_questions or name.endswith("ForMultipleChoice"):
            num_classes = None
        form = FORMS.get(loss)
        if form is not None:
            head, num_classes = None, model.config.vocab_size if loss is ForCTCLoss else model.config.num_labels
            if form is PIXELS and num_classes == 1:  # each pixel has it or not
                problem_type, num_classes = "multi_label_classification", None
        return cls(
            name=type(model).__name__,
            label_names=("start_positions", "end_positions") if answers_questions else ("labels",),
            shifted=shifted and not model.config.is_encoder_decoder,
            problem_type=problem_type,
            num_classes=num_classes,
            over_vocabulary=head is not None,
            text="decoder_input_ids" if model.config.is_encoder_decoder else "input_ids",
            form=form,
            ignored=ignored_label(model),
            sums=form is not None and getattr(model.config, "ctc_loss_reduction", "mean") == "sum",
        )

    @property
    def num_example_classes(self) -> int | None:
        """Number of classes where every example has one class index, as far as the config tells."""
        indexed = self.problem_type in (None, "single_label_classification") and not self.over_vocabulary
        return self.num_classes if indexed and self.form is None else None

    def problem(self, inputs: Mapping[str, Any]) -> str:
        """The problem type, read from the labels where the config leaves it open."""
        if self.problem_type is not None:
            return self.problem_type
        return "single_label_classification" if _is_whole(inputs["labels"]) else "multi_label_classification"

    def typed(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """A batch with labels of the dtype that transformers' own losses take."""
        if self.form is not None:
            own = inputs.get("labels")
            is_left_out = self.ignored != IGNORED and isinstance(own, torch.Tensor)
            return {**inputs, "labels": torch.where(own == IGNORED, self.ignored, own)} if is_left_out else dict(inputs)
        labels = {name: inputs[name] for name in self.label_names if isinstance(inputs.get(name), torch.Tensor)}
        if len(labels) < len(self.label_names):
            return dict(inputs)
        problem = self.problem(inputs)
        if problem == "embedding":
            labels = {name: one.new_full(one.shape[:1], IGNORED, dtype=torch.long) for name, one in labels.items()}
        if problem == "regression":
            typed = {name: one if one.is_floating_point() else one.float() for name, one in labels.items()}
        else:
            is_index = problem == "single_label_classification"
            typed = {name: one.long() if is_index and _is_whole(one) else one for name, one in labels.items()}
        return {**inputs, **typed}

    def logits(self, outputs: ModelOutput) -> torch.Tensor:
        """The logits as (rows, ...) tensor whose rows match `labels`, before any row is left out."""
        if self.form is not None:
            return main_outputs(outputs)[0].movedim(self.form.classes_dim, -1)
        return torch.cat([self.align(logits) for logits in main_outputs(outputs)])

    def align(self, positions: torch.Tensor) -> torch.Tensor:
        """Of a tensor (B, T, ...) over positions, those that have labels: all but the last where labels are shifted."""
        return positions[..., :-1, :] if self.shifted else positions

    def align_labels(self, tokens: torch.Tensor) -> torch.Tensor:
        """Of a tensor (B, T) over tokens, those that are predicted: all but the first where labels are shifted."""
        return tokens[..., 1:] if self.shifted else tokens

    def labels(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """The labels, in the shape that matches `logits`; ignored ones are -100."""
        inputs = self.typed(inputs)
        if len(self.label_names) == 1:
            return self.align_labels(inputs["labels"])
        length = inputs["input_ids"].shape[-1]
        positions = torch.cat([inputs[name].reshape(-1) for name in self.label_names])
        # Answers beyond the cut-off of the text are ignored, as in transformers' own loss; so are negative ones, which
        # that loss would take for position 0.
        return positions.masked_fill((positions < 0) | (positions >= length), IGNORED)

    def count(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Number of labels in a batch that take part in the loss: a 0-d tensor, (2,) for starts and ends of answers.

        Of labels that have no row of logits each, what the model's own loss is a mean over.
        """
        if self.form is not None:
            return self.own_items(inputs).sum()
        return self.labels(inputs).ne(IGNORED).reshape(len(self.label_names), -1).sum(1).squeeze(0)

    def own_items(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """What the model's own loss is a mean over, in labels that have no row of logits each: see `LabelForm`."""
        labels = inputs["labels"]
        if isinstance(labels, torch.Tensor):
            labels = torch.where(labels == self.ignored, IGNORED, labels)
        return self.form.items(labels)

    def check_labels(self, inputs: Mapping[str, Any]) -> None:
        """Raise a `ValueError` for labels that are missing, not of the logits' form, not finite, or no class."""
        missing = [name for name in self.label_names if inputs.get(name) is None]
        if missing:
            raise ValueError(
                f"{' and '.join(missing)} missing from the batch (keys: {', '.join(inputs)}); {self.name} needs "
                "them, so check the columns of the data set and what the data collator returns."
            )
        if self.problem_type == "embedding":
            return  # which looks at none
        if self.form is not None:
            if not self.form.fits(inputs["labels"]):
                raise ValueError(
                    f"`labels` has {_described(inputs['labels'])}, but {self.name} takes {self.form.words}; correct "
                    "the data set or the collator."
                )
            self.check_classes(inputs)
            return
        for name in self.label_names:
            self._check_form(name, inputs)
        labels = self.labels(inputs)
        if not torch.isfinite(labels).all():
            raise ValueError(f"`{self.label_names[0]}` holds values that are not finite; correct the data set.")
        if self.problem(inputs) == "regression" and (labels == IGNORED).any():
            logger.warning_once(f"`labels` holds {IGNORED}, which stands for rows without a label, in regression, too.")
        self.check_classes(inputs)

    def check_classes(self, inputs: Mapping[str, Any]) -> None:
        """Raise a `ValueError` if labels name a class that the head does not have."""
        if self.num_classes is None or self.problem(inputs) != "single_label_classification":
            return
        labels = self.labels(inputs) if self.form is None else self.form.classes(inputs["labels"])
        is_class = (labels >= 0) & (labels < self.num_classes)
        wrong = labels[(labels != IGNORED) & (labels != self.ignored) & ~is_class]
        if len(wrong):
            raise ValueError(
                f"`{self.label_names[0]}` holds {wrong[0].item()}, but {self.name} has {self.num_classes} "
                f"classes, 0 to {self.num_classes - 1} ({IGNORED} is ignored); correct the labels or `num_labels`."
            )

    def check_rows(self, outputs: Sequence[torch.Tensor], inputs: Mapping[str, Any], name: str) -> None:
        """Raise a `ValueError` if there are other rows than labels in the main outputs, or final states, of a model."""
        if self.form is not None:
            return
        num_rows, labels = sum(self.align(one)[..., 0].numel() for one in outputs), self.labels(inputs)
        if self.problem(inputs) == "single_label_classification" and num_rows != labels.numel():
            raise ValueError(
                f"{name} returns logits of shape {tuple(outputs[0].shape)} for labels of shape "
                f"{tuple(inputs[self.label_names[0]].shape)}, so that they do not pair up row by row; give every "
                f"position a label, {IGNORED} where it has none."
            )

    def _check_form(self, name: str, inputs: Mapping[str, Any]) -> None:
        """The labels are a tensor of numbers, of the shape and the kind that the head's logits ask for."""
        labels, form = inputs[name], "numbers"
        is_right = isinstance(labels, torch.Tensor) and not labels.is_complex()
        if is_right and self.problem(inputs) == "single_label_classification":
            form = "class indices (whole numbers)"
            is_right, shape = _is_whole(labels), ("batch",)
            if self.label_dims == 2:
                ids = inputs.get(self.text)
                shape = ("batch", "tokens") if ids is None else tuple(ids.shape)
                is_right &= labels.ndim == 2 if ids is None else labels.shape == ids.shape
            elif self.label_dims == 1:
                # A column of its own for them is as good.
                is_right &= labels.ndim == 1 or (labels.ndim == 2 and labels.shape[1] == 1)
            form += (
                f" of shape ({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})" if self.label_dims else ""
            )
        elif is_right:
            is_multiple = self.problem(inputs) == "multi_label_classification"
            kind = "floating-point numbers" if is_multiple else "numbers"
            form = f"{kind} of shape (batch, {self.num_classes})"
            is_right = (labels.is_floating_point() or not is_multiple) and (
                tuple(labels.shape[1:]) == (self.num_classes,)
                or (not is_multiple and self.num_classes == 1 and labels.ndim == 1)
            )
        if not is_right:
            has = _described(labels) if isinstance(labels, torch.Tensor) else ""
            problem = f" with `problem_type` {self.problem(inputs)!r}" if has and self.label_dims == 1 else ""
            is_many = has and labels.ndim == 2 and self.label_dims == 1 and not labels.is_floating_point()
            cure = "convert them with `.float()` if an example has several classes, else " if is_many else ""
            raise ValueError(
                f"`{name}` has {_described(labels)}, but {self.name}{problem} takes {form}; "
                f"{cure}correct the data set or the collator."
            )


def _described(labels: Any) -> str:
    is_tensor = isinstance(labels, torch.Tensor)
    return f"shape {tuple(labels.shape)} and dtype {labels.dtype}" if is_tensor else f"the type {type(labels).__name__}"


def _is_whole(labels: torch.Tensor) -> bool:
    return not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
