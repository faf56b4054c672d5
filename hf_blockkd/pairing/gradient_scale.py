"""Gradients through a teacher that runs in float16: `GradientScale`."""

from __future__ import annotations

import torch


class GradientScale:
    """Makes gradients larger on their way back through the teacher's layers, and as they were before its inputs.

    A loss is a sum over the labels of a window divided by their number, so that the gradient of each logit is about as
    small as that number is large: in float16, most of it would be lost on the way, without a word. Powers of two change
    no bit of the other dtypes.

    Args:
        factor: A power of two, about the number of labels that the loss is divided by (`RowLosses.magnitude`).

    Example:
        ```python
        >>> import torch
        >>> from hf_blockkd.pairing.gradient_scale import GradientScale
        >>> scale, states = GradientScale(torch.tensor(65536.0)), torch.ones(2, requires_grad=True)
        >>> rows = scale.leave(scale.enter(states * 1.0).half() * 0.5)
        >>> (rows.sum() / 100_000).backward()
        >>> f"{states.grad[0].item():.2e}"
        '5.00e-06'

        ```
    """

    def __init__(self, factor: torch.Tensor) -> None:
        self.factor = factor

    def enter(self, states: torch.Tensor) -> torch.Tensor:
        """States on their way into the teacher's layers, at least in float32; their gradient is divided."""
        if states.requires_grad:
            # What the hook is set on must be used by the teacher alone.
            states = states.view_as(states)
            states.register_hook(lambda gradient: gradient / self.factor.to(gradient.device))
        return states

    def leave(self, states: torch.Tensor | None) -> torch.Tensor | None:
        """All that comes out of them: states, logits or a loss; those in float16 go on in float32."""
        if states is None or not states.requires_grad:
            return states
        states = states.float() if states.dtype == torch.float16 else states.view_as(states)
        states.register_hook(lambda gradient: gradient * self.factor.to(gradient))
        return states
