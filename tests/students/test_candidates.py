"""Several students within a budget: what is measured once, what they are compared on, and what healing changes."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import PreTrainedModel

from hf_blockkd import find_layer_stack, make_student
from hf_blockkd.axes import following
from hf_blockkd.data.calibration import batches_for, held_out
from hf_blockkd.routing.dummy_inputs import dummy_inputs
from hf_blockkd.students import candidates, cutting
from hf_blockkd.students.budget import Budget, sizes_within
from hf_blockkd.students.healing import heal
from hf_blockkd.students.likeness import distance
from hf_blockkd.students.refitting import BATCH_SIZE, NUM_EXAMPLES

from ..helpers import tiny_models as tiny

ROWS = [
    {"input_ids": torch.randint(5, 60, (12,), generator=torch.Generator().manual_seed(number))} for number in range(64)
]


def teacher() -> PreTrainedModel:
    return tiny.tiny_gpt2(n_embd=32, n_layer=4, n_head=4, n_inner=64)


@torch.no_grad()
def kl(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    p, q = theirs.log_softmax(-1), ours.log_softmax(-1)
    return (p.exp() * (p - q)).sum().item()


@pytest.mark.parametrize("heal_steps", [0, 3])
def test_of_several_candidates_the_one_nearest_to_the_teacher_on_other_rows_is_returned(heal_steps):
    model = teacher()
    stack = find_layer_stack(model)
    sizes = [fit.sizes for fit in next(sizes_within(model, stack, Budget.of_parameters(0.5)))[:2]]
    cut_by, others = held_out(ROWS, NUM_EXAMPLES)
    batches = list(batches_for(model, others))
    students = [make_student(model, **size, data=cut_by, heal_steps=heal_steps) for size in sizes]
    distances = [sum(kl(one(**batch).logits, model(**batch).logits) for batch in batches) for one in students]
    best = students[distances.index(min(distances))]
    student = make_student(model, parameters=0.5, candidates=2, data=ROWS, heal_steps=heal_steps)
    assert student.config.to_dict() == best.config.to_dict()
    assert all(torch.equal(value, best.state_dict()[name]) for name, value in student.state_dict().items())


def test_what_does_not_hang_on_the_size_is_measured_once(monkeypatch):
    counts: Counter[str] = Counter()

    def counted(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        counts["rows"] += len(rows)
        return {"input_ids": torch.stack([row["input_ids"] for row in rows])}

    monkeypatch.setattr(cutting, "find_axes", counted("axes", following.find_axes))
    monkeypatch.setattr(cutting, "activation_scores", counted("scores", cutting.activation_scores))
    model = teacher()
    for number in (1, 3):
        counts.clear()
        make_student(model, parameters=0.5, candidates=number, data=ROWS, data_collator=collate, heal_steps=2)
        # All are measured on and fitted to; with several, a quarter of them is compared on instead.
        assert counts == {"axes": 1, "scores": 1, "rows": 2 * 64 if number == 1 else 2 * 48 + 16}


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter([{"input_ids": torch.full((8,), number)} for number in range(60)])


@pytest.mark.parametrize("make", [Stream, lambda: iter(Stream()), lambda: list(Stream())])
def test_candidates_are_compared_on_rows_that_they_were_not_cut_by(make, monkeypatch):
    seen: dict[str, set[int]] = {"cut": set(), "compared": set()}

    def refit(*args: Any) -> None:
        for batch in args[-1]:
            seen["cut"] |= set(batch["input_ids"].flatten().tolist())

    def measured(one: Any, other: Any, batches: list[dict[str, torch.Tensor]]) -> float:
        seen["compared"] |= {number for batch in batches for number in batch["input_ids"].flatten().tolist()}
        return 0.0

    monkeypatch.setattr(cutting, "refit", refit)
    monkeypatch.setattr(candidates, "distance", measured)
    make_student(teacher(), parameters=0.5, candidates=2, data=make())
    assert len(seen["cut"]) == 45
    assert seen["compared"] == set(range(60)) - seen["cut"]


@pytest.mark.parametrize("build", [tiny.tiny_gpt2, tiny.tiny_vit, tiny.tiny_t5])
def test_a_healed_student_is_nearer_to_its_teacher_and_nothing_else_changes(build):
    model = build().train()
    batches = [dummy_inputs(model, batch_size=8)] * 4
    student = make_student(model, num_layers=1)
    before, far = copy.deepcopy(model.state_dict()), distance(model, student, batches)
    state = torch.random.get_rng_state()
    with torch.no_grad():
        heal(model, student, batches, 8)
    assert distance(model, student, batches) < far
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in (*model.parameters(), *student.parameters()))
    assert student.training


def test_a_step_is_that_of_adamw_on_the_mean_divergence():
    model = teacher()
    student = make_student(model, num_layers=2)
    batches = list(batches_for(model, ROWS, batch_size=BATCH_SIZE))
    wanted = copy.deepcopy(student)
    optimizer = torch.optim.AdamW(wanted.parameters())
    for step, rate in enumerate((0.0, 1e-4, 2e-4, 1e-4)):
        batch = batches[step % len(batches)]
        p, q = model(**batch).logits.detach().log_softmax(-1), wanted(**batch).logits.log_softmax(-1)
        (p.exp() * (p - q)).sum(-1).mean().backward()
        torch.nn.utils.clip_grad_norm_(wanted.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    heal(model, student, batches, 4)
    for name, value in wanted.state_dict().items():
        assert torch.allclose(student.state_dict()[name], value, atol=1e-6), name


@pytest.mark.parametrize("number", [9, 15])
def test_too_few_rows_to_hold_some_out_are_refused(number):
    with pytest.raises(ValueError, match=rf"`data` has {number} examples, too few to hold out some of them; give it"):
        make_student(teacher(), parameters=0.5, candidates=2, data=ROWS[:number])
