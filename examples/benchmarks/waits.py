"""Where a step reads a value of a tensor, which on a GPU waits until everything before it is done: `reads_of_a_step`.

Reads are counted by the operations that they are, so that no GPU is needed to know of them.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from types import CodeType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainerCallback

aten = torch.ops.aten
READS = {
    aten._local_scalar_dense.default: "item",  # also `float`, `bool` and `if`
    aten.nonzero.default: "nonzero",
    aten.masked_select.default: "masked_select",
    aten.equal.default: "equal",
    aten.bincount.default: "bincount",
    aten._unique2.default: "unique",
    aten.unique_dim.default: "unique",
    aten.repeat_interleave.Tensor: "repeat_interleave",
}
BY_MASK = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
COPIES = {torch.Tensor.tolist: "tolist", torch.Tensor.cpu: "cpu", torch.Tensor.numpy: "numpy"}
ON_HOST = ("torch/optim/", "torch/utils/data/", "accelerate/data_loader.py")
"""Who reads tensors that are on the CPU anyway: an optimizer its count of steps, a loader its order."""


def reads_of_a_step(trainer: Trainer) -> Counter[str]:
    """What the last optimizer step of a run reads, logging apart: place -> how often; it trains.

    Args:
        trainer: With a `train_dataset`; best of three steps, for the first ones check more.
    """

    def is_host(code: CodeType) -> bool:
        """What is read of a batch before it is on the device waits for nothing."""
        return code.co_name == "get_batch_samples" and trainer.callback_handler.train_dataloader.device is None

    waits = Waits(is_host)
    steps = _Steps(waits)
    trainer.add_callback(steps)
    with waits:
        trainer.train()
    trainer.remove_callback(steps)
    return steps.places


class _Steps(TrainerCallback):
    """Keeps what the last step read."""

    def __init__(self, waits: Waits) -> None:
        self.waits = waits
        self.places: Counter[str] = Counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.places = Counter(self.waits.places)
        self.waits.places.clear()


class Waits(TorchFunctionMode):
    """Counts reads inside the context.

    Args:
        is_host: Whether a code object reads batches that are still on the CPU; nothing that it calls is counted.

    Attributes:
        places: `file:line kind` -> how often, for the first frame outside torch.
    """

    def __init__(self, is_host: Callable[[CodeType], bool] = lambda code: False) -> None:
        super().__init__()
        self.is_host = is_host
        self.places: Counter[str] = Counter()
        self._dispatched = _Dispatched(self)

    def __enter__(self) -> Waits:
        self._dispatched.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._dispatched.__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func in COPIES:
            self.note(COPIES[func])
        return func(*args, **(kwargs or {}))

    def note(self, kind: str) -> None:
        frame, place = sys._getframe(1), None
        while frame is not None:
            name = frame.f_code.co_filename.replace("\\", "/")
            if any(part in name for part in ON_HOST) or self.is_host(frame.f_code):
                return
            if place is None and "/torch/" not in name and name != __file__:
                place = f"{'/'.join(name.rsplit('/', 2)[1:])}:{frame.f_lineno} {kind}"
            frame = frame.f_back
        self.places[place or kind] += 1


class _Dispatched(TorchDispatchMode):
    """The part of it that sees operations."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func in READS:
            self.waits.note(READS[func])
        elif func in BY_MASK and any(one is not None and one.dtype == torch.bool for one in args[1]):
            self.waits.note("index by a mask")
        return func(*args, **(kwargs or {}))
