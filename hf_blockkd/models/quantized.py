"""Quantized teachers: their layers must pass gradients on, which not every backend's do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..routing.entering import Extras, capture_states, enter_at
from ..routing.layers import LayerStack
from ..routing.logits import main_outputs


def is_quantized(model: PreTrainedModel) -> bool:
    """Whether weights of a model are kept in other numbers than they are multiplied in."""
    # torchao's weights are tensors of a class of their own, which `quantize_` puts into any model.
    return getattr(model, "is_quantized", False) or any(
        type(parameter.data).__module__.startswith("torchao.") for parameter in model.parameters()
    )


def packed_weights(model: PreTrainedModel) -> list[str]:
    """Names of the tensors that hold weights in other numbers than they are multiplied in."""
    # Of what `is_quantized` finds, GGUF files are unpacked when they are loaded.
    if not is_quantized(model):
        return []
    plain = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.bool)
    return [
        name
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if tensor.dtype not in plain or type(tensor.data).__module__.startswith("torchao.")
    ]


def keep_gradients(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights in a clean pass on a CPU, after which no gradient would pass."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def weight_tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    """Everything in a model that is large and does not change while its parameters are frozen."""
    yield from model.parameters()
    # Of other backends, weights are buffers.
    yield from (buffer for buffer in model.buffers() if not buffer.is_floating_point())
    for module in model.modules():
        if hasattr(module, "init_8bit_state"):
            # bitsandbytes takes it from the weight in the first forward: of two modules, the second would get nothing.
            if module.weight.CB is not None:
                module.init_8bit_state()
            yield from (tensor for tensor in vars(module.state).values() if isinstance(tensor, torch.Tensor))


def swallowed_gradients(
    model: PreTrainedModel, stack: LayerStack, inputs: Mapping[str, Any], extras: Extras, depth: int
) -> list[str]:
    """Find the modules above a depth whose inputs get no gradient, or zero, whatever the gradient of their output.

    A backend that quantizes activations, too, may round them in a way that has no gradient. What a stone learns would
    then come through the residual connections alone, without a word.

    Args:
        model: In eval mode.
        stack: Its layers.
        inputs: Keyword arguments of its forward.
        extras: From `record_extras`, around a clean forward on these inputs.
        depth: First layer that is looked at.

    Returns:
        Their names, in the order in which they were called.
    """
    with torch.no_grad(), capture_states(stack, [depth]) as states:
        model(**inputs)
    # In the order of a call: name, input, output.
    calls: list[tuple[str, torch.Tensor, torch.Tensor]] = []
    names = {module: name for name, module in model.named_modules()}

    def keep(module: nn.Module, args: tuple, output: Any) -> None:
        if args and isinstance(args[0], torch.Tensor) and args[0].requires_grad and isinstance(output, torch.Tensor):
            calls.append((names[module], args[0], output))

    leaves = [m for m in model.modules() if not any(m.children()) and (m._parameters or m._buffers)]
    handles = [module.register_forward_hook(keep) for module in leaves]
    try:
        with torch.enable_grad(), enter_at(stack, depth, states[depth].requires_grad_(), extras):
            main_outputs(model(**inputs))
    finally:
        for handle in handles:
            handle.remove()
    return [name for name, entered, left in calls if not _passes_gradients(entered, left)]


def _passes_gradients(entered: torch.Tensor, left: torch.Tensor) -> bool:
    if not left.requires_grad:
        return False
    (gradient,) = torch.autograd.grad(left, entered, torch.ones_like(left), retain_graph=True, allow_unused=True)
    return gradient is not None and bool(gradient.any())
