"""Blocks and layers by what blocks cost: worked by hand, and what holds whatever the costs."""

import itertools
import random

import pytest

from hf_blockkd import BlockMap
from hf_blockkd.plan.rebalancing import rebalance


@pytest.mark.parametrize(
    ("student", "teacher", "costs", "ends", "layers"),
    [
        # Layers cost 0.03, 0.03, twice 0.05 of their mean 0.015, 0.015 and 0.015: a third of it all is 0.0305.
        ((1, 2, 3), (2, 4, 6), (0.06, 0.0, 0.03), (1, 3, 6), [0, 1, 5]),
        ((1, 2, 3), (2, 4, 6), (0.03, 0.0, 0.06), (3, 5, 6), [0, 4, 5]),
        # Half of 6 + 2 is 4: two of three layers that cost 2 each.
        ((1, 2), (3, 6), (6.0, 2.0), (2, 6), [0, 5]),
        # A block of two layers that costs as much as one of one has twice the work.
        ((2, 3), (4, 6), (1.0, 1.0), (4, 6), [0, 3, 5]),
        ((1, 3), (3, 9), (1.0, 1.0), (3, 9), [0, 4, 8]),
        ((1, 3), (3, 9), (3.0, 1.0), (2, 9), [0, 2, 8]),
        # No layer of the student's answers for less than one of the teacher's.
        ((2, 4), (3, 6), (5.0, 0.0), (2, 6), [0, 1, 2, 5]),
        ((2, 4), (3, 6), (0.0, 5.0), (4, 6), [0, 3, 4, 5]),
        ((1,), (6,), (1.0,), (6,), [0]),
        # What is below zero counts as what costs nothing.
        ((1, 2, 3), (2, 4, 6), (0.06, -0.5, 0.03), (1, 3, 6), [0, 1, 5]),
    ],
)
def test_the_teachers_layers_are_shared_out_by_their_cost(student, teacher, costs, ends, layers):
    found = rebalance(BlockMap.from_boundaries(student, teacher), costs)
    assert found.block_map == BlockMap.from_boundaries(student, ends)
    assert found.layers == layers


def test_equal_costs_leave_an_even_cut_as_it_is():
    for depth, teacher_depth, blocks in ((3, 6, 3), (2, 8, 2), (8, 24, 4), (6, 12, 2)):
        even = BlockMap.even(depth, teacher_depth, blocks)
        assert rebalance(even, [0.1] * blocks).block_map == even


def test_every_layer_has_a_place_whatever_the_costs():
    draws = random.Random(0)
    for _ in range(2000):
        teacher_depth = draws.randint(2, 14)
        depth = draws.randint(1, teacher_depth - 1)
        blocks = draws.randint(1, depth)
        ends = [[*sorted(draws.sample(range(1, size), blocks - 1)), size] for size in (depth, teacher_depth)]
        costs = [draws.choice([0.0, -1.0, draws.random(), 9 * draws.random()]) for _ in range(blocks - 1)] + [0.1]
        found = rebalance(BlockMap.from_boundaries(*ends), costs)
        assert found.block_map.student == tuple(ends[0])
        found.block_map.check_depths(depth, teacher_depth)
        assert found.layers == sorted(set(found.layers))
        assert len(found.layers) == depth
        spans = (itertools.pairwise((0, *one)) for one in (found.block_map.student, found.block_map.teacher))
        for (start, end), (first, last) in zip(*spans, strict=True):
            assert last - first >= end - start
            assert all(first <= layer < last for layer in found.layers[start:end])


@pytest.mark.parametrize(
    ("student", "teacher", "costs", "message"),
    [
        ((1, 2), (2, 4), (0.1,), "There are 1 costs and 2 blocks"),
        ((2, 4), (2, 4), (0.1, 0.2), "The student has 4 layers and the teacher 4, so that none is left"),
        ((1, 2), (2, 4), (0.0, -0.1), "No block costs anything"),
        ((1, 2), (2, 4), (float("nan"), -0.1), "not all finite"),
        ((1, 2), (2, 4), (0.1, float("nan")), "not all finite"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(student, teacher, costs, message):
    with pytest.raises(ValueError, match=message):
        rebalance(BlockMap.from_boundaries(student, teacher), costs)
