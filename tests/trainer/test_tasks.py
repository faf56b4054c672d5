"""Two training steps of every task, against gradients from models walked layer by layer and losses by formula.

The reference shares no code with the package: `walks.py` puts the models together by hand, and the objective is written
once for all tasks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_blockkd.connectors.attached import attach

from ..helpers.tiny_models import LABELS, VOCABULARY, tiny_bert, tiny_llama, tiny_t5
from ..helpers.training import PLAIN_SGD, Gradients, batch_of, make_trainer, max_difference, step_logs
from ..helpers.walks import walk

LENGTH = 6
CHOICES = 3
STUDENT_ENDS, TEACHER_ENDS = [1, 3], [3, 4]
WEIGHTS = {"task_weight": 0.7, "distill_weight": 1.3, "cross_weight": 0.4}
TEMPERATURE = 3.0
MICRO_BATCH, ACCUMULATION = 2, 2
LEARNING_RATE = 0.01


# ---- Data: eight rows, of which each has a number of labels of its own ----


def texts(seed: int = 0, shape: tuple[int, ...] = ()) -> list[dict[str, Tensor]]:
    """Sequences of which row i is padded on the right by `i % 3` tokens."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(8):
        mask = (torch.arange(LENGTH) < LENGTH - i % 3).long().expand(*shape, LENGTH)
        token_ids = torch.randint(3, VOCABULARY, mask.shape, generator=generator) * mask
        rows.append({"input_ids": token_ids, "attention_mask": mask.clone()})
    return rows


def with_labels(labels: list[Any], shape: tuple[int, ...] = ()) -> list[dict[str, Tensor]]:
    return [{**row, "labels": torch.tensor(label)} for row, label in zip(texts(shape=shape), labels, strict=True)]


def class_rows() -> list[dict[str, Tensor]]:
    return with_labels([1, -100, 4, 0, 2, 3, -100, -100])


def several_class_rows() -> list[dict[str, Tensor]]:
    return with_labels([[float((i >> bit) & 1) for bit in range(LABELS)] for i in range(8, 16)])


def value_rows() -> list[dict[str, Tensor]]:
    return with_labels([0.3 * i - 1 for i in range(8)])


def two_value_rows() -> list[dict[str, Tensor]]:
    return with_labels([[0.3 * i - 1, 1.0 / (1 + i)] for i in range(8)])


def token_rows(classes: int = VOCABULARY) -> list[dict[str, Tensor]]:
    """A label per token, neither for padding nor for the first `i % 4` tokens of row i."""
    rows = texts()
    for i, row in enumerate(rows):
        row["labels"] = (row["input_ids"] * 5 % classes).masked_fill(row["attention_mask"] == 0, -100)
        row["labels"][: i % 4] = -100
    return rows


def answer_rows() -> list[dict[str, Tensor]]:
    """Answers from a start to an end; in three rows one or both lie beyond the text."""
    spans = [(0, 2), (LENGTH, LENGTH), (3, 4), (2, 9), (1, 1), (0, 3), (40, 41), (2, 3)]
    return [
        {**row, "start_positions": torch.tensor(start), "end_positions": torch.tensor(end)}
        for row, (start, end) in zip(texts(), spans, strict=True)
    ]


def choice_rows() -> list[dict[str, Tensor]]:
    return with_labels([2, 0, -100, 1, 1, 2, 0, 0], shape=(CHOICES,))


# ---- The objective by its formulas, as sums over rows ----


def logits_of(student: nn.Module, teacher: nn.Module, connectors: nn.ModuleList, batch: dict) -> list[Tensor]:
    """Logits of the teacher, the student, and every stepping stone."""
    ours, theirs = walk(student, batch), walk(teacher, batch)

    def suffix(states: Tensor, start: int) -> Tensor:
        for layer in theirs.layers[start:]:
            states = theirs.call(layer, states)
        return theirs.head(states)

    states, stones, start = ours.states, [], 0
    for connector, end, teacher_end in zip(connectors, STUDENT_ENDS, TEACHER_ENDS, strict=True):
        for layer in ours.layers[start:end]:
            states = ours.call(layer, states)
        start = end
        stones.append(suffix(connector(states), teacher_end))
    return [suffix(theirs.states, 0).detach(), ours.head(states), *stones]


