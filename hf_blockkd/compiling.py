"""`torch_compile=True`: the layers of student and teacher are compiled, each by itself."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from torch import nn

from .layers import LayerStack


def compile_layers(accelerator: Accelerator, *stacks: LayerStack) -> None:
    """Compile what Accelerate would compile, layer by layer instead of as one graph.

    Hidden states enter and leave the layers through hooks, and a stone skips layers by giving them another forward.
    dynamo does not look for hooks that came after it compiled (`skip_nnmodule_hook_guards`), so that in one graph of a
    whole model they would be left out without a word, or compile it anew at every step. Between compiled layers they
    run as ever, and layers of one shape share a graph.

    Args:
        accelerator: Of the run; it compiles nothing itself afterwards.
        stacks: The layers. Their weights keep their names.
    """
    plugin = accelerator.state.dynamo_plugin
    if plugin.backend == DynamoBackend.NO:
        return
    options = plugin.to_kwargs()
    plugin.backend = DynamoBackend.NO
    for stack in stacks:
        for layer in stack.layers:
            layer.forward = torch.compile(layer.forward, **options)


def check_not_compiled(model: nn.Module, role: str) -> None:
    """Raise a `ValueError` for a model with a compiled part, which might not see the hooks that route states."""
    for name, module in model.named_modules():
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            raise ValueError(
                f"`{role}` is compiled{f' in {name!r}' if name else ''}, so that what routes hidden states could be "
                "left out without a word; pass the plain model and set `torch_compile=True`, which compiles the layers."
            )
