"""Affine maps fitted to pairs of states: `LeastSquares`."""

from __future__ import annotations

import torch


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

    def solve(self, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight (D', D) and bias (D') as of `nn.Linear`, with a penalty on the weights of standardised inputs."""
        width = len(self.moments) - 1
        means = self.moments[0, 1:] / self.moments[0, 0]
        seconds = self.moments[1:, 1:] / self.moments[0, 0]
        covariance = seconds - means[:width, None] * means
        variance, second = covariance.diagonal(), seconds.diagonal()
        # What never changes belongs to the bias.
        scale = torch.where(variance > 1e-10 * second, variance.clamp(min=1e-300).rsqrt(), 0.0)[:, None]
        inputs = scale * covariance[:, :width] * scale.T + ridge * torch.eye(width).to(scale)
        inputs.diagonal()[scale[:, 0] == 0] = 1.0
        weight = scale * torch.linalg.solve(inputs, scale * covariance[:, width:])
        return weight.T, means[width:] - means[:width] @ weight