def label_rows(batch: dict[str, Tensor], name: str) -> Tensor:
    """The labels in the order of the logits' rows; -100 where there is none."""
    return batch[name] if name == "labels" else torch.where(batch[name] < LENGTH, batch[name], -100)


def label_names(task: str) -> list[str]:
    return ["start_positions", "end_positions"] if task == "answers" else ["labels"]


def counts(task: str, batch: dict[str, Tensor], name: str) -> Tensor:
    """Number of labels, and of rows that are distilled: all examples, and tokens that have a label."""
    labels = label_rows(batch, name)
    labels = labels[:, 1:] if task == "next tokens" else labels
    num_labels = (labels != -100).sum()
    return torch.stack([num_labels, num_labels if labels.ndim > 1 else torch.tensor(len(labels))])


def sums(task: str, logits: Tensor, labels: Tensor, targets: list[tuple[float, Tensor]]) -> Tensor:
    """alpha times the task loss, and the sum of a weight times the divergence from each target."""
    if task == "values":
        own = ((logits - labels.view_as(logits)) ** 2).sum()
        distill = sum(w * ((logits - target) ** 2).sum() for w, target in targets)
        return torch.stack([WEIGHTS["task_weight"] * own, distill])
    if task == "several classes":
        own = (F.softplus(logits) - labels * logits).sum()
    else:
        if task == "next tokens":
            logits, labels = logits[:, :-1], labels[:, 1:]
            targets = [(weight, target[:, :-1]) for weight, target in targets]
        kept = labels != -100
        ours, classes = logits[kept], labels[kept]
        own = (ours.logsumexp(-1) - ours[torch.arange(len(classes)), classes]).sum()
        if labels.ndim > 1:
            logits, targets = ours, [(weight, target[kept]) for weight, target in targets]

    def distribution(logits: Tensor) -> Tensor:
        if task == "several classes":
            yes = (logits / TEMPERATURE).sigmoid()
            return torch.stack([yes, 1 - yes], -1)
        return (logits / TEMPERATURE).exp() / (logits / TEMPERATURE).exp().sum(-1, keepdim=True)

    q, distill = distribution(logits), torch.zeros(())
    for weight, target in targets:
        p = distribution(target)
        distill = distill + weight * TEMPERATURE**2 * (p * (p / q).log()).sum()
    return torch.stack([WEIGHTS["task_weight"] * own, distill])


def window_loss(task: str, models: tuple, window: list[dict[str, Tensor]]) -> Tensor:
    """The objective of an accumulation window: sums over all its micro-batches, by the number of all their rows.

    Of answers, it is half of that of the starts alone and half of that of the ends alone.
    """
    names = label_names(task)
    return sum(_window_mean(task, models, window, name, i) for i, name in enumerate(names)) / len(names)


def _window_mean(task: str, models: tuple, window: list[dict[str, Tensor]], name: str, place: int) -> Tensor:
    total = torch.zeros(2)
    for batch in window:
        labels = label_rows(batch, name)
        rows = slice(place * len(labels), (place + 1) * len(labels))
        teacher, student, first, second = (logits[rows] for logits in logits_of(*models, batch))
        ensemble = (first + second).detach() / 2
        targets = [(WEIGHTS["distill_weight"], teacher), (WEIGHTS["cross_weight"], ensemble)]
        for weight, logits in [(1.0, student), (0.5, first), (1.0, second)]:
            total = total + weight * sums(task, logits, labels, targets)
    return (total / sum(counts(task, batch, name) for batch in window)).sum()


# ---- The cases ----


@dataclass
class Case:
    task: str
    build: Callable[..., nn.Module]
    rows: Callable[[], list[dict[str, Tensor]]]
    config: dict[str, Any] = field(default_factory=dict)


