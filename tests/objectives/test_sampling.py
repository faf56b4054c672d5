"""The draw of stones: an unbiased estimate of all of them, the same however a batch is split."""

import itertools
import random

import pytest
import torch

from hf_blockkd.objectives.sampling import draw_stones, sampling_shares, stone_weights

WEIGHTS = stone_weights([1, 2, 3, 4], 4)
LAYERS = {1: 9, 2: 6, 3: 3, 4: 0}
STEPS = 6000


def draw(mode, by="weight", **options):
    settings = {"seed": 3, "step": 0, "num_examples": 16, **options}
    return draw_stones(mode, WEIGHTS, sampling_shares(WEIGHTS, LAYERS, by), **settings)


@pytest.mark.parametrize("by", ["uniform", "weight", "cost"])
@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("sample", {}),
        ("sample", {"stones_per_step": 2}),
        ("sample", {"stones_per_step": 3, "fraction": 0.5, "every": 2}),
        ("share", {}),
        ("share", {"fraction": 0.25}),
        ("share", {"fraction": 0.5, "every": 3}),
        ("all", {"fraction": 0.3}),
        ([1, 2, 3, 4], {"fraction": 0.3, "every": 2}),
    ],
)
def test_every_example_counts_for_every_stone_what_it_counts_without_a_draw(mode, options, by):
    total = {i: torch.zeros(16) for i in WEIGHTS}
    for step in range(STEPS):
        for i, part in draw(mode, by, step=step, **options).items():
            total[i][slice(None) if part.examples is None else part.examples] += part.weight
    for i, weight in WEIGHTS.items():
        mean = total[i] / STEPS
        assert mean.mean().item() == pytest.approx(weight, rel=0.12)
        assert mean.std() < 0.25 * weight + 0.02


def test_an_example_is_shared_out_to_one_stone_and_all_shares_count_the_same():
    for step in range(50):
        drawn = draw("share", step=step)
        assert sorted(itertools.chain.from_iterable(part.examples.tolist() for part in drawn.values())) == [*range(16)]
        assert all(part.weight == pytest.approx(sum(WEIGHTS.values())) for part in drawn.values())
        for i, part in drawn.items():
            assert part.rate == pytest.approx(WEIGHTS[i] / sum(WEIGHTS.values()))
            assert abs(len(part.examples) - 16 * part.rate) < 3
            assert torch.equal(part.examples, part.examples.sort().values)


def test_a_batch_is_shared_out_alike_however_it_is_split():
    whole = draw("share", step=5, fraction=0.8)
    for size in (1, 3, 8):
        found = {i: [] for i in WEIGHTS}
        for first in range(0, 16, size):
            part = draw("share", step=5, fraction=0.8, num_examples=min(size, 16 - first), first_example=first)
            for i, share in part.items():
                found[i] += [first + example for example in share.examples.tolist()]
        assert found == {i: share.examples.tolist() for i, share in whole.items()}


def test_the_draw_leaves_the_random_state_alone_and_follows_from_seed_and_step():
    state = random.getstate(), torch.get_rng_state()
    first = [sorted(draw("sample", step=step)) for step in range(40)]
    assert random.getstate() == state[0]
    assert torch.equal(torch.get_rng_state(), state[1])
    assert first == [sorted(draw("sample", step=step)) for step in range(40)]
    assert first != [sorted(draw("sample", step=step, seed=4)) for step in range(40)]


@pytest.mark.parametrize("by", ["uniform", "weight", "cost"])
@pytest.mark.parametrize("per_step", [1, 2, 3, 4])
def test_a_sample_has_as_many_different_stones_as_asked_for(per_step, by):
    assert {len(draw("sample", by, step=step, stones_per_step=per_step)) for step in range(200)} == {per_step}


def test_a_sample_of_all_stones_is_all_of_them():
    assert draw("sample", stones_per_step=4) == draw("all")


def test_the_shares_are_those_of_the_formulas():
    assert sampling_shares(WEIGHTS, LAYERS, "uniform") == dict.fromkeys(WEIGHTS, 0.25)
    assert sampling_shares(WEIGHTS, LAYERS, "weight") == pytest.approx({1: 1 / 15, 2: 2 / 15, 3: 4 / 15, 4: 8 / 15})
    raw = {1: 0.125 / 10**0.5, 2: 0.25 / 7**0.5, 3: 0.5 / 2, 4: 1.0}
    by_cost = sampling_shares(WEIGHTS, LAYERS, "cost")
    assert by_cost == pytest.approx({i: value / sum(raw.values()) for i, value in raw.items()})
