from __future__ import annotations

import pytest
import torch

from hf_blockkd.axes.axis import Axis, cut, entries, find, fix, leaves, places, product, regroup, split, total, unify
from hf_blockkd.axes.matching import matches
from hf_blockkd.axes.rules import RULES, Call


def test_two_views_of_one_axis_are_refined_to_what_both_are_made_of():
    axis, other = Axis(24), Axis(24)
    split(axis, 4, 6)
    split(other, 12, 2)
    unify(axis, other)
    assert str(axis) == str(other) == "4*3*2"
    assert list(leaves(axis)) == list(leaves(other))


def test_halves_that_are_added_to_each_other_are_one():
    axis = Axis(8)
    first, second = cut(axis, 0, 4), cut(axis, 4, 4)
    turned = total([second, first])  # rotary embeddings
    unify(turned, axis)
    assert find(first) is find(second)


def test_a_sum_of_equal_parts_divides_into_heads():
    fused = Axis(3 * 12)
    queries = cut(fused, 0, 12)
    cut(fused, 12, 12)
    heads, within = split(fused, 9, 4)
    assert (str(heads), within.size) == ("(3 + 3 + 3)", 4)
    assert str(queries) == "3*4"


def test_what_does_not_divide_stays_as_it_is():
    axis = Axis(12)
    split(axis, 3, 4)
    split(axis, 2, 6)
    assert all(leaf.fixed for leaf in leaves(axis))


def test_reasons_reach_all_that_an_axis_is_the_same_as():
    axis, other = Axis(6), Axis(6)
    split(axis, 2, 3)
    fix(other, "because")
    unify(axis, other)
    assert {leaf.fixed for leaf in leaves(axis)} == {"because"}


def test_a_view_divides_and_joins_dimensions_as_torch_does():
    batch, length, width = Axis(2), Axis(5), Axis(12)
    flat = regroup([batch, length, width], (10, 12))
    assert list(leaves(flat[0])) == [batch, length]
    heads = regroup(flat, (2, 5, 1, 3, 4))
    assert [axis.size for axis in heads] == [2, 5, 1, 3, 4]
    assert (find(heads[0]), find(heads[1])) == (batch, length)
    assert str(width) == "3*4"


def test_a_view_that_mixes_some_dimensions_says_nothing_about_the_others():
    """XLNet's shift of relative positions: what cannot be followed are places, and heads stay what they are."""
    heads, rows, columns, width = Axis(4), Axis(6), Axis(8), Axis(5)
    made = regroup([heads, rows, columns, width], (4, 1, 8, 6, 5))
    assert (find(made[0]), find(made[4])) == (heads, width)
    assert not heads.fixed
    assert not width.fixed
    assert all(axis.fixed for axis in (*leaves(rows), *leaves(columns), *leaves(made[2]), *leaves(made[3])))


def test_entries_are_those_that_torch_would_index():
    axis = product([Axis(3), total([Axis(2), Axis(3)])])
    outer, first, second = leaves(axis)
    table = torch.arange(15).reshape(3, 5)
    wanted = table[[2, 0]][:, [1, 0, 2, 4]].flatten().tolist()
    assert entries(axis, {outer: [2, 0], first: [1, 0], second: [0, 2]}) == wanted


def test_places_say_whose_entry_each_is():
    axis = product([Axis(2), total([Axis(1), Axis(2)])])
    outer, first, second = leaves(axis)
    assert places(axis) == {
        outer: [0, 0, 0, 1, 1, 1],
        first: [0, -1, -1, 0, -1, -1],
        second: [-1, 0, 1, -1, 0, 1],
    }


def test_one_group_that_leaves_no_trace_is_found_again():
    wide, narrow = Axis(24), Axis(6)
    groups, rest = split(wide, 2, 12)
    queries, within = split(rest, 3, 4)
    split(narrow, 3, 2)
    assert matches(wide, narrow) == [{groups: 1, queries: 3, within: 2}]


def test_axes_that_are_made_otherwise_do_not_match():
    wide, narrow = Axis(12), Axis(6)
    split(wide, 3, 4)
    cut(narrow, 0, 2)
    assert matches(wide, narrow) == []


def test_a_part_of_one_entry_is_found_again():
    wide, narrow = Axis(17), Axis(17)
    for axis in (wide, narrow):
        cut(axis, 0, 1)
        split(cut(axis, 1, 16), 4, 4)
    assert [list(sizes.values()) for sizes in matches(wide, narrow)] == [[1, 4, 4]]


def test_one_group_and_one_query_of_each_are_both_ways_to_keep_two_of_four():
    wide, narrow = Axis(24), Axis(12)
    groups, rest = split(wide, 2, 12)
    queries, within = split(rest, 2, 6)
    split(narrow, 2, 6)
    ways = [{groups: 2, queries: 1, within: 6}, {groups: 1, queries: 2, within: 6}]
    assert matches(wide, narrow) == ways


def test_parts_of_one_head_that_stand_in_a_sum_are_found_again():
    wide, narrow = Axis(24), Axis(14)
    for axis, heads, width in ((wide, 3, 12), (narrow, 1, 4)):
        _, within = split(cut(axis, 0, width), heads, 4)
        cut(within, 0, 2)
    assert str(narrow) == "(2 + 2 + 10)"
    (sizes,) = matches(wide, narrow)
    assert list(sizes.values()) == [1, 2, 2, 10]


@pytest.mark.parametrize("given", [{"stable": True, "dim": 0}, {"dim": 0, "descending": True}])
def test_what_is_sorted_stays_where_it_is_and_the_rest_does_not(given):
    axes = [Axis(2), Axis(3), Axis(4)]
    RULES["sort"](Call("sort", (), []), axes, **given)
    assert [axis.fixed for axis in axes] == ["`sort` reads it as a whole", None, None]
