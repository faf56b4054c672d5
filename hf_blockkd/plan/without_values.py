"""Models of any size without memory: tensors that have a shape and no values, `without_values`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.initialization import no_init_weights

aten = torch.ops.aten
INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)


@contextmanager
def without_values() -> Iterator[None]:
    """Whatever is made inside, models and batches, has shapes and dtypes, and takes no memory.

    Where a program looks at a value, it finds what an ordinary batch would show: conditions hold, numbers are 0, no
    position is masked. What is computed is not looked at, so a routing cannot be tested here.

    Example:
        ```python
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from hf_blockkd.plan.without_values import without_values
        >>> with without_values():  # 29 GB, if it had values
        ...     model = LlamaForCausalLM(LlamaConfig())
        ...     logits = model(input_ids=torch.ones(2, 8, dtype=torch.long)).logits
        >>> tuple(logits.shape)
        (2, 8, 32000)

        ```
    """
    # Modules stay where they are: `to` would swap parameters, which tensors without values do not allow.
    stay = patch.object(nn.Module, "to", lambda module, *_, **__: module)
    with FakeTensorMode(allow_non_fake_inputs=True), _OrdinaryValues(), stay, no_init_weights():
        yield


class _OrdinaryValues(TorchDispatchMode):
    """Answers what depends on values as on a batch in which nothing is masked."""

    def __torch_dispatch__(
        self, func: Callable, types: tuple[type, ...], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:
            return args[0].dtype == torch.bool or (0.0 if args[0].is_floating_point() else 0)
        if func in (aten.allclose.default, aten.equal.default):
            return True
        if func is aten.nonzero.default:
            return torch.stack(_everywhere(args[0]), dim=-1)
        if func is aten.bincount.default:
            return args[0].new_zeros(max(1, kwargs.get("minlength", args[2] if len(args) > 2 else 0)))
        if func in INDEXED:
            masked = [(one, one is not None and one.dtype == torch.bool) for one in args[1]]
            indices = [index for one, is_mask in masked for index in (_everywhere(one) if is_mask else [one])]
            args = (args[0], indices, *args[2:])
        return func(*args, **kwargs)


def _everywhere(mask: torch.Tensor) -> list[torch.Tensor]:
    """Indices of all positions of a mask, one tensor a dimension."""
    return [torch.zeros(mask.numel(), dtype=torch.long, device=mask.device) for _ in range(mask.ndim)]
