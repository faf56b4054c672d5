"""Follow every dimension of a model's tensors through one forward: `find_axes`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import PreTrainedModel

from ..routing.dummy_inputs import dummy_inputs
from ..routing.entering import capture_states
from ..routing.forwards import in_dtype_of, in_eval_mode
from ..routing.layers import LayerStack
from ..routing.logits import main_outputs, only_logits
from . import moving_rules  # noqa: F401  (registers its rules)
from .axis import Axis
from .rules import CONSTANT, RULES, Call, Dims, elementwise, opaque
from .siblings import as_siblings

# Operations on single entries that are not marked as such.
ELEMENTWISE = {
    "clone",
    "_to_copy",
    "detach",
    "alias",
    "copy_",
    "copy",
    "masked_fill",
    "lift_fresh",
    "contiguous",
    "fill",
}


@dataclass(frozen=True)
class ModelAxes:
    """The axes of a model.

    Attributes:
        tensors: Name of each parameter and buffer -> the axes of its dimensions.
        outputs: Those of its logits, or of its first output where it has no head.
        states: Those of its hidden states before each layer, and behind the last one.
        unread: Names of the tensors that the forward did not read on these inputs, and that have no sibling which it
            read: nothing is known of these.
    """

    tensors: dict[str, tuple[Axis, ...]]
    outputs: tuple[tuple[Axis, ...], ...]
    states: tuple[tuple[Axis, ...], ...]
    unread: frozenset[str]


def find_axes(
    model: PreTrainedModel, inputs: Mapping[str, Any] | None = None, stack: LayerStack | None = None
) -> ModelAxes:
    """Find which dimensions of which tensors of a model are one and the same.

    The forward runs once; what it does with the dimensions of every tensor is followed operation by operation. So no
    family is listed: residual streams, heads in fused projections, groups of queries, inner widths and channels of
    convolutions come out of what the model computes.

    Args:
        model: It is not changed.
        inputs: A small batch; default: made of its config.
        stack: Its layers, to find the axes of the states between them.

    Returns:
        The axes. Those whose entries must stay where they are, such as a vocabulary, have a reason in `fixed`.

    Example:
        ```python
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from hf_blockkd.axes.following import find_axes
        >>> axes = find_axes(GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=99)))
        >>> [str(axis) for axis in axes.tensors["transformer.h.0.attn.c_attn.weight"]]
        ['32', '(4*8 + 4*8 + 4*8)']

        ```
    """
    inputs = in_dtype_of(model, dummy_inputs(model) if inputs is None else inputs)
    follower = _Follower(model)
    tensors: dict[str, tuple[Axis, ...]] = {}
    for name, tensor, stored in _tensors(model):
        known = follower.axes.get(tensor)
        if known is None:
            # What no weight file holds is computed of the config, and whole numbers are places.
            known = [Axis(size, fixed=None if stored else "it is computed of the config") for size in tensor.shape]
            follower.axes[tensor] = known
        tensors[name] = tuple(known)
    for tensor in tree_iter(dict(inputs)):
        if isinstance(tensor, torch.Tensor):
            follower.axes[tensor] = [Axis(size, fixed="it is one of the inputs") for size in tensor.shape]
    captured = nullcontext({}) if stack is None else capture_states(stack, range(len(stack) + 1))
    eager = sdpa_kernel(SDPBackend.MATH)
    with torch.no_grad(), in_eval_mode(model), only_logits(model), captured as states, eager, follower:
        outputs = main_outputs(model(**inputs))
    found = [tuple(tuple(follower.axes[tensor]) for tensor in some) for some in (outputs, states.values())]
    unread = frozenset(name for name, tensor in follower.tensors.items() if tensor not in follower.read)
    adopted = dict(as_siblings(tensors, unread, itertools.chain(*found)))
    return ModelAxes(tensors | adopted, *found, unread - adopted.keys())


class _Follower(TorchDispatchMode):
    """Keeps the axes of every tensor that operations make."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.tensors = {name: tensor for name, tensor, _ in _tensors(model)}
        self.axes = WeakTensorKeyDictionary()
        self.if_used = WeakTensorKeyDictionary()
        self.read = WeakTensorKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        outputs = [tensor for tensor in tree_iter(output) if isinstance(tensor, torch.Tensor)]
        if not outputs:
            return output
        own_args, own_kwargs = tree_map_only(torch.Tensor, self._of, (args, kwargs))
        operands = [self._of(one) for one in tree_iter((args, kwargs)) if isinstance(one, torch.Tensor)]
        name = func.overloadpacket.__name__
        bare = name.rstrip("_") if not name.endswith("__") else name
        call = Call(bare, args, outputs)
        if name in RULES or bare in RULES:
            made = RULES.get(name, RULES.get(bare))(call, *own_args, **own_kwargs)
        elif torch.Tag.pointwise in func.tags or name in ELEMENTWISE or bare in ELEMENTWISE:
            made = elementwise(call, operands)
        else:
            made = opaque(call, operands)
        for tensor, axes in zip(outputs, made, strict=True):
            self.axes[tensor] = axes
            if call.if_used:
                self.if_used[tensor] = call
        return output

    def _of_a_copy(self, tensor: torch.Tensor) -> Dims | None:
        """Those of a weight that is offloaded, and comes anew each time that its layer runs."""
        if isinstance(tensor, nn.Parameter):
            for name, current, _ in _tensors(self.model):
                if current is tensor:
                    self.read[self.tensors[name]] = True
                    return self.axes[self.tensors[name]]
        return None

    def _of(self, tensor: torch.Tensor) -> Dims:
        self.read[tensor] = True
        axes = self.axes.get(tensor)
        if axes is None:
            axes = self._of_a_copy(tensor) or [Axis(size, fixed=CONSTANT) for size in tensor.shape]
            self.axes[tensor] = axes
        earlier = self.if_used.pop(tensor, None)
        if earlier is not None:
            earlier.fix(*earlier.if_used)
        return axes


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor, bool]]:
    stored = model.state_dict(keep_vars=True).keys()
    for tensors in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        for name, tensor in tensors:
            yield name, tensor, name in stored and tensor.is_floating_point()
