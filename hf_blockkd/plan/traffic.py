"""Operations that a device is given, what they move besides matrix products, and what lives at the peak: `Traffic`."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ..models.flops import CPU_ATTENTION

PRODUCTS = {*flop_registry, *CPU_ATTENTION}
"""Kernels whose time goes by their FLOPs."""


class Traffic(TorchDispatchMode):
    """Counts what runs inside of the context, forwards and backwards, each operation as one kernel.

    Attributes:
        bytes: Read and written by all kernels but matrix products, convolutions and attention.
        kernels: Number of all of them; views are none.
        peak: Bytes of all that was made inside, where most of it lived at once.

    Example:
        ```python
        >>> import torch
        >>> from hf_blockkd.plan.traffic import Traffic
        >>> one = torch.ones(10, 10)
        >>> with Traffic() as traffic:
        ...     total = (one @ one.T).exp()
        >>> traffic.bytes, traffic.kernels
        (800, 2)

        ```
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.kernels = self.peak = self._living = 0
        self._storages: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable, types: tuple[type, ...], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.is_view or func.namespace == "prim":  # views, and questions that fake tensors ask, start no kernel
            return out
        given, made = (
            [one for one in tree_leaves(tree) if isinstance(one, torch.Tensor)] for tree in ((args, kwargs), out)
        )
        self.kernels += 1
        if func.overloadpacket not in PRODUCTS:
            self.bytes += sum(one.numel() * one.element_size() for one in (*given, *made))
        old = {one.untyped_storage()._cdata for one in given}
        for storage in (one.untyped_storage() for one in made):
            if storage._cdata not in old | self._storages:
                self._storages.add(storage._cdata)
                self._living += storage.nbytes()
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self._living)
        return out

    def _free(self, storage: int, size: int) -> None:
        self._storages.discard(storage)
        self._living -= size
