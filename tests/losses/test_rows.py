from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_blockkd.losses.divergences import DIVERGENCES
from hf_blockkd.losses.learners import LossWeights, block_kd_learners, distillation_loss
from hf_blockkd.losses.rows import IGNORED, RowLosses
from hf_blockkd.objectives.sampling import stone_weights
from hf_blockkd.pairing.tasks import Task

from ..helpers import references
from ..helpers import tiny_models as tiny

ROWS, CLASSES = 6, 4
SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"


def block_kd_loss(losses, student, teacher, stones, weights, task_weight=1.0, distill_weight=1.0, cross_weight=0.0):
    learners = block_kd_learners(student, stones, weights)
    return distillation_loss(losses, learners, teacher, LossWeights(task_weight, distill_weight, cross_weight))


def numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().numpy().astype(float)


def labelled_batch(name: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A model and a batch with labels, of each kind of loss that transformers has."""
    ids = torch.randint(3, tiny.VOCABULARY, (3, 7))
    token_labels = ids.clone()
    token_labels[0, :4], token_labels[2, 6] = IGNORED, IGNORED
    if name == "image":
        labels = torch.tensor([0, 4, 2])
        return tiny.tiny_vit(), {"pixel_values": torch.randn(3, 1, 8, 8), "labels": labels}
    if name == "multi label":
        model = tiny.tiny_bert(problem_type=MULTI)
        return model, {"input_ids": ids, "labels": torch.randint(2, (3, tiny.LABELS)).float()}
    if name == "regression":
        return tiny.tiny_bert(num_labels=1), {"input_ids": ids, "labels": torch.tensor([0.5, -99.0, 2.0])}
    if name == "regression of several":
        model = tiny.tiny_bert(num_labels=2, problem_type=REGRESSION)
        return model, {"input_ids": ids, "labels": torch.randn(3, 2)}
    if name == "causal":
        return tiny.tiny_llama(), {"input_ids": ids, "labels": token_labels}
    if name == "gpt2":
        return tiny.tiny_gpt2(), {"input_ids": ids, "labels": token_labels}
    if name == "seq2seq":
        return tiny.tiny_bart(), {"input_ids": ids, "labels": token_labels}
    if name == "masked":
        return tiny.tiny_bert("MaskedLM"), {"input_ids": ids, "labels": token_labels}
    if name == "tokens":
        labels = torch.where(token_labels == IGNORED, IGNORED, ids % tiny.LABELS)
        return tiny.tiny_bert("TokenClassification"), {"input_ids": ids, "labels": labels}
    if name == "choice":
        return tiny.tiny_bert("MultipleChoice"), {"input_ids": ids.view(1, 3, 7), "labels": torch.tensor([2])}
    positions = {"start_positions": torch.tensor([1, 0, 9]), "end_positions": torch.tensor([3, 6, 12])}
    return tiny.tiny_bert("QuestionAnswering"), {"input_ids": ids, **positions}


LABELLED = [
    "image",
    "multi label",
    "regression",
    "regression of several",
    "causal",
    "gpt2",
    "seq2seq",
    "masked",
    "tokens",
]


@pytest.mark.parametrize("name", [*LABELLED, "choice", "questions"])
def test_the_task_loss_is_the_models_own_in_value_and_gradient(name):
    model, inputs = labelled_batch(name)
    own = model(**inputs).loss
    own.backward()
    expected = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    task = Task.of(model)
    losses = RowLosses(task.problem(inputs), task.labels(inputs))
    ours = losses.task(losses.rows(task.logits(model(**inputs))))
    ours.backward()
    # transformers averages; the same sum divided in another order differs by rounding. Its question answering
    # loss is the mean over starts and over ends, which have equally many answers here.
    torch.testing.assert_close(ours, own, rtol=1e-5, atol=1e-6)
    assert expected
    for key, parameter in model.named_parameters():
        if key in expected:
            torch.testing.assert_close(parameter.grad, expected[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("starts", [[1, 0, 9], [2, 7, 50], [7, 7, 4]])
@pytest.mark.parametrize("ends", [[3, 8, 7], [6, 6, 2]])
def test_the_loss_of_answers_is_the_models_own_whichever_are_cut_off(starts, ends):
    model, inputs = labelled_batch("questions")
    inputs |= {"start_positions": torch.tensor(starts), "end_positions": torch.tensor(ends)}
    task, outputs = Task.of(model), model(**inputs)
    losses = RowLosses(SINGLE, task.labels(inputs), num_examples=3)
    ours = losses.task(losses.rows(task.logits(outputs)))
    torch.testing.assert_close(ours, outputs.loss, rtol=1e-6, atol=0.0)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = [
        torch.autograd.grad(one, parameters, retain_graph=True, allow_unused=True) for one in (ours, outputs.loss)
    ]
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_label_sets_weigh_alike_in_divergences_and_of_some_examples_too():
    labels = torch.tensor([1, IGNORED, 2, IGNORED, 0, IGNORED, IGNORED, IGNORED])  # two starts, one end
    student, teacher = torch.randn(8, CLASSES), torch.randn(8, CLASSES)
    losses = RowLosses(SINGLE, labels, num_examples=4)

    def distance(row):
        return (teacher[row].softmax(-1) * (teacher[row].log_softmax(-1) - student[row].log_softmax(-1))).sum()

    whole = losses.distill(losses.rows(student), losses.rows(teacher))
    torch.testing.assert_close(whole, (distance(0) + distance(2)) / 2 / 2 + distance(4) / 2)
    assert losses.rows_of_examples().tolist() == [0.75 + 1.5, 0.0, 0.75, 0.0]
    some, rows = losses.of_examples(torch.tensor([0, 1]))
    own = torch.tensor([0, 1, 4, 5])
    part = some.distill(some.rows(student[own]), some.rows(teacher[own]))
    torch.testing.assert_close(part, distance(0) / 4 + distance(4) / 2)
    assert rows.tolist() == [0, 2]


def test_a_window_without_any_start_counts_its_ends_alone():
    labels, logits = torch.tensor([IGNORED, IGNORED, 1, 2]), torch.randn(4, CLASSES, requires_grad=True)
    losses = RowLosses(SINGLE, labels, num_examples=2)
    losses.task(losses.rows(logits)).backward()
    assert torch.isfinite(logits.grad).all()
    torch.testing.assert_close(
        losses.task(losses.rows(logits)), torch.nn.functional.cross_entropy(logits[2:], labels[2:]) / 2
    )


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("garbage", [999.0, float("nan"), float("inf")])
def test_ignored_rows_change_nothing_and_get_no_gradient(divergence, garbage):
    labels = torch.tensor([1, IGNORED, 3, 0, IGNORED, 2])
    kept = labels != IGNORED
    rows = {name: torch.randn(ROWS, CLASSES) for name in ("student", "teacher", "stone")}

    def run(labels: torch.Tensor, student: torch.Tensor, teacher: torch.Tensor, stone: torch.Tensor):
        losses = RowLosses(SINGLE, labels, divergence=divergence, temperature=2.0)
        loss = block_kd_loss(
            losses, losses.rows(student), losses.rows(teacher), {1: losses.rows(stone)}, {1: 0.5}, cross_weight=0.3
        )
        loss.total.backward()
        return loss

    filled = {name: torch.where(kept[:, None], value, garbage).requires_grad_() for name, value in rows.items()}
    without = {name: value[kept].requires_grad_() for name, value in rows.items()}
    with_garbage, compact = run(labels, **filled), run(labels[kept], **without)
    for part in ("total", "task", "distill", "cross"):
        assert torch.equal(getattr(with_garbage, part), getattr(compact, part))
    for name in ("student", "stone"):
        assert torch.equal(filled[name].grad[~kept], torch.zeros(2, CLASSES))
        assert torch.equal(filled[name].grad[kept], without[name].grad)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_fully_ignored_batch_backpropagates_zeros(divergence):
    student = torch.randn(2, 3, CLASSES, requires_grad=True)
    losses = RowLosses(SINGLE, torch.full((2, 3), IGNORED), divergence=divergence)
    rows = losses.rows(student)
    loss = block_kd_loss(losses, rows, rows.detach(), {1: rows}, {1: 1.0}, cross_weight=1.0)
    loss.total.backward()
    assert loss.total.item() == 0.0
    assert torch.equal(student.grad, torch.zeros_like(student))


@pytest.mark.parametrize("problem", [SINGLE, MULTI, REGRESSION])
@pytest.mark.parametrize("cuts", [[6], [1, 5], [2, 2, 2], [1, 1, 1, 1, 1, 1]])
def test_micro_batches_add_up_to_the_whole_batch(problem, cuts):
    logits, target = torch.randn(ROWS, CLASSES), torch.randn(ROWS, CLASSES)
    labels = {
        SINGLE: torch.tensor([1, IGNORED, 3, IGNORED, 0, 2]),
        MULTI: torch.randint(2, (ROWS, CLASSES)).float(),
        REGRESSION: torch.randn(ROWS, CLASSES),
    }[problem]
    count = (labels != IGNORED).sum() if problem == SINGLE else labels.numel()

    def gradient(sizes: list[int], num_items: torch.Tensor | int | None) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = logits.clone().requires_grad_()
        total = torch.zeros(())
        parts = zip(leaf.split(sizes), target.split(sizes), labels.split(sizes), strict=True)
        for micro, micro_target, micro_labels in parts:
            losses = RowLosses(problem, micro_labels, num_items, temperature=2.0)
            rows = losses.rows(micro)
            total = total + losses.task(rows) + losses.distill(rows, losses.rows(micro_target))
        total.backward()
        return total, leaf.grad

    whole, whole_gradient = gradient([ROWS], None)
    summed, summed_gradient = gradient(cuts, count)
    torch.testing.assert_close(summed, whole, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(summed_gradient, whole_gradient, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_three_part_sum_is_the_one_written_by_hand(divergence):
    labels = torch.tensor([1, 0, 3, 2, 1, 0])
    student, teacher, *stones = (torch.randn(ROWS, CLASSES) for _ in range(5))
    weights = {1: 0.25, 2: 0.5, 3: 1.0}
    loss = block_kd_loss(
        RowLosses(SINGLE, labels, num_items=ROWS, divergence=divergence, temperature=3.0),
        student,
        teacher,
        dict(enumerate(stones, start=1)),
        weights,
        task_weight=0.7,
        distill_weight=1.3,
        cross_weight=0.2,
    )

    ensemble = (numpy(stones[0]) + numpy(stones[1]) + numpy(stones[2])) / 3

    def d(ours: torch.Tensor, theirs: np.ndarray) -> float:
        rows = references.divergence(numpy(ours), theirs, divergence, 3.0, labels=labels.numpy())
        return rows.sum() / ROWS

    def ce(ours: torch.Tensor) -> float:
        return references.cross_entropy(numpy(ours), labels.numpy()).sum() / ROWS

    task = ce(student) + 0.25 * ce(stones[0]) + 0.5 * ce(stones[1]) + 1.0 * ce(stones[2])
    distill, cross = (
        d(student, target) + 0.25 * d(stones[0], target) + 0.5 * d(stones[1], target) + 1.0 * d(stones[2], target)
        for target in (numpy(teacher), ensemble)
    )
    close = {"rel": 1e-5, "abs": 1e-5}
    assert loss.task.item() == pytest.approx(task, **close)
    assert loss.distill.item() == pytest.approx(distill, **close)
    assert loss.cross.item() == pytest.approx(cross, **close)
    assert loss.total.item() == pytest.approx(0.7 * task + 1.3 * distill + 0.2 * cross, **close)
    for index, stone in enumerate(stones, start=1):
        assert loss.learners[index].task.item() == pytest.approx(ce(stone), **close)
        assert loss.learners[index].distill.item() == pytest.approx(d(stone, numpy(teacher)), **close)


def test_without_stones_it_is_plain_distillation():
    labels, student, teacher = torch.tensor([0, 1]), torch.randn(2, CLASSES), torch.randn(2, CLASSES)
    losses = RowLosses(SINGLE, labels, temperature=2.0)
    loss = block_kd_loss(losses, student, teacher, {}, {}, cross_weight=1.0)
    assert torch.equal(loss.total, losses.task(student) + losses.distill(student, teacher))
    assert loss.cross.item() == 0.0
    assert loss.learners == {}


def test_targets_get_no_gradient():
    labels = torch.tensor([0, 1, 2])
    student, teacher, first, second = (torch.randn(3, CLASSES, requires_grad=True) for _ in range(4))
    losses = RowLosses(SINGLE, labels)
    block_kd_loss(losses, student, teacher, {1: first, 2: second}, {1: 0.5, 2: 1.0}, cross_weight=1.0).total.backward()
    assert teacher.grad is None
    assert all(tensor.grad.abs().max() > 0 for tensor in (student, first, second))


def test_the_ensemble_is_a_constant_for_its_members():
    labels = torch.tensor([0, 1, 2])
    student, first, second = (torch.randn(3, CLASSES, requires_grad=True) for _ in range(3))
    losses = RowLosses(SINGLE, labels)
    loss = block_kd_loss(losses, student, student, {1: first, 2: second}, {1: 0.5, 2: 1.0}, 0.0, 0.0, 1.0)
    loss.total.backward()
    ensemble = (numpy(first) + numpy(second)) / 2

    def with_first(x: np.ndarray) -> float:
        return 0.5 * references.divergence(x, ensemble).sum() / 3

    np.testing.assert_allclose(first.grad, references.gradient(with_first, numpy(first)), rtol=1e-3, atol=1e-5)


def test_multi_label_divergences_compare_each_class_alone():
    student, teacher = torch.randn(3, CLASSES), torch.randn(3, CLASSES)
    losses = RowLosses(MULTI, torch.zeros(3, CLASSES), temperature=2.0)
    total = 0.0
    for ours, theirs in zip(numpy(student).flatten(), numpy(teacher).flatten(), strict=True):
        p, q = 1 / (1 + np.exp(-theirs / 2)), 1 / (1 + np.exp(-ours / 2))
        total += 4 * (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)))
    value = losses.distill(losses.rows(student), losses.rows(teacher)).item()
    assert value == pytest.approx(total / 12, rel=1e-5)


def test_regression_distils_the_squared_error_of_rows_without_a_label_too():
    losses = RowLosses(REGRESSION, torch.tensor([-100.0, 1.0]))
    student, teacher = torch.tensor([[-98.0], [4.0]]), torch.tensor([[1.0], [2.0]])
    assert losses.task(losses.rows(student)).item() == 3.0**2
    assert losses.distill(losses.rows(student), losses.rows(teacher)).item() == (99.0**2 + 2.0**2) / 2


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("num_items", [None, torch.tensor([[7], [9]])])
def test_rows_without_a_label_are_distilled_and_each_loss_has_its_own_number_of_rows(divergence, num_items):
    labels = torch.tensor([1, IGNORED, 3, 0, IGNORED, IGNORED])
    distilled = torch.tensor([True, True, True, True, False, True])
    losses = RowLosses(
        SINGLE, labels, num_items, divergence=divergence, temperature=2.0, label_smoothing=0.1, distilled=distilled
    )
    student, teacher = torch.randn(ROWS, CLASSES), torch.randn(ROWS, CLASSES)
    num_labels, num_distilled = (3, 5) if num_items is None else (7, 9)
    labelled = labels != IGNORED
    task = torch.nn.functional.cross_entropy(student[labelled], labels[labelled], reduction="sum", label_smoothing=0.1)
    torch.testing.assert_close(losses.task(losses.rows(student)), task / num_labels)
    # Decoupled distillation takes the teacher's class where there is no label.
    classes = torch.where(labelled, labels, teacher.argmax(-1))[distilled].numpy()
    rows = references.divergence(numpy(student)[distilled], numpy(teacher)[distilled], divergence, 2.0, labels=classes)
    found = losses.distill(losses.rows(student), losses.rows(teacher)).item()
    assert found == pytest.approx(rows.sum() / num_distilled, rel=1e-5)
    assert len(losses) == 5
    assert losses.rows_of_examples().tolist() == [1, 1, 1, 1, 0, 1]


def test_vocabularies_that_differ_by_padding_are_compared_on_what_they_share():
    labels = torch.tensor([0, 2])
    narrow, wide = torch.randn(2, 3, requires_grad=True), torch.randn(2, 5, requires_grad=True)
    losses = RowLosses(SINGLE, labels)
    expected = references.divergence(numpy(narrow), numpy(wide)[:, :3]).mean()
    assert losses.distill(narrow, wide).item() == pytest.approx(expected, rel=1e-5)
    losses.distill(wide, narrow).backward()
    assert torch.equal(wide.grad[:, 3:], torch.zeros(2, 2))
    assert wide.grad[:, :3].abs().min() > 0


def test_parts_of_the_rows_add_up_to_all_of_them():
    labels = torch.tensor([1, IGNORED, 3, 0, 2, IGNORED])
    losses = RowLosses(SINGLE, labels, divergence="dkd")
    rows, target = (losses.rows(torch.randn(ROWS, CLASSES)) for _ in range(2))
    slices = [slice(0, 1), slice(1, 4)]
    assert len(losses) == 4
    for whole, parts in (
        (losses.task(rows), [losses.part(s).task(rows[s]) for s in slices]),
        (losses.distill(rows, target), [losses.part(s).distill(rows[s], target[s]) for s in slices]),
    ):
        torch.testing.assert_close(sum(parts), whole)


def test_rows_lead_back_to_their_examples():
    tokens = RowLosses(SINGLE, torch.tensor([[1, 2, 3], [IGNORED, IGNORED, 0], [1, IGNORED, 2]]))
    wrong = torch.zeros(6, CLASSES, dtype=torch.bool)
    wrong[3, 2] = wrong[5, 0] = wrong[5, 1] = True  # the only label of example 1, the last one of example 2
    assert tokens.examples(wrong) == [1, 2]
    classes = RowLosses(MULTI, torch.zeros(3, CLASSES))
    assert classes.examples(torch.arange(3 * CLASSES) == 2 * CLASSES - 1) == [1]


def test_label_smoothing_mixes_in_the_uniform_distribution():
    logits, labels = torch.randn(5, CLASSES), torch.tensor([0, 3, 1, 2, 2])
    log_p = np.log(references.softmax(numpy(logits)))
    by_hand = -(0.9 * log_p[np.arange(5), labels] + 0.1 * log_p.mean(-1)).mean()
    assert RowLosses(SINGLE, labels, label_smoothing=0.1).task(logits).item() == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.parametrize("problem", [SINGLE, MULTI, REGRESSION])
def test_half_precision_logits_are_compared_in_float32(problem):
    labels = torch.tensor([0, 1]) if problem == SINGLE else torch.ones(2, CLASSES)
    losses = RowLosses(problem, labels)
    rows, target = losses.rows(torch.randn(2, CLASSES).bfloat16()), losses.rows(torch.randn(2, CLASSES).bfloat16())
    for value, wide in (
        (losses.task(rows), losses.task(rows.float())),
        (losses.distill(rows, target), losses.distill(rows.float(), target.float())),
    ):
        assert value.dtype == torch.float32
        assert torch.equal(value, wide)


def test_stone_weights_halve_away_from_the_student():
    assert stone_weights([1, 2, 3, 4], 4) == {1: 0.125, 2: 0.25, 3: 0.5, 4: 1.0}
    assert stone_weights([2], 4) == {2: 0.25}
    assert stone_weights([1, 3], 4, "uniform") == {1: 1.0, 3: 1.0}
    with pytest.raises(ValueError, match="Unknown stone weighting 'double'; choose 'halving' or 'uniform'"):
        stone_weights([1], 1, "double")


@pytest.mark.parametrize("options", [{"divergence": "dkd"}, {"standardize": True}])
def test_options_without_meaning_for_two_way_distributions_are_refused(options):
    with pytest.raises(ValueError, match="has no meaning for multi-label problems"):
        RowLosses(MULTI, torch.zeros(2, 3), **options)
    assert RowLosses(SINGLE, torch.zeros(2).long(), **options).mean.num_items == 2


def test_an_unknown_problem_type_is_refused():
    with pytest.raises(ValueError, match="Unknown problem type 'ranking'"):
        RowLosses("ranking", torch.zeros(2))
