"""What each operation of torch does with the axes of its tensors: `RULES`; those that only move entries stand apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .axis import Axis, fix, split, unify

Dims = list[Axis]
Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}
"""Name of an operation -> what it makes of axes: called with a `Call` and the arguments of the operation, of which
tensors are their axes, it returns the axes of each tensor that comes out."""


CONSTANT = "it is a constant"
"""Why the entries of a tensor that nothing made stay where they are."""


class Call:
    """One operation: its name, its arguments, and the tensors that came out."""

    def __init__(self, name: str, args: Sequence[Any], outputs: Sequence[torch.Tensor]) -> None:
        self.name, self.args, self.outputs = name, args, outputs
        self.if_used: list[Axis] = []

    def fresh(self, number: int = 0, fixed: bool = True) -> Dims:
        """New axes for an output."""
        return [self.new(size, fixed) for size in self.outputs[number].shape]

    def new(self, size: int, fixed: bool = True) -> Axis:
        return Axis(size, fixed=self.reason if fixed else None)

    def fix(self, *axes: Axis) -> None:
        for axis in axes:
            fix(axis, self.reason)

    @property
    def reason(self) -> str:
        return f"`{self.name}` reads it as a whole"


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register the rule of some operations."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def elementwise(call: Call, operands: Sequence[Dims]) -> list[Dims]:
    """Of operations on single entries: dimensions that stand below each other are one."""
    made = []
    for output in call.outputs:
        axes = []
        for index, size in enumerate(reversed(output.shape), start=1):
            below = [one[-index] for one in operands if len(one) >= index and one[-index].size == size]
            for other in below[1:]:
                unify(below[0], other)
            axes.insert(0, below[0] if below else call.new(size))
        made.append(axes)
    return made


def opaque(call: Call, operands: Sequence[Dims]) -> list[Dims]:
    """Of operations that have no rule: nothing that goes in or comes out may change its place."""
    for axes in operands:
        call.fix(*axes)
    return [call.fresh(number) for number in range(len(call.outputs))]


def same(call: Call, x: Dims, *args: Any, **kwargs: Any) -> list[Dims]:
    """Of operations whose outputs have the dimensions of their first input."""
    sizes = [axis.size for axis in x]
    if list(call.outputs[0].shape) != sizes:
        return opaque(call, [x])
    return [x if list(output.shape) == sizes else call.fresh(n) for n, output in enumerate(call.outputs)]


rule("_softmax", "_log_softmax", "_safe_softmax", "native_dropout", "as_strided_", "log_sigmoid_forward")(same)


@rule("zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty")
@rule("zeros", "ones", "full", "empty", "scalar_tensor", "new_empty_strided", "empty_strided")
def _constant(call: Call, *args: Any, **kwargs: Any) -> list[Dims]:
    return [call.fresh(number, fixed=False) for number in range(len(call.outputs))]


@rule("cumsum", "flip", "roll", "triu", "tril", "sort", "cumprod")
def _in_order(call: Call, x: Dims, *args: Any, **kwargs: Any) -> list[Dims]:
    # Along which dimensions does not matter for those that others share: states and heads are never among them.
    if call.name in ("triu", "tril"):
        dims = [-2, -1]
    elif call.name == "flip":
        dims = args[0]
    elif call.name == "roll":
        dims = args[1] if len(args) > 1 else range(len(x))
    else:
        dims = [kwargs.get("dim", next((value for value in args if type(value) is int), -1))]
    for dim in dims:
        call.fix(x[dim])
    return [x for _ in call.outputs]


@rule("topk", "kthvalue", "mode")
def _topk(call: Call, x: Dims, k: int, dim: int = -1, *args: Any) -> list[Dims]:
    call.fix(x[dim])
    made = [*x]
    made[dim] = call.new(call.outputs[0].shape[dim] if call.outputs[0].ndim else 1)
    return [made for _ in call.outputs]


@rule("sum", "mean", "amax", "amin", "var", "std", "prod", "any", "all", "argmax", "argmin", "max", "min", "var_mean")
@rule("logsumexp", "linalg_vector_norm", "norm", "median", "count_nonzero", "nansum")
def _reduce(call: Call, x: Dims, *args: Any, **kwargs: Any) -> list[Dims]:
    # Which dimensions are left follows from the sizes, as far as these differ; the arguments differ by operation.
    dims = next((value for value in (kwargs.get("dim"), *args) if _are_dims(value, call, x)), None)
    dims = list(range(len(x))) if dims is None or dims == [] else [dims] if isinstance(dims, int) else list(dims)
    dims = [dim % max(len(x), 1) for dim in dims]
    if call.name in ("argmax", "argmin"):
        call.fix(*(x[dim] for dim in dims))
    made = []
    for output in call.outputs:
        if output.ndim == len(x):
            made.append([Axis(1) if dim in dims else axis for dim, axis in enumerate(x)])
        else:
            made.append([axis for dim, axis in enumerate(x) if dim not in dims])
    return made


def _are_dims(value: Any, call: Call, x: Dims) -> bool:
    values = value if isinstance(value, (list, tuple)) else [value]
    if not all(isinstance(one, int) and not isinstance(one, bool) for one in values):
        return False
    dims = {one % max(len(x), 1) for one in values} or set(range(len(x)))
    shape = tuple(call.outputs[0].shape)
    kept = tuple(axis.size for dim, axis in enumerate(x) if dim not in dims)
    return shape in (kept, tuple(1 if dim in dims else axis.size for dim, axis in enumerate(x)))


# Products.


@rule("mm")
def _mm(call: Call, a: Dims, b: Dims, *args: Any) -> list[Dims]:
    unify(a[1], b[0])
    return [[a[0], b[1]]]


@rule("addmm", "_addmm_activation")
def _addmm(call: Call, bias: Dims, a: Dims, b: Dims, *args: Any, **kwargs: Any) -> list[Dims]:
    (out,) = _mm(call, a, b)
    return elementwise(call, [out, bias])


@rule("linear")
def _linear(call: Call, x: Dims, weight: Dims, bias: Dims | None = None) -> list[Dims]:
    unify(x[-1], weight[1])
    return elementwise(call, [[*x[:-1], weight[0]], *([bias] if bias else [])])


@rule("_grouped_mm")
def _grouped_mm(call: Call, a: Dims, b: Dims, *args: Any, **kwargs: Any) -> list[Dims]:
    if len(a) != 2 or len(b) != 3:
        return opaque(call, [a, b])
    call.fix(a[0], b[0])
    unify(a[1], b[1])
    return [[a[0], b[2]]]


@rule("bmm")
def _bmm(call: Call, a: Dims, b: Dims) -> list[Dims]:
    unify(a[0], b[0])
    unify(a[2], b[1])
    return [[a[0], a[1], b[2]]]


@rule("baddbmm")
def _baddbmm(call: Call, bias: Dims, a: Dims, b: Dims, **kwargs: Any) -> list[Dims]:
    (out,) = _bmm(call, a, b)
    return elementwise(call, [out, bias])


@rule("mv")
def _mv(call: Call, a: Dims, x: Dims) -> list[Dims]:
    unify(a[1], x[0])
    return [[a[0]]]


@rule("dot", "vdot")
def _dot(call: Call, a: Dims, b: Dims) -> list[Dims]:
    unify(a[0], b[0])
    return [[]]


@rule("convolution")
def _convolution(
    call: Call, x: Dims, weight: Dims, bias: Dims | None, stride: Any, padding: Any, dilation: Any, transposed: bool,
    output_padding: Any, groups: int,
) -> list[Dims]:  # fmt: skip
    call.fix(*x[2:], *weight[2:])
    made, taken = (weight[1], weight[0]) if transposed else (weight[0], weight[1])
    if groups == 1:
        unify(x[1], taken)
    elif transposed:
        return opaque(call, [x, weight, *([bias] if bias else [])])
    else:
        group, within = split(x[1], groups, x[1].size // groups)
        other, _ = split(made, groups, made.size // groups)
        unify(group, other)
        unify(within, taken)
    if bias:
        unify(bias[0], made)
    return [[x[0], made, *(call.new(size) for size in call.outputs[0].shape[2:])]]


# Norms.


@rule("_weight_norm_interface")
def _weight_norm(call: Call, direction: Dims, length: Dims, dim: int = 0) -> list[Dims]:
    """Divides a weight by its norms over all dimensions but one, and multiplies by other lengths."""
    unify(direction[dim], length[dim])
    return [direction, [axis if place == dim else Axis(1) for place, axis in enumerate(direction)]]


@rule("native_layer_norm", "_fused_rms_norm", "rms_norm")
def _layer_norm(call: Call, x: Dims, shape: Any, *tensors: Any) -> list[Dims]:
    for weights in tensors:
        if isinstance(weights, list):
            for ours, own in zip(x[-len(weights) :], weights, strict=True):
                unify(ours, own)
    rest = [x[: -len(shape)] + [Axis(1) for _ in shape] for _ in call.outputs[1:]]
    return [x, *rest]


@rule("_weight_norm_interface")
def _weight_norm(call: Call, weight: Dims, sizes: Dims, dim: int = 0) -> list[Dims]:
    """Weights over the norm of all that stands under the same entry of one dimension."""
    unify(weight[dim], sizes[dim])
    return [weight, [axis if index == dim else Axis(1) for index, axis in enumerate(weight)]]


@rule("native_group_norm")
def _group_norm(call: Call, x: Dims, weight: Dims | None, bias: Dims | None, *args: Any) -> list[Dims]:
    for weights in (weight, bias):
        if weights:
            unify(x[1], weights[0])
    groups = args[3]
    split(x[1], groups, x[1].size // groups)
    return [x, *(call.fresh(number) for number in range(1, len(call.outputs)))]


@rule("native_batch_norm", "_native_batch_norm_legit_no_training", "_native_batch_norm_legit", "cudnn_batch_norm")
@rule("_batch_norm_no_update", "batch_norm", "_batch_norm_with_update")
def _batch_norm(call: Call, x: Dims, *args: Any) -> list[Dims]:
    for weights in args:
        if isinstance(weights, list) and len(weights) == 1 and isinstance(weights[0], Axis):
            unify(x[1], weights[0])
    return [x, *(call.fresh(number) for number in range(1, len(call.outputs)))]
