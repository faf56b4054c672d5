"""How near a student is to its teacher, `distance`, and both are to the labels: `likeness`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..data.calibration import BATCH_SIZE, ModelInputs, calibration_batches
from ..losses.rows import IGNORED
from ..pairing.positions import position_mask
from ..pairing.tasks import Task
from ..routing.forwards import in_dtype_of, in_eval_mode
from ..routing.logits import main_outputs, only_logits
from .layer_scores import compared_as, have_other_widths, output_change
from .progress import bar


@torch.no_grad()
def likeness(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    rows: Any,
    data_collator: Callable[[list[Any]], Mapping[str, Any]],
) -> dict[str, float]:
    """Run both models on some rows.

    Args:
        student: The student; it runs in eval mode.
        teacher: Likewise, of the same class.
        rows: A data set or a list; all of it is read.
        data_collator: Makes a batch of rows.

    Returns:
        `"kl"`, the KL divergence of the student's outputs from the teacher's, in nats for each example, or each
        position of outputs that have some, padding apart; in its place `"mse"`, the mean squared error of a regression
        or of states, or `"similarity"` of states that are narrower than the teacher's (see `output_change`). Where the
        rows have labels, for `student` and `teacher` also `"<one>_accuracy"`, or `"<one>_perplexity"` of a language
        model.

    Raises:
        ValueError: If all of it is padding.

    Example:
        ```python
        >>> import torch
        >>> from transformers import GPT2Config, GPT2LMHeadModel, default_data_collator
        >>> from hf_blockkd import make_student
        >>> from hf_blockkd.students.likeness import likeness
        >>> teacher = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=99))
        >>> rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 8
        >>> found = likeness(make_student(teacher), teacher, rows, default_data_collator)
        >>> found["kl"], found["student_perplexity"] == found["teacher_perplexity"]
        (0.0, True)

        ```
    """
    inputs, task = ModelInputs(teacher, data_collator), Task.of(teacher)
    models = {"student": student, "teacher": teacher}
    change, count, num_labels, kind = 0.0, 0, 0, "kl"
    scores = dict.fromkeys(models, 0.0)
    with in_eval_mode(student), in_eval_mode(teacher), only_logits(student), only_logits(teacher):
        batches = calibration_batches(rows, inputs.collate, seed=0)
        for batch in bar(batches, "Batches compared with the teacher", math.ceil(len(rows) / BATCH_SIZE)):
            given = inputs.of_batch(batch)
            outputs = {name: model(**in_dtype_of(model, given)) for name, model in models.items()}
            change += output_change(teacher, given, outputs["student"], outputs["teacher"])
            clean = main_outputs(outputs["teacher"])
            width = 1
            if compared_as(teacher, outputs["teacher"]) == "regression":
                kind, width = "mse", clean[0].shape[-1]
            if have_other_widths(main_outputs(outputs["student"])[0], clean[0]):
                kind, count = "similarity", count + len(clean[0])
            else:
                count += sum(_num_rows(teacher, given, one) for one in clean) * width
            labels = _labels(task, batch, clean[0])
            if labels is not None:
                num_labels += int((labels != IGNORED).sum())
                for name, one in outputs.items():
                    scores[name] += _score(task, task.logits(one), labels)
    if not count:
        raise ValueError("The rows to compare on hold nothing but padding; give others.")
    found = {kind: change / count}
    for name, score in scores.items() if num_labels else ():
        mean = torch.tensor(score / num_labels, dtype=torch.float64)
        key, value = ("perplexity", mean.exp()) if task.over_vocabulary else ("accuracy", mean)
        found[f"{name}_{key}"] = value.item()
    return found


@torch.no_grad()
def distance(teacher: PreTrainedModel, student: PreTrainedModel, batches: Iterable[Mapping[str, Any]]) -> float:
    """How far a student's outputs are from its teacher's, as `output_change` measures it.

    Args:
        teacher: The teacher.
        student: Of the same class.
        batches: Inputs for both.
    """
    with in_eval_mode(teacher), in_eval_mode(student), only_logits(teacher), only_logits(student):
        return sum(
            output_change(teacher, batch, student(**in_dtype_of(student, batch)), teacher(**batch))
            for batch in bar(batches, "Batches compared with the teacher")
        )


def _num_rows(model: PreTrainedModel, batch: Mapping[str, Any], outputs: torch.Tensor) -> int:
    """How many rows `output_change` sums over."""
    kept = position_mask(model, "", batch, outputs) if outputs.ndim == 3 else None
    return outputs.shape[:-1].numel() if kept is None else int(kept.bool().sum())


def _labels(task: Task, batch: Mapping[str, Any], logits: torch.Tensor) -> torch.Tensor | None:
    """Class indices of a batch, where it has one for each row of logits."""
    labels = batch.get("labels")
    if labels is None or task.problem_type not in (None, "single_label_classification"):
        return None
    return task.labels(batch).to(logits.device) if labels.shape == logits.shape[:-1] else None


def _score(task: Task, logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Summed over labels: how many are met, or, of tokens, the nats that they cost."""
    if task.over_vocabulary:
        logits = logits.flatten(0, -2).float()
        return F.cross_entropy(logits, labels.flatten().long(), ignore_index=IGNORED, reduction="sum").item()
    return float((logits.argmax(-1) == labels).sum())