def bert(head: str, **config: Any) -> nn.Module:
    return tiny_bert(head, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **config)


def t5(hidden_size: int, num_hidden_layers: int) -> nn.Module:
    return tiny_t5(d_model=hidden_size, num_decoder_layers=num_hidden_layers, dropout_rate=0.0)


FIVE = {"num_labels": LABELS}
SEQUENCES = partial(bert, "SequenceClassification")
CASES = {
    "one class": Case("classes", SEQUENCES, class_rows),
    "one class, causal body": Case("classes", partial(tiny_llama, "SequenceClassification"), class_rows, FIVE),
    "several classes": Case("several classes", SEQUENCES, several_class_rows),
    "value": Case("values", SEQUENCES, value_rows, {"num_labels": 1}),
    "two values": Case("values", SEQUENCES, two_value_rows, {"num_labels": 2, "problem_type": "regression"}),
    "token classes": Case("classes", partial(bert, "TokenClassification"), partial(token_rows, LABELS)),
    "answers": Case("answers", partial(bert, "QuestionAnswering"), answer_rows),
    "choices": Case("classes", partial(bert, "MultipleChoice"), choice_rows),
    "masked tokens": Case("classes", partial(bert, "MaskedLM"), token_rows),
    "next tokens": Case("next tokens", tiny_llama, token_rows),
    "target text": Case("classes", t5, token_rows),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_two_steps_follow_the_gradients_of_the_objective_written_by_hand(tmp_path, case):
    teacher = case.build(hidden_size=16, num_hidden_layers=4, **case.config)
    student = case.build(hidden_size=12, num_hidden_layers=3, **case.config)
    rows, gradients = case.rows(), Gradients()
    trainer = make_trainer(
        tmp_path,
        student,
        teacher,
        rows,
        callbacks=[gradients],
        connector="linear",
        student_boundaries=STUDENT_ENDS,
        teacher_boundaries=TEACHER_ENDS,
        temperature=TEMPERATURE,
        per_device_train_batch_size=MICRO_BATCH,
        gradient_accumulation_steps=ACCUMULATION,
        train_sampling_strategy="sequential",
        num_train_epochs=1,
        **WEIGHTS,
        **{**PLAIN_SGD, "learning_rate": LEARNING_RATE},
    )
    by_hand, frozen, connectors = copy.deepcopy((student, teacher, trainer.connectors))
    attach(connectors, by_hand)
    trainer.train()
    logs = step_logs(trainer)
    assert len(gradients.steps) == len(logs) == 2

    batches = [batch_of(rows[start : start + MICRO_BATCH]) for start in range(0, len(rows), MICRO_BATCH)]
    for step, (actual, log) in enumerate(zip(gradients.steps, logs, strict=True)):
        loss = window_loss(
            case.task, (by_hand, frozen, connectors), batches[step * ACCUMULATION : (step + 1) * ACCUMULATION]
        )
        loss.backward()
        assert log["loss"] == pytest.approx(loss.item(), rel=1e-5)
        expected = {name: parameter.grad for name, parameter in by_hand.named_parameters()}
        assert max_difference(actual, expected) < 1e-5
        # So that no agreement is one of zeros.
        assert min(gradient.abs().max() for name, gradient in expected.items() if name.endswith("weight")) > 1e-4
        with torch.no_grad():
            for parameter in by_hand.parameters():
                parameter -= LEARNING_RATE * parameter.grad
        by_hand.zero_grad()


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].task not in ("several classes", "values")])
def test_the_micro_batches_of_a_window_have_different_numbers_of_labels(name):
    """Else a mean over each micro-batch would pass for a mean over the window."""
    case = CASES[name]
    numbers = [
        sum(counts(case.task, batch_of(rows), name)[0].item() for name in label_names(case.task))
        for rows in (case.rows()[i : i + MICRO_BATCH] for i in range(0, 4, MICRO_BATCH))
    ]
    assert numbers[0] != numbers[1]
    assert min(numbers) > 0
