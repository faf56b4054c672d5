"""Affine maps fitted to pairs of states: `LeastSquares`, `TunedLeastSquares`."""

from __future__ import annotations

import torch

LEAST = 0.1
"""Of the median input's standard deviation: what varies less counts as if it varied so, and hardly gets a weight."""


class LeastSquares:
    """The affine map from rows of x to rows of y with the least squared error, from the moments of both.

    Args:
        device: Where the moments are summed, in float64.

    Example:
        ```python
        >>> import torch
        >>> from hf_blockkd.connectors.least_squares import LeastSquares
        >>> x = torch.tensor([[1.0], [2.0], [4.0]])
        >>> fit = LeastSquares()
        >>> fit.add(x, 3 * x + 1)
        >>> weight, bias = fit.solve(ridge=0.0)
        >>> round(weight.item(), 6), round(bias.item(), 6)
        (3.0, 1.0)

        ```
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = device
        self.moments: torch.Tensor | None = None

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Take in rows: x (N, D) and y (N, D')."""
        x, y = (rows.to(self.device).double() for rows in (x, y))
        with_one = torch.cat([torch.ones_like(x[:, :1]), x], dim=1)
        moments = with_one.T @ torch.cat([with_one, y], dim=1)
        self.moments = moments if self.moments is None else self.moments + moments

    def solve(self, ridge: float, bias: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight (D', D) and bias (D') as of `nn.Linear`, with a penalty on the weights of standardised inputs.

        Those that hardly vary beside the others (`LEAST`) are measured by the others.
        Without a bias, which is zero then, inputs are measured from zero.
        """
        width = len(self.moments) - 1
        means = self.moments[0, 1:] / self.moments[0, 0] * (1.0 if bias else 0.0)
        seconds = self.moments[1:, 1:] / self.moments[0, 0]
        covariance = seconds - means[:width, None] * means
        variance, second = covariance.diagonal(), seconds.diagonal()
        # What never changes belongs to the bias, and so does what float32 cannot tell from it beside the other inputs.
        varies = (variance > 1e-10 * second) & (variance > 1e-14 * variance.max())
        # A channel that hardly varies beside the others, as a norm with a weight near zero leaves it, would get a
        # weight as large as it is small, and with it nearly all of the gradient of what comes before.
        usual = variance[varies].median() if varies.any() else torch.ones_like(variance[0])
        scale = torch.where(varies, torch.maximum(variance, LEAST**2 * usual).rsqrt(), 0.0)[:, None]
        inputs = scale * covariance[:, :width] * scale.T + ridge * torch.eye(width).to(scale)
        inputs.diagonal()[scale[:, 0] == 0] = 1.0
        weight = scale * torch.linalg.solve(inputs, scale * covariance[:, width:])
        return weight.T, means[width:] - means[:width] @ weight

    def error(self, weight: torch.Tensor, bias: torch.Tensor) -> float:
        """Mean squared error of a map on these rows, less that of one which answers zero."""
        both = torch.cat([bias[None], weight.T])
        width, count = len(self.moments), self.moments[0, 0]
        inputs, products = self.moments[:, :width], self.moments[:, width:]
        return (((both * (inputs @ both)).sum() - 2 * (both * products).sum()) / count).item()


class TunedLeastSquares:
    """Least squares whose ridge is the one that errs least on rows that are held out: those of every fourth `add`.

    Args:
        device: Where the moments are summed.

    Example:
        ```python
        >>> import torch
        >>> from hf_blockkd.connectors.least_squares import TunedLeastSquares
        >>> fit = TunedLeastSquares()
        >>> for _ in range(4):
        ...     x = torch.randn(8, 2)
        ...     fit.add(x, 3 * x + 1)
        >>> weight, bias = fit.solve()
        >>> (weight - 3 * torch.eye(2)).abs().max() < 0.01, (bias - 1).abs().max() < 0.01
        (tensor(True), tensor(True))

        ```
    """

    RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.parts = LeastSquares(device), LeastSquares(device)
        self.calls = 0

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Take in rows: x (N, D) and y (N, D')."""
        self.calls += 1
        self.parts[self.calls % 4 == 0].add(x, y)

    def solve(self, bias: bool = True) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Weight (D', D) and bias (D') from all rows; `None` where there are none, or no map helps."""
        seen, held_out = self.parts
        if seen.moments is None:
            return None
        if held_out.moments is None:
            return seen.solve(self.RIDGES[-2], bias)
        errors = {ridge: held_out.error(*seen.solve(ridge, bias)) for ridge in self.RIDGES}
        best = min(errors, key=errors.__getitem__)
        if not errors[best] < 0:
            return None
        seen.moments += held_out.moments
        return seen.solve(best, bias)
