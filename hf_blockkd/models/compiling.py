"""`torch_compile=True`: the layers of student and teacher are compiled, each by itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from torch import nn

from ..routing.forwards import replaced_forward
from ..routing.layers import LayerStack


def take_over_compiling(accelerator: Accelerator) -> dict[str, Any] | None:
    """Options of `torch.compile` by which Accelerate would compile the student, which it no longer does then.

    Hidden states enter and leave the layers through hooks, and a stone skips layers by giving them another forward.
    dynamo does not look for hooks that came after it compiled (`skip_nnmodule_hook_guards`), so that in one graph of a
    whole model they would be left out without a word, or compile it anew at every step. Between compiled layers they
    run as ever, and layers of one shape share a graph.
    """
    plugin = accelerator.state.dynamo_plugin
    if plugin.backend == DynamoBackend.NO:
        return None
    options = plugin.to_kwargs()
    plugin.backend = DynamoBackend.NO
    return options


@contextmanager
def compiled(options: dict[str, Any] | None, *stacks: LayerStack) -> Iterator[None]:
    """Compile every layer by itself inside the context; without options, none.

    Afterwards they are as they were: a copy of a model would otherwise run the compiled layers of the original.
    """
    with ExitStack() as stack:
        for layer in (layer for one in stacks if options is not None for layer in one.layers):
            stack.enter_context(replaced_forward(layer, torch.compile(layer.forward, **options)))
        yield


def check_not_compiled(model: nn.Module, role: str) -> None:
    """Raise a `ValueError` for a model with a compiled part, which might not see the hooks that route states."""
    for name, module in model.named_modules():
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            raise ValueError(
                f"`{role}` is compiled{f' in {name!r}' if name else ''}, so that what routes hidden states could be "
                "left out without a word; pass the plain model and set `torch_compile=True`, which compiles the layers."
            )
