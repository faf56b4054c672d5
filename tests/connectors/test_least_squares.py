"""Affine maps from moments, against torch's own least squares on the rows themselves."""

from __future__ import annotations

import pytest
import torch

from hf_blockkd.connectors.least_squares import LeastSquares, TunedLeastSquares


def rows(number: int = 60, width: int = 5, outputs: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(number, width, dtype=torch.float64) * torch.tensor([1.0, 3.0, 0.1, 1.0, 2.0]) + 1.0
    return x, x @ torch.randn(width, outputs).double() + torch.randn(number, outputs) + 2.0


def fitted(x: torch.Tensor, y: torch.Tensor) -> LeastSquares:
    fit = LeastSquares()
    for some_x, some_y in zip(x.split(7), y.split(7), strict=True):
        fit.add(some_x, some_y)
    return fit


@pytest.mark.parametrize("bias", [True, False])
def test_without_a_ridge_it_is_torchs_least_squares(bias):
    x, y = rows()
    weight, offset = fitted(x, y).solve(ridge=0.0, bias=bias)
    inputs = torch.cat([x, torch.ones_like(x[:, :1])], dim=1) if bias else x
    wanted = torch.linalg.lstsq(inputs, y).solution
    assert torch.allclose(weight.T, wanted[:5])
    assert torch.allclose(offset, wanted[5] if bias else torch.zeros(3).double())


def test_what_is_nothing_beside_the_other_inputs_gets_no_weight():
    """A norm may scale a channel to next to nothing: its weight would be as large as that is small."""
    x, y = rows()
    x[:, 2] *= 1e-30
    weight, _ = fitted(x, y).solve(ridge=1e-6)
    assert torch.equal(weight[:, 2], torch.zeros(3).double())
    rest, _ = fitted(x[:, [0, 1, 3, 4]], y).solve(ridge=1e-6)
    assert torch.allclose(weight[:, [0, 1, 3, 4]], rest)


def test_an_input_that_hardly_varies_beside_the_others_gets_no_large_weight():
    x, _ = rows()
    x /= x.std(0)
    y = x[:, [0, 1, 2]].clone()
    usual, _ = fitted(x, y).solve(ridge=1.0)
    x[:, 2] *= 1e-4
    weight, _ = fitted(x, y).solve(ridge=1.0)
    assert usual[2, 2] > 0.3  # which is 3,000 of the small input
    assert weight[:, 2].abs().max() < 0.03
    rest, _ = fitted(x[:, [0, 1, 3, 4]], y).solve(ridge=1.0)
    assert torch.allclose(weight[:, [0, 1, 3, 4]], rest, atol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
def test_a_ridge_is_paid_for_weights_of_standardised_inputs(bias):
    x, y = rows()
    weight, offset = fitted(x, y).solve(ridge=0.5, bias=bias)
    means = (x.mean(0), y.mean(0)) if bias else (0.0, 0.0)
    own, wanted = x - means[0], y - means[1]
    scale = own.square().mean(0).sqrt()
    scale = torch.maximum(scale, 0.1 * scale.median())  # less counts as if it varied so
    penalty = (0.5 * len(x)) ** 0.5 * torch.eye(5, dtype=torch.float64)
    solution = torch.linalg.lstsq(torch.cat([own / scale, penalty]), torch.cat([wanted, torch.zeros(5, 3)])).solution
    assert torch.allclose(weight.T, solution / scale[:, None])
    assert torch.allclose(x @ weight.T + offset, own @ weight.T + means[1])


def test_an_error_is_that_on_the_rows_less_that_of_zero():
    x, y = rows()
    weight, bias = torch.randn(3, 5).double(), torch.randn(3).double()
    squares = [(y - answer).square().sum(1).mean() for answer in (x @ weight.T + bias, torch.zeros_like(y))]
    assert fitted(x, y).error(weight, bias) == pytest.approx((squares[0] - squares[1]).item())


def test_an_input_that_never_changes_belongs_to_the_bias():
    x, y = rows()
    x[:, 2] = 7.0
    weight, bias = fitted(x, y).solve(ridge=1e-3)
    assert torch.equal(weight[:, 2], torch.zeros(3).double())
    assert torch.allclose((x @ weight.T + bias).mean(0), y.mean(0))


@pytest.mark.parametrize("bias", [True, False])
def test_the_ridge_is_that_which_errs_least_on_every_fourth_batch(bias):
    x, y = (tensor.split(6) for tensor in rows(96))
    tuned, seen, held_out = TunedLeastSquares(), LeastSquares(), LeastSquares()
    for number, (own, wanted) in enumerate(zip(x, y, strict=True), start=1):
        tuned.add(own, wanted)
        (seen if number % 4 else held_out).add(own, wanted)
    errors = {ridge: held_out.error(*seen.solve(ridge, bias)) for ridge in TunedLeastSquares.RIDGES}
    wanted = fitted(torch.cat(x), torch.cat(y)).solve(min(errors, key=errors.get), bias)
    for ours, theirs in zip(tuned.solve(bias), wanted, strict=True):
        assert torch.allclose(ours, theirs)


def test_there_is_no_map_where_held_out_rows_say_the_opposite():
    tuned = TunedLeastSquares()
    for number in range(1, 9):
        x = torch.randn(6, 2)
        tuned.add(x, -x if number % 4 == 0 else x)
    assert tuned.solve() is None


def test_nothing_to_learn_is_no_map():
    assert TunedLeastSquares().solve() is None
    tuned = TunedLeastSquares()
    for _ in range(4):
        tuned.add(torch.randn(4, 2), torch.zeros(4, 2))
    assert tuned.solve() is None
