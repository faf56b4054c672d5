"""The learning rate that is taken where nobody says one."""

import pytest

from hf_blockkd.training.learning_rate import HIGHEST, LOWEST, NUM_STEPS, usual_rate


def test_it_falls_with_the_square_of_the_width_between_two_ends():
    assert usual_rate(400) == pytest.approx(usual_rate(200) / 4)
    assert usual_rate(8) == HIGHEST
    assert usual_rate(10_000) == LOWEST


def test_it_is_a_quarter_where_outputs_alone_are_compared():
    assert usual_rate(200, compares_states=False) == pytest.approx(usual_rate(200) / 4)


def test_a_short_run_has_less_and_a_long_one_no_more():
    assert usual_rate(64, num_steps=NUM_STEPS // 4) == pytest.approx(HIGHEST / 4)
    assert usual_rate(64, num_steps=10 * NUM_STEPS) == HIGHEST
